"""Opening of images: upright and in RGB, or an error that names the image."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from mmtune.data.media.media import MAX_PIXELS, EmbeddedMedia, MediaRules, image_size, open_image, resolve_media

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.bmp"])
def test_a_truncated_file_with_a_valid_header_is_rejected(tmp_path: Path, name: str) -> None:
    NOISE.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert open_image(tmp_path / name).size == (80, 60)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    if name != "cut.webp":  # WebP's own header holds the file's length
        assert image_size(tmp_path / name) == (80, 60)
    with pytest.raises(ValueError, match=name):
        open_image(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_files_that_are_not_images_are_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"cannot open image .*a\.jpg"):
            read(tmp_path / "a.jpg")


def test_a_directory_and_a_missing_file_are_rejected(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="cannot open image"):
            open_image(path)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 8_948)])
def test_a_decompression_bomb_is_rejected_by_its_header(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(_png(width, height))

    def decoded(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"bomb\.png: expected an image of 1 to 89,478,485 pixels, got .*; make it smaller$"):
            read(tmp_path / "bomb.png")


def test_the_size_limit_equals_pillows_and_applies_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    (tmp_path / "fits.png").write_bytes(_png(10_000, 8_947))
    assert image_size(tmp_path / "fits.png") == (10_000, 8_947)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(_png(10_000, 8_948))
    with pytest.raises(ValueError, match=f"an image of 1 to {MAX_PIXELS:,} pixels, got 10000 x 8948; make it smaller"):
        image_size(tmp_path / "bomb.png")


def _oriented(format: str, orientation: int, image: Image.Image = NOISE, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, format, exif=exif, **options)
    return out.getvalue()


def _both(tmp_path: Path, data: bytes) -> list[Path | EmbeddedMedia]:
    """The same bytes as a file, in hand, and as a slice of another file."""
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "all").write_bytes(b"before" * 99 + data + b"\xff\xd8 behind" * 99)
    return [
        tmp_path / "a",
        EmbeddedMedia(tmp_path, "a", data=data),
        EmbeddedMedia(tmp_path / "all", "a", offset=6 * 99, length=len(data)),
    ]


@pytest.mark.parametrize("orientation", [*range(10), 6])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_an_image_is_upright_from_every_kind_of_source(tmp_path: Path, format: str, orientation: int) -> None:
    """As Pillow's own transpose has it, and its size is predicted by the header."""
    data = _oriented(format, orientation)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert upright.shape[:2] == ((80, 60) if 5 <= orientation <= 8 else (60, 80))
    for media in _both(tmp_path, data):
        assert np.array_equal(np.asarray(open_image(media)), upright)
        assert image_size(media) == (upright.shape[1], upright.shape[0])


def test_an_orientation_after_the_pixels_of_a_png_is_read_without_decoding_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = _oriented("PNG", 6)
    at = early.index(b"eXIf") - 4
    length = int.from_bytes(early[at : at + 4], "big") + 12
    late = early[:at] + early[at + length : -12] + early[at : at + length] + early[-12:]
    assert early[at : at + length] in late and late.index(b"IDAT") < late.index(b"eXIf")
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    description = struct.pack(">I4s", len(text), b"iTXt") + text + struct.pack(">I", zlib.crc32(b"iTXt" + text))
    in_text = early[:at] + early[at + length : -12] + description + early[-12:]
    for data in (late, in_text):
        assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (60, 80)
        for media in _both(tmp_path, data):
            assert open_image(media).size == (60, 80)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for data in (early, late, in_text):
        for media in _both(tmp_path, data):
            assert image_size(media) == (60, 80)


def _pixel(path: Path) -> tuple[int, ...]:
    image = open_image(path)
    assert image.mode == "RGB"
    return tuple(int(value) for value in np.asarray(image)[0, 0])


def test_every_mode_becomes_rgb_with_its_colours(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert _pixel(tmp_path / "palette.png") == (10, 20, 30)

    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert _pixel(tmp_path / "cmyk.tif") == (255, 0, 0)
    Image.new("CMYK", (16, 16), (255, 255, 0, 0)).save(tmp_path / "cmyk.jpg")
    assert all(abs(a - b) <= 3 for a, b in zip(_pixel(tmp_path / "cmyk.jpg"), (0, 0, 255), strict=True))

    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    assert _pixel(tmp_path / "rgba.png") == (255, 255, 255)
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert _pixel(tmp_path / "bits.png") == (255, 255, 255)
    Image.new("LA", (4, 4), (77, 9)).save(tmp_path / "grey.png")
    assert _pixel(tmp_path / "grey.png") == (249, 249, 249)
    Image.new("YCbCr", (16, 16), (76, 85, 255)).save(tmp_path / "ycc.jpg")
    assert all(abs(a - b) <= 3 for a, b in zip(_pixel(tmp_path / "ycc.jpg"), (254, 0, 0), strict=True))


def test_a_palette_with_alpha_is_read_without_a_warning(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(tmp_path / "a.png")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (147, 152, 157)]


def test_values_without_a_known_range_are_rejected(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tif")
    Image.new("I", (4, 4), 70_000).save(tmp_path / "int.tif")
    for name, values in (("float.tif", "floating-point"), ("int.tif", "signed 32-bit")):
        for read in (image_size, open_image):
            with pytest.raises(ValueError, match=rf"{name} has {values} values, .* `window: \[LOW, HIGH\]`"):
                read(tmp_path / name)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 32_768, 40_000, 65_535]], dtype=np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P5 6 1 65535\n" + levels.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.ppm", "big.tif"):
        if name == "big.tif":
            Image.frombytes("I;16B", (6, 1), levels.astype(">u2").tobytes()).save(tmp_path / name)
        elif name != "a.ppm":
            Image.fromarray(levels).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == (levels[0] >> 8).tolist()


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert _pixel(tmp_path / "a.gif") == (255, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_rejected(tmp_path: Path, width: int, height: int) -> None:
    for media in _both(tmp_path, _png(width, height)):
        for read in (image_size, open_image):
            with pytest.raises(ValueError, match=f"{width} x {height} pixels|cannot open image"):
                read(media)


def test_a_format_that_runs_a_program_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("ran a program"))
    NOISE.save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="expected one of AVIF, BMP, GIF, JPEG"):
        open_image(tmp_path / "a.eps")


FORMATS = {name: _oriented(name, 1) for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_hostile_bytes_are_rejected_or_agree_with_the_header(format: str, data: st.DataObject) -> None:
    content = bytearray(FORMATS[format])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content) // 2, 30, 300]))]
    media = EmbeddedMedia(Path("rows"), format, data=bytes(content))
    try:
        size = image_size(media)
    except ValueError:
        size = None
    try:
        image = open_image(media)
    except ValueError:
        return
    assert image.mode == "RGB" and image.size == size


def test_no_file_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    good = _both(tmp_path, _oriented("PNG", 6))
    (tmp_path / "bad").write_bytes(b"no image")
    (tmp_path / "bomb").write_bytes(_png(60_000, 60_000))
    (tmp_path / "cut").write_bytes(_oriented("JPEG", 1)[:900])
    bad = [tmp_path / "bad", tmp_path / "bomb", tmp_path / "cut", tmp_path / "none", tmp_path]
    bad += [
        EmbeddedMedia(tmp_path / "all", "past", 0, 10**9),
        EmbeddedMedia(tmp_path / "all", "behind", -1, 3),
        EmbeddedMedia(tmp_path, "x"),
    ]
    before = len(list(descriptors.iterdir()))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        for media in (*good, *bad):
            for read in (image_size, open_image):
                with contextlib.suppress(ValueError):
                    read(media)
        gc.collect()
    assert [str(warning.message) for warning in warned if warning.category is ResourceWarning] == []
    assert len(list(descriptors.iterdir())) == before


# --------------------------------------------------------------------------------------------------------------- embedded


def test_embedded_media_are_read_like_separate_files(tmp_path: Path) -> None:
    (tmp_path / "all").write_bytes(bytes(range(100)))
    slice_ = EmbeddedMedia(tmp_path / "all", "a", offset=10, length=20)
    assert str(slice_) == f"{tmp_path}/all!a" and "\\x" not in repr(EmbeddedMedia(tmp_path, "a", data=b"\xff"))
    with slice_.open() as file, io.BytesIO(bytes(range(10, 30))) as plain:
        for offset, whence, count in ((0, 0, 5), (3, 1, 4), (-6, 2, 4), (0, 2, 9), (50, 0, 1), (18, 0, 9), (0, 0, -1)):
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(count) == plain.read(count) and file.tell() == plain.tell()
        with pytest.raises((OSError, ValueError)):
            file.seek(-1)
    for offset, length, reason in (
        (90, 11, "expected a slice of the 100 bytes of the container, got bytes 90 to 101"),
        (-1, 5, "got bytes -1"),
        (5, -1, "bytes 5 to 4"),
    ):
        with pytest.raises(ValueError, match=reason):
            EmbeddedMedia(tmp_path / "all", "a", offset, length).open()


def test_media_inside_a_row_are_resolved(media: Path) -> None:
    rules = MediaRules(media)
    data = (media / "a.png").read_bytes()
    uri = "data:image/png;charset=x;base64," + base64.b64encode(data).decode()
    for value in (
        data,
        bytearray(data),
        {"bytes": data, "path": "../a.png"},
        {"bytes": data},
        uri,
        EmbeddedMedia(media, "a", data=data),
    ):
        medium = resolve_media(value, rules)
        assert isinstance(medium, EmbeddedMedia) and medium.data == data
        assert image_size(medium) == open_image(medium).size == (40, 24)
    for value in ({"bytes": None, "path": "a.png"}, {"path": "a.png"}, Path("a.png")):
        assert resolve_media(value, rules) == (media / "a.png").resolve()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "got NoneType"),
        (7, "got int"),
        (["a.png"], "got list"),
        ({}, "got an object with no keys"),
        ({"bytes": None, "path": None}, "got an object with bytes, path"),
        ({"path": "a.png", "url": "x"}, "got an object with path, url"),
        ({"bytes": "AAAA"}, "expected bytes in 'bytes', got str"),
        ({"path": "../outside.png"}, "is outside media_root .*allow_outside_root: true"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
        ("data:text/html;base64,AAAA", "expected an image in base64"),
        ("data:image/svg+xml,<svg/>", "expected an image in base64"),
        ("data:", "expected an image in base64"),
        ("data:image/png;base64," + "A" * 33_554_500, "at most 33554432 characters"),
    ],
)
def test_values_that_are_not_media_are_rejected(media: Path, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        resolve_media(value, MediaRules(media))
    assert len(str(caught.value)) < 400


def test_a_decompression_bomb_inside_a_row_is_rejected_like_one_on_disk(media: Path) -> None:
    for value in (_png(60_000, 60_000), {"bytes": _png(10_000, 8_948), "path": "a.png"}):
        for read in (image_size, open_image):
            with pytest.raises(ValueError, match=r"cannot open image|expected an image of"):
                read(resolve_media(value, MediaRules(media)))


def test_a_source_may_let_paths_lead_out(media: Path) -> None:
    rules = MediaRules(media, outside=True)
    (media / "link.png").symlink_to(media.parent / "outside.png")
    for name in ("../outside.png", "link.png", str(media.parent / "outside.png")):
        assert resolve_media(name, rules) == (media.parent / "outside.png").resolve()
    with pytest.raises(ValueError, match="no such file"):
        resolve_media("../none.png", rules)


# ----------------------------------------------------------------------------------------------------------- media_root


def test_a_name_is_resolved_below_the_root_only(media: Path) -> None:
    (media / "sub").mkdir()
    (media / "sub" / "inside.png").symlink_to(media / "a.png")
    (media / "link.png").symlink_to(media.parent / "outside.png")
    (media / "up").symlink_to(media.parent)
    (media / "loop.png").symlink_to(media / "loop.png")
    for name in ("a.png", "./a.png", "sub/../a.png", "sub/inside.png", str(media / "a.png")):
        assert resolve_media(name, MediaRules(media)) == (media / "a.png").resolve()
    for name in ("../outside.png", "link.png", "up/outside.png", str(media.parent / "outside.png"), "/etc/passwd"):
        with pytest.raises(ValueError, match="is outside media_root"):
            resolve_media(name, MediaRules(media))
    for name in ("none.png", "sub", "", "a.png/b"):
        with pytest.raises(ValueError, match="no such file"):
            resolve_media(name, MediaRules(media))
    for name, reason in (("loop.png", "invalid path 'loop.png'"), ("x" * 300, "invalid path 'xxx"), ("a\0.png", "null byte")):
        with pytest.raises(ValueError, match=reason):
            resolve_media(name, MediaRules(media))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://example.org/a.png", "HTTPS://example.org/" + "a" * 9000])
def test_a_url_is_reported_as_a_url(media: Path, url: str) -> None:
    with pytest.raises(ValueError, match="is a URL") as caught:
        resolve_media(url, MediaRules(media))
    assert len(str(caught.value)) < 200


def test_a_root_may_itself_be_a_link(media: Path, tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(media)
    assert resolve_media("a.png", MediaRules(tmp_path / "root")) == (media / "a.png").resolve()
