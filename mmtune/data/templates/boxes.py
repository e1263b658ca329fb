"""Boxes in an image: declared in pixels, checked against the image, and written into text by a named convention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mmtune.data.validation.issues import DataIssueError

SLACK = 0.01
"""How far, in pixels, a box may pass the border: COCO writes its boxes with two decimals. It is cut off at the border."""

BOX_FIELDS = ("bbox", "box", "bboxes", "boxes")
"""Names under which rows hold boxes."""


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the upright image, which is `width` by `height` pixels."""

    x1: float
    y1: float
    x2: float
    y2: float
    width: int
    height: int


def read_boxes(value: Any, layout: Literal["xywh", "xyxy"], size: tuple[int, int], clip: bool = False) -> list[Box]:
    """One box or a list of them, as a row holds them.

    Args:
        value: four numbers, or a list of such lists.
        layout: `xywh` is the upper left corner, width and height; `xyxy` is the upper left and the lower right corner.
        size: (width, height) of the upright image in pixels.
        clip: cut off what reaches out of the image.

    Raises:
        ValueError: for what is no box, is empty or wholly outside, or reaches out of the image and is not to be clipped.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (list, tuple)) for item in value):
        return [_read(item, layout, size, clip) for item in value]
    return [_read(value, layout, size, clip)]


def _read(value: Any, layout: str, size: tuple[int, int], clip: bool) -> Box:
    numbers = isinstance(value, (list, tuple)) and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)
    if not numbers or len(value) != 4 or not all(-1e9 < n < 1e9 for n in value):
        raise DataIssueError("box_malformed", f"expected a box of four numbers, found {value!r}"[:200])
    x1, y1, x2, y2 = value
    if layout == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    width, height = size
    if x2 <= x1 or y2 <= y1:
        raise DataIssueError("box_malformed", f"the box {list(value)} ({layout}) is empty")
    outside = min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK
    wholly = x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0
    if outside and (wholly or not clip):
        where = "lies outside" if wholly else "reaches out"
        raise DataIssueError("box_outside", f"the box {list(value)} ({layout}) {where} of the image of {width} x {height} pixels")
    return Box(max(x1, 0), max(y1, 0), min(x2, width), min(y2, height), width, height)


def thousandths(box: Box) -> str:
    """`[x1, y1, x2, y2]` in thousandths of the image's width and height, as integers from 0 to 1000, halves upwards."""
    return _listed(str(_nearest(1000 * share)) for share in _shares(box))


def fractions(box: Box, digits: int = 3) -> str:
    """`[x1, y1, x2, y2]` as fractions of the image's width and height, from 0 to 1, with so many digits."""
    return _listed(f"{share:.{digits}f}" for share in _shares(box))


def pixels(box: Box) -> str:
    """`[x1, y1, x2, y2]` in whole pixels of the upright image, as augmented if it is, halves upwards."""
    corners = (_checked(box).x1, box.y1, box.x2, box.y2)
    return _listed(str(_nearest(corner)) for corner in corners)


def _checked(box: Any) -> Box:
    if not isinstance(box, Box):
        raise TypeError(f"expected a box that the template's 'boxes' declares, found {type(box).__name__}")
    return box


def _shares(box: Any) -> tuple[float, ...]:
    _checked(box)
    return box.x1 / box.width, box.y1 / box.height, box.x2 / box.width, box.y2 / box.height


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _listed(parts: Any) -> str:
    return f"[{', '.join(parts)}]"
