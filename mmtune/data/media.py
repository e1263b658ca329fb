"""Images on disk: where they may lie, and how they are opened, the same everywhere."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Largest image that is opened: where Pillow warns of a decompression bomb."""
ELSEWHERE = ("http://", "https://", "data:")


def resolve_media(name: str, root: Path) -> Path:
    """The file that a row names, confined to its media root.

    Args:
        name: path as the row gives it, relative to `root` or absolute.
        root: the source's media root.

    Raises:
        ValueError: when the file is missing or lies outside the root, symbolic links followed, or is no file but a URL.
    """
    if name.startswith(ELSEWHERE):
        raise ValueError(f"'{name[:60]}' is a URL; images are read from files under media_root")
    root = root.resolve()
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long; links that go round in a circle
        raise ValueError(f"cannot look up '{name[:200]}': {error}"[:400]) from error
    if not path.is_relative_to(root):
        raise ValueError(f"'{name}' lies outside media_root {root}")
    if not is_file:
        raise ValueError(f"no such file: {path}")
    return path


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from the file's header alone, before any EXIF rotation.

    Raises:
        ValueError: for a file that is no image, or too large an image.
    """
    with _opened(path) as image:
        return image.size


def open_image(path: Path) -> Image.Image:
    """The whole image, upright by its EXIF tag and in RGB; transparency is dropped, 16 bits of grey become 8.

    Raises:
        ValueError: for a file that is no image, is cut short, or is too large.
    """
    with _opened(path) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
            raise ValueError(f"cannot decode {path}: {error}") from error
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            upright = upright.point(lambda level: level / 256).convert("L")  # Pillow's own conversion clips at 255
        return upright.convert("RGB")


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"not an image that can be opened: {path}: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{path} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    return image
