"""Bounding boxes: read in pixels, checked against the image size, and written into text in a named convention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from mmtune.data.validation.issues import DataIssueError

SLACK = 0.01
"""Tolerance in pixels for a box outside the image border, because COCO rounds to two decimals. The box is clipped."""

BOX_FIELDS = ("bbox", "box", "bboxes", "boxes")
"""Common field names of boxes."""


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the upright image, whose size is `width` x `height` pixels."""

    x1: float
    y1: float
    x2: float
    y2: float
    width: int
    height: int


def read_boxes(value: Any, layout: Literal["xywh", "xyxy"], size: tuple[int, int], clip: bool = False) -> list[Box]:
    """Read a box or a list of boxes from a row.

    Args:
        value: four numbers, or a list of such lists.
        layout: `xywh` is the upper left corner, width and height; `xyxy` is the upper left and the lower right corner.
        size: (width, height) of the upright image in pixels.
        clip: clip boxes to the image.

    Raises:
        DataIssueError: not a box, an empty box, or a box outside the image (with `clip`: entirely outside).
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, (list, tuple)) for item in value):
        return [_read(item, layout, size, clip) for item in value]
    return [_read(value, layout, size, clip)]


def _read(value: Any, layout: str, size: tuple[int, int], clip: bool) -> Box:
    numbers = isinstance(value, (list, tuple)) and all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in value)
    if not numbers or len(value) != 4 or not all(-1e9 < n < 1e9 for n in value):
        raise DataIssueError("box_malformed", f"expected a box of four numbers, got {value!r}"[:200])
    x1, y1, x2, y2 = value
    if layout == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    width, height = size
    if x2 <= x1 or y2 <= y1:
        raise DataIssueError("box_malformed", f"expected a box with a positive width and height, got {list(value)} ({layout})")
    outside = min(x1, y1) < -SLACK or x2 > width + SLACK or y2 > height + SLACK
    entirely = x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0
    if outside and (entirely or not clip):
        extent = "entirely" if entirely else "partly"
        detail = f"the box {list(value)} ({layout}) is {extent} outside the image of {width} x {height} pixels"
        raise DataIssueError("box_outside", detail)
    return Box(max(x1, 0), max(y1, 0), min(x2, width), min(y2, height), width, height)


@dataclass(frozen=True)
class NativeBox:
    """A box that is written in the convention of the model's family, once its processor is known.

    Attributes:
        box: the box.
        label: written with the box, in the form of the family; None: the box alone.
    """

    box: Box
    label: str | None = None


def thousandths(box: Box) -> str:
    """`[x1, y1, x2, y2]` in thousandths of the image's width and height, as integers from 0 to 1000, rounded half up."""
    return _format_list(str(_round_half_up(1000 * share)) for share in corner_shares(box))


def fractions(box: Box, digits: int = 3) -> str:
    """`[x1, y1, x2, y2]` as fractions of the image's width and height, from 0 to 1, with `digits` decimals."""
    return _format_list(f"{share:.{digits}f}" for share in corner_shares(box))


def pixels(box: Box) -> str:
    """`[x1, y1, x2, y2]` in whole pixels of the upright (and augmented) image, rounded half up."""
    corners = (require_box(box).x1, box.y1, box.x2, box.y2)
    return _format_list(str(_round_half_up(corner)) for corner in corners)


def require_box(box: Any) -> Box:
    """The box itself. Raises TypeError for any other value."""
    if not isinstance(box, Box):
        raise TypeError(f"expected a box declared in the template's 'boxes', got {type(box).__name__}")
    return box


def corner_shares(box: Any) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 as fractions of the image's width and height. Raises TypeError for anything but a box."""
    require_box(box)
    return box.x1 / box.width, box.y1 / box.height, box.x2 / box.width, box.y2 / box.height


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _format_list(parts: Any) -> str:
    return f"[{', '.join(parts)}]"
