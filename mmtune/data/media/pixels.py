"""Pixels of every mode as 8-bit RGB: transparency on white, wide grey values through a window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Window = tuple[float, float]
"""Grey values (low, high): low and less become 0, high and more become 255, in between is linear."""

WHITE = (255, 255, 255)
ROWS_AT_ONCE = 256
"""Rows of an image that are converted together: a float64 copy of a whole image may be hundreds of MB."""

TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
UNSIGNED, WHITE_IS_ZERO = 1, 0
SCALES = {"L;2": 85.0, "L;4": 17.0, "RGB;16B": 1 / 256}
"""By a PNG's raw mode, by what Pillow multiplies its values when it decodes them. The transparent value it leaves as it is."""


def values_that_need_window(image: Image.Image) -> str | None:
    """What values an image has whose range only a window can tell; None for one that needs no window.

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
    """The decoded image in RGB, 8 bits a channel.

    Transparency is composited on white: alpha x colour + (1 - alpha) x 255, rounded to the nearest integer. Grey
    values of 16 bits (TIFF: and 12) keep their upper 8, or go through `window`. Images of 8 bits a channel take no window.

    Args:
        image: opened, not decoded.
        window: the grey values that become black and white.
    """
    transparent = _transparent_value(image)
    image.load()
    if image.mode.startswith(("I", "F")):
        values = _grey_values(image)
        bits = _tiff_tag(image, TIFF_BITS, 16)
        grey = windowed(values, window) if window else (values >> (bits - 8)).astype(np.uint8)
        if _tiff_tag(image, TIFF_PHOTOMETRIC, 1) == WHITE_IS_ZERO:
            grey = 255 - grey
        if transparent is not None:
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return canvas


def windowed(values: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Grey values mapped linearly from `window` to 0..255, clipped, rounded to the nearest integer, halves upwards.

    What is not a number becomes 0.

    Args:
        values: shape (height, width), of any real dtype.
        window: low and high, finite; where they are equal, what is above becomes 255 and the rest 0.

    Raises:
        ValueError: a window that is not finite.
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
        return values.view(np.uint32)  # Pillow has no mode for it
    return values


def _tiff_tag(image: Image.Image, tag: int, otherwise: int) -> int:
    """The first value of a TIFF tag; `otherwise` for one that is not there, and in every other format."""
    value = image.tag_v2.get(tag, otherwise) if image.format == "TIFF" else otherwise  # type: ignore[attr-defined]
    return int(value[0] if isinstance(value, tuple) else value)


def _transparent_value(image: Image.Image) -> Any:
    """A grey value or colour that is transparent, as the decoded pixels have it; None where there is none or a palette's."""
    value = image.info.get("transparency")
    if value is None or image.mode == "P":
        return None
    tile = getattr(image, "tile", None)
    scale = SCALES.get(str(tile[0].args), 1) if tile else 1
    return tuple(int(part * scale) for part in value) if isinstance(value, tuple) else int(value * scale)
