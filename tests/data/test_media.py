"""Images are opened upright and in RGB, or refused by name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtune.data.media import MAX_PIXELS, MediaRules, image_size, open_image, resolve_media

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.gif", "cut.webp", "cut.bmp"])
def test_a_file_cut_short_is_refused_though_its_header_is_fine(tmp_path: Path, name: str) -> None:
    NOISE.save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert open_image(tmp_path / name).size == (80, 60)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    if name != "cut.webp":  # WebP's own header holds the file's length
        assert image_size(tmp_path / name) == (80, 60)
    with pytest.raises(ValueError, match=name):
        open_image(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"not an image that can be opened: .*a\.jpg"):
            read(tmp_path / "a.jpg")


def test_a_directory_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="not an image that can be opened"):
            open_image(path)


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (10_000, 8_948)])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(_png(width, height))

    def decoded(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for read in (image_size, open_image):
        with pytest.raises(ValueError, match=r"bomb\.png"):
            read(tmp_path / "bomb.png")


def test_the_bound_is_pillows_and_holds_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    (tmp_path / "fits.png").write_bytes(_png(10_000, 8_947))
    assert image_size(tmp_path / "fits.png") == (10_000, 8_947)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(_png(10_000, 8_948))
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS}"):
        image_size(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("orientation", "transpose"),
    [
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),  # the camera lay on its side: what is stored is the upright picture turned back
        (8, Image.Transpose.ROTATE_270),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
    ],
)
def test_an_image_is_upright(tmp_path: Path, orientation: int, transpose: Image.Transpose | None) -> None:
    stored = NOISE if transpose is None else NOISE.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(NOISE))
    assert image_size(tmp_path / "a.png") == NOISE.size


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
    assert _pixel(tmp_path / "rgba.png") == (10, 20, 30)
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert _pixel(tmp_path / "bits.png") == (255, 255, 255)
    Image.new("LA", (4, 4), (77, 9)).save(tmp_path / "grey.png")
    assert _pixel(tmp_path / "grey.png") == (77, 77, 77)


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 255, 256, 32_768, 40_000, 65_535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == (levels[0] >> 8).tolist()


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert _pixel(tmp_path / "a.gif") == (255, 0, 0)


# ----------------------------------------------------------------------------------------------------------- media_root


def test_a_name_is_found_below_the_root_alone(media: Path) -> None:
    (media / "sub").mkdir()
    (media / "sub" / "inside.png").symlink_to(media / "a.png")
    (media / "link.png").symlink_to(media.parent / "outside.png")
    (media / "up").symlink_to(media.parent)
    (media / "loop.png").symlink_to(media / "loop.png")
    for name in ("a.png", "./a.png", "sub/../a.png", "sub/inside.png", str(media / "a.png")):
        assert resolve_media(name, MediaRules(media)) == (media / "a.png").resolve()
    for name in ("../outside.png", "link.png", "up/outside.png", str(media.parent / "outside.png"), "/etc/passwd"):
        with pytest.raises(ValueError, match="lies outside media_root"):
            resolve_media(name, MediaRules(media))
    for name in ("none.png", "sub", "", "a.png/b"):
        with pytest.raises(ValueError, match="no such file"):
            resolve_media(name, MediaRules(media))
    for name, reason in (("loop.png", "cannot look up 'loop.png'"), ("x" * 300, "cannot look up 'xxx"), ("a\0.png", "null byte")):
        with pytest.raises(ValueError, match=reason):
            resolve_media(name, MediaRules(media))


@pytest.mark.parametrize("url", ["https://example.org/a.png", "http://example.org/a.png", "HTTPS://example.org/" + "a" * 9000])
def test_a_url_is_called_one(media: Path, url: str) -> None:
    with pytest.raises(ValueError, match="is a URL") as caught:
        resolve_media(url, MediaRules(media))
    assert len(str(caught.value)) < 200


def test_a_root_may_itself_be_a_link(media: Path, tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(media)
    assert resolve_media("a.png", MediaRules(tmp_path / "root")) == (media / "a.png").resolve()
