"""Conversion of every image mode to 8-bit RGB: transparency on white, grey values of more bits through a window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Window = tuple[float, float]
"""Grey values (low, high): values up to low map to 0, values from high to 255, and those between linearly."""

WHITE = (255, 255, 255)
ROWS_AT_ONCE = 256
"""Image rows that are converted at once: a float64 copy of a whole image can take hundreds of MB."""

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
UNSIGNED, WHITE_IS_ZERO = 1, 0
SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
"""Factor by which Pillow multiplies the values of a PNG of this raw mode. It does not scale the transparent value."""


def values_that_need_window(image: Image.Image) -> str | None:
    """The type of an image's values if their range is unknown without a window; None if the image needs no window.

    Args:
        image: opened, not decoded.
    """
    if image.mode.startswith("F"):
        return "floating-point"
    if image.format == "TIFF" and image.mode == "I":
        bits, signed = _tiff_tag(image, TIFF_BITS, 1), _tiff_tag(image, TIFF_SAMPLE_FORMAT, UNSIGNED) != UNSIGNED
        return f"{'signed ' if signed else ''}{bits}-bit"
    return None


def to_rgb(image: Image.Image, window: Window | None = None) -> Image.Image:
    """Decode an image to RGB with 8 bits per channel.

    Transparency is composited on white: alpha x colour + (1 - alpha) x 255, rounded to the nearest integer. Grey
    values of 16 bits (in TIFF also 12) keep their upper 8 bits, or are mapped by `window`. Images with 8 bits per channel
    ignore the window.

    Args:
        image: opened, not decoded.
        window: the grey values that map to black and white.
    """
    transparent = _transparent_value(image)
    image.load()
    if image.mode.startswith(("I", "F")):
        values = _grey_values(image)
        bits = _tiff_tag(image, TIFF_BITS, 16)
        grey = apply_window(values, window) if window else (values >> (bits - 8)).astype(np.uint8)
        if _tiff_tag(image, TIFF_PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            grey = 255 - grey
        if transparent is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode == "La":  # Pillow can convert it to this mode only
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return canvas


def apply_window(values: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Map grey values linearly from `window` to 0..255, clipped and rounded half up. NaN becomes 0.

    Args:
        values: shape (height, width), of any real dtype.
        window: low and high, finite; if they are equal, larger values become 255 and the others 0.

    Raises:
        ValueError: the window is not finite.
    """
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected a window of two finite numbers, got ({low}, {high})")
    levels = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), ROWS_AT_ONCE):
        rows = values[start : start + ROWS_AT_ONCE].astype(np.float64)
        if high > low:
            rows = np.clip(np.nan_to_num(rows, nan=low, posinf=math.inf, neginf=-math.inf), low, high)
            levels[start : start + ROWS_AT_ONCE] = np.floor((rows - low) / (high - low) * 255 + 0.5)
        else:
            levels[start : start + ROWS_AT_ONCE] = np.where(rows > high, 255, 0)
    return levels


def _grey_values(image: Image.Image) -> NDArray[Any]:
    values = np.asarray(image)
    if image.format == "TIFF" and image.mode == "I" and _tiff_tag(image, TIFF_SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:
        return values.view(np.uint32)  # Pillow has no mode for unsigned 32-bit values
    return values


def _tiff_tag(image: Image.Image, tag: int, otherwise: int) -> int:
    """The first value of a TIFF tag; `otherwise` if there is no such tag, or for another format."""
    value = image.tag_v2.get(tag, otherwise) if image.format == "TIFF" else otherwise  # type: ignore[attr-defined]
    return int(value[0] if isinstance(value, tuple) else value)


def _transparent_value(image: Image.Image) -> Any:
    """The transparent grey value or colour, scaled like the decoded pixels; None if there is none, or for a palette."""
    value = image.info.get("transparency")
    if value is None or image.mode == "P":
        return None
    tile = getattr(image, "tile", None)
    scale = SCALES.get(str(tile[0].args), 1) if tile else 1
    return tuple(int(part * scale) for part in value) if isinstance(value, tuple) else int(value * scale)
