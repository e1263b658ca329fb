"""Pixels of every image mode as 8-bit RGB, compared with closed forms in numpy: alpha on white, windows for 16-bit grey."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtune.chat.session import ChatSession
from mmtune.cli.main import entry_point
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import EmbeddedMedia, ImageView, image_size, open_image
from mmtune.data.media.pixels import apply_window

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)
ALPHA = RNG.permutation(np.linspace(0, 255, 63).astype(np.uint8)).reshape(9, 7)


def _on_white(colours: Any, alpha: Any) -> np.ndarray[Any, Any]:
    """Alpha compositing (Porter and Duff 1984, over) on white, rounded to the nearest integer."""
    share = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.floor(share * np.asarray(colours, dtype=np.float64) + (1 - share) * 255 + 0.5).astype(np.uint8)


def _media(data: bytes) -> EmbeddedMedia:
    return EmbeddedMedia(Path("rows"), "image", data=data)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _pixels(data: bytes) -> np.ndarray[Any, Any]:
    """What `open_image` gives, of the size that the header says, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(_media(data))
    assert image.mode == "RGB" and image.size == image_size(_media(data))
    return np.asarray(image)


def _png(width: int, height: int, depth: int, colour: int, pixels: bytes, clear: bytes = b"", palette: bytes = b"") -> bytes:
    """A PNG with the bits that are given, which Pillow does not write in every form (PNG specification, 11.2 and 11.3)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    stride = len(pixels) // height
    lines = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            chunk(b"PLTE", palette) if palette else b"",
            chunk(b"tRNS", clear) if clear else b"",
            chunk(b"IDAT", zlib.compress(lines)),
            chunk(b"IEND", b""),
        ]
    )


def _tiff(pixels: bytes, size: tuple[int, int], bits: list[int], photometric: int, order: str, more: dict[int, int]) -> bytes:
    """A TIFF of one strip (TIFF 6.0, section 2), in either byte order."""
    tags = {256: size[0], 257: size[1], 258: bits, 259: 1, 262: photometric, 273: 0, 277: len(bits), 278: size[1], 279: 0} | more
    head = 8 + 2 + 12 * len(tags) + 4
    beyond = b"".join(struct.pack(order + "H", bit) for bit in bits) if len(bits) > 2 else b""
    tags |= {273: head + len(beyond), 279: len(pixels)}
    entries = b""
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, list) else [value]
        long = tag in (273, 279)
        if len(values) > 2:
            entries += struct.pack(order + "HHII", tag, 3, len(values), head)
        else:
            inline = b"".join(struct.pack(order + ("I" if long else "H"), each) for each in values)
            entries += struct.pack(order + "HHI", tag, 4 if long else 3, len(values)) + inline.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + beyond + pixels


# ---------------------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True}), ("JPEG2000", {"irreversible": False})],
)
def test_alpha_is_composited_on_white(format: str, options: dict[str, Any]) -> None:
    image = Image.fromarray(np.dstack([COLOURS, ALPHA]), "RGBA")
    assert np.array_equal(_pixels(_saved(image, format, **options)), _on_white(COLOURS, ALPHA))
    grey = np.repeat(COLOURS[..., :1], 3, axis=2)
    image = Image.fromarray(np.dstack([COLOURS[..., 0], ALPHA]), "LA")
    assert np.array_equal(_pixels(_saved(image, format, **options)), _on_white(grey, ALPHA))


def test_alpha_of_a_format_with_loss_is_composited_on_white() -> None:
    alpha = np.repeat(np.array([0, 128, 255], np.uint8), 16)[None].repeat(16, axis=0)
    colours = np.full((16, 48, 3), (40, 90, 200), np.uint8)
    rgb = _pixels(_saved(Image.fromarray(np.dstack([colours, alpha]), "RGBA"), "AVIF", quality=100, subsampling="4:4:4"))
    off = np.abs(rgb.astype(int) - _on_white(colours, alpha))
    assert off[:, [4, 24, 44]].max() <= 4


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
def test_premultiplied_alpha_of_a_tiff_is_divided_out_first(order: str, bits: int) -> None:
    """Its colours are alpha times the colour, so white shows through by what alpha leaves: exact to the rounding of each."""
    alpha = np.full((9, 7), 128, np.uint8)
    stored = np.dstack([np.minimum(COLOURS, 128), alpha]).astype(np.uint16)
    stored = stored * 257 if bits == 16 else stored
    data = stored.astype(f"{order}u{bits // 8}").tobytes()
    rgb = _pixels(_tiff(data, (7, 9), [bits] * 4, 2, order, {338: 1}))
    assert np.abs(rgb.astype(int) - (np.minimum(COLOURS, 128).astype(int) + 255 - 128)).max() <= 1


def test_a_palette_is_transparent_by_index_or_by_alpha() -> None:
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    colours = np.array(palette).reshape(1, 3, 3)
    for alpha in ([0, 255, 255], [0, 128, 255], [7, 128, 200]):
        rgb = _pixels(_png(3, 1, 8, 3, bytes([0, 1, 2]), bytes(alpha), bytes(palette)))
        assert np.array_equal(rgb, _on_white(colours, [alpha]))
    gif = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    gif.putpalette(palette)
    assert np.array_equal(_pixels(_saved(gif, "GIF", transparency=1)), _on_white(colours, [[255, 0, 255]]))
    with_alpha = Image.fromarray(np.dstack([[[0, 1, 2]], [[9, 128, 255]]]).astype(np.uint8), "PA")
    with_alpha.putpalette(palette)
    assert np.array_equal(_pixels(_saved(with_alpha, "TIFF")), _on_white(colours, [[9, 128, 255]]))


@pytest.mark.parametrize(
    ("depth", "pixels", "grey", "key"),
    [
        (1, bytes([0b01000000]), [0, 255], 0),
        (1, bytes([0b01000000]), [0, 255], 1),
        (2, bytes([0b01100000]), [85, 170], 2),
        (4, bytes([0x5A]), [85, 170], 10),
        (8, bytes([5, 9]), [5, 9], 9),
        (16, struct.pack(">2H", 0x1234, 0x1235), [0x12, 0x12], 0x1235),
    ],
)
def test_a_transparent_grey_value_is_white(depth: int, pixels: bytes, grey: list[int], key: int) -> None:
    """The key is of the file's own bits (PNG specification, 11.3.2.1), and only the pixels that equal it are transparent."""
    clear = 0 if depth == 1 and key == 0 else 1
    expected = [255 if place == clear else level for place, level in enumerate(grey)]
    assert _pixels(_png(2, 1, depth, 0, pixels, struct.pack(">H", key)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("depth", "scale"), [(8, 1), (16, 259)])
def test_a_transparent_colour_is_white(depth: int, scale: int) -> None:
    pixels = np.array([1, 2, 3, 4, 5, 6]) * scale  # 16 bits: upper halves from 1 to 6, other lower halves
    data = pixels.astype(f">u{depth // 8}").tobytes()
    rgb = _pixels(_png(2, 1, depth, 2, data, struct.pack(">3H", *(pixels[3:]))))
    assert rgb.tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bits_with_alpha_keep_the_upper_eight() -> None:
    stored = np.dstack([COLOURS, ALPHA]).astype(np.uint16) * 257
    expected = _on_white(COLOURS, ALPHA)
    assert np.array_equal(_pixels(_png(7, 9, 16, 6, stored.astype(">u2").tobytes())), expected)
    for order in "<>":
        data = stored.astype(f"{order}u2").tobytes()
        assert np.array_equal(_pixels(_tiff(data, (7, 9), [16] * 4, 2, order, {338: 2})), expected)
    grey = np.dstack([COLOURS[..., 0], ALPHA]).astype(">u2") * 257
    rgb = _pixels(_png(7, 9, 16, 4, grey.astype(">u2").tobytes()))
    assert np.array_equal(rgb, _on_white(np.repeat(COLOURS[..., :1], 3, axis=2), ALPHA))


def test_a_fourth_channel_other_than_alpha_is_not_transparent() -> None:
    data = np.dstack([COLOURS, ALPHA]).tobytes()
    assert np.array_equal(_pixels(_tiff(data, (7, 9), [8] * 4, 2, "<", {338: 0})), COLOURS)
    assert inspect_image(_media(_tiff(data, (7, 9), [8] * 4, 2, "<", {338: 0}))).issues == []


def test_training_evaluation_and_chat_see_the_same_picture(tmp_path: Path, untrained: Any) -> None:
    """Black ink on nothing, as charts and formulas are saved: it trains, is asked about and is talked about on white."""
    model, processor = untrained
    ink = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (10, 10, 40, 30))
    ink.save(tmp_path / "ink.png")
    flat = Image.new("RGB", (64, 48), "white")
    flat.paste((0, 0, 0), (10, 10, 40, 30))
    flat.save(tmp_path / "flat.png")
    seen = []
    for name in ("ink.png", "flat.png"):
        question = {"role": "user", "content": [{"type": "image", "image": tmp_path / name}]}
        seen.append(encode_prompt("r", [question], processor)["pixel_values"])
    assert seen[0].equal(seen[1])
    session = ChatSession(model, processor)
    assert session.attach(tmp_path / "ink.png") == (64, 48)


# --------------------------------------------------------------------------------------------------------------- windows


def _window(values: Any, low: float, high: float) -> np.ndarray[Any, Any]:
    """The closed form: linear from low to high, clipped, rounded to the nearest integer."""
    share = (np.asarray(values, dtype=np.float64) - low) / (high - low)
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


WIDE = np.array([[0, 1, 255, 256, 1000, 4095, 40_000, 65_535], [7, 77, 777, 7777, 12_345, 23_456, 34_567, 45_678]])
SIGNED = np.array([[-1024, -1000, -160, 0, 40, 240, 3071, 32_767]])
LARGE = np.array([[0, 70_000, 2**31 - 1, 12_345_678]])
UNSIGNED = np.array([[0, 70_000, 2**32 - 1, 2**31 + 5]])
REAL = np.array([[-1.5, 0.0, 0.25, 0.5, 1.0, np.nan, np.inf, -np.inf]])

GREY: dict[str, tuple[Any, Any]] = {
    "png": (WIDE, lambda v: _png(8, 2, 16, 0, v.astype(">u2").tobytes())),
    "pgm": (WIDE, lambda v: b"P5 8 2 65535\n" + v.astype(">u2").tobytes()),
    "jpeg2000": (WIDE, lambda v: _saved(Image.fromarray(v.astype(np.uint16)), "JPEG2000", irreversible=False)),
    "tiff": (WIDE, lambda v: _tiff(v.astype("<u2").tobytes(), (8, 2), [16], 1, "<", {})),
    "tiff, big-endian": (WIDE, lambda v: _tiff(v.astype(">u2").tobytes(), (8, 2), [16], 1, ">", {})),
    "tiff, signed": (SIGNED, lambda v: _tiff(v.astype("<i2").tobytes(), (8, 1), [16], 1, "<", {339: 2})),
    "tiff, signed, big-endian": (SIGNED, lambda v: _tiff(v.astype(">i2").tobytes(), (8, 1), [16], 1, ">", {339: 2})),
    "tiff, 32 bits": (LARGE, lambda v: _tiff(v.astype("<i4").tobytes(), (4, 1), [32], 1, "<", {339: 2})),
    "tiff, 32 bits, big-endian": (LARGE, lambda v: _tiff(v.astype(">i4").tobytes(), (4, 1), [32], 1, ">", {339: 2})),
    "tiff, 32 bits unsigned": (UNSIGNED, lambda v: _tiff(v.astype("<u4").tobytes(), (4, 1), [32], 1, "<", {339: 1})),
    "tiff, real": (REAL, lambda v: _tiff(v.astype("<f4").tobytes(), (8, 1), [32], 1, "<", {339: 3})),
    "tiff, real, big-endian": (REAL, lambda v: _tiff(v.astype(">f4").tobytes(), (8, 1), [32], 1, ">", {339: 3})),
    "pfm": (REAL[:, :5], lambda v: b"Pf\n5 1\n-1.0\n" + v.astype("<f4").tobytes()),
}


@pytest.mark.parametrize("name", GREY)
@pytest.mark.parametrize("window", [(0.0, 1.0), (-160.0, 240.0), (0.0, 4095.0), (100.5, 2.0**32)])
def test_a_window_is_linear_and_clips(name: str, window: tuple[float, float]) -> None:
    values, write = GREY[name]
    media = ImageView(_media(write(values)), window)
    expected = _window(np.nan_to_num(values, nan=window[0], posinf=1e300, neginf=-1e300), *window)
    image = open_image(media)
    assert image.size == image_size(media) and image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("name", GREY)
def test_without_a_window_16_bits_keep_the_upper_8_and_others_are_rejected(name: str) -> None:
    values, write = GREY[name]
    media = _media(write(values))
    if values is WIDE:
        assert np.array_equal(np.asarray(open_image(media))[..., 0], values // 256)
        return
    kinds = {id(SIGNED): "signed 16-bit", id(LARGE): "signed 32-bit", id(UNSIGNED): "32-bit"}
    kind = kinds.get(id(values), "floating-point")
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=rf"has {kind} values, .*set `window: \[LOW, HIGH\]`"):
            read(media)
    assert [name for name, _ in inspect_image(media).issues] == ["image_unreadable"]


def test_a_window_does_not_change_8_bit_images() -> None:
    for image in (Image.fromarray(COLOURS), Image.fromarray(COLOURS[..., 0]), Image.new("1", (7, 9), 1)):
        data = _saved(image, "PNG")
        assert np.array_equal(np.asarray(open_image(ImageView(_media(data), (0.0, 10.0)))), _pixels(data))


def test_twelve_bit_values_are_scaled_by_the_12_bit_range() -> None:
    """Two values of 12 bits in three bytes (TIFF 6.0, section 2, BitsPerSample)."""
    values = [0x123, 0xFED]
    data = bytes([values[0] >> 4, (values[0] & 15) << 4 | values[1] >> 8, values[1] & 255])
    tiff = _tiff(data, (2, 1), [12], 1, "<", {})
    assert _pixels(tiff)[0, :, 0].tolist() == [0x12, 0xFE]
    assert np.asarray(open_image(ImageView(_media(tiff), (0.0, 4095.0))))[0, :, 0].tolist() == _window(values, 0, 4095).tolist()


@pytest.mark.parametrize("order", ["<"])
def test_zero_is_white_in_a_white_is_zero_tiff(order: str) -> None:
    data = WIDE.astype(f"{order}u2").tobytes()
    assert np.array_equal(_pixels(_tiff(data, (8, 2), [16], 0, order, {}))[..., 0], 255 - WIDE // 256)


def test_the_first_page_of_a_tiff_is_shown() -> None:
    pages = [Image.fromarray((WIDE + step).clip(0, 65_535).astype(np.uint16)) for step in (0, 9_000)]
    data = _saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(_pixels(data)[..., 0], WIDE // 256)
    issues = dict(inspect_image(_media(data)).issues)
    assert issues["image_animated"] == "several pages" and issues["image_16bit"] == "TIFF with 16 bits per channel"


def test_a_transparent_picture_is_checked_and_shown_on_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ink = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (10, 10, 40, 30))
    ink.save(tmp_path / "ink.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a square"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "ink.png", "conversations": turns}]))
    rows = f"{{path: {tmp_path / 'rows.json'}, template: llava}}"
    recipe = f"model: {{base: builtin:tiny-llava}}\ndata: {{train: [{rows}]}}\noutput_dir: {tmp_path / 'run'}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert entry_point(["data", "check", str(tmp_path / "recipe.yaml")]) == 0
    assert "image_transparent" in capsys.readouterr().out
    assert (
        entry_point(["data", "show", str(tmp_path / "recipe.yaml"), "--index", "0", "--html", str(tmp_path / "page.html")]) == 0
    )
    [page] = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", (tmp_path / "page.html").read_text())
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(page))).convert("L"))
    assert shown[0, 0] == 255 and shown[20, 20] == 0


@pytest.mark.parametrize("window", [(-np.inf, np.inf), (0.0, np.inf), (np.nan, 1.0)])
def test_a_window_is_finite(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected a window of two finite numbers"):
        apply_window(np.zeros((2, 2)), window)
