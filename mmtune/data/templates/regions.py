"""Regions of an image: points, boxes and quadrilaterals, read from rows in their convention, and written into text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmtune.data.validation.issues import DataIssueError
from mmtune.families.box_convention import RegionKind

SLACK = 0.01
"""Tolerance in pixels for a region outside the image border, because COCO rounds to two decimals. The region is clipped."""

BOX_FIELDS = ("bbox", "box", "bboxes", "boxes")
"""Common field names of boxes."""

Unit = Literal["pixels", "fractions", "percent", "thousandths"]
UNITS: Mapping[Unit, int | None] = {"fractions": 1, "percent": 100, "pixels": None, "thousandths": 1000}
"""By unit, the number at the image's right and lower edge; None: its width and height."""

LAYOUTS: Mapping[RegionKind, tuple[str, ...]] = {
    "box": ("xyxy", "xywh", "cxcywh", "yxyx"),
    "point": ("xy", "yx"),
    "quad": ("xyxyxyxy", "yxyxyxyx"),
}
"""The orders of the numbers of each kind of region; a layout has as many letters of x, y, w and h as numbers."""
_NUMBERS: Mapping[RegionKind, int] = {"point": 2, "box": 4, "quad": 8}
_WORDS: Mapping[RegionKind, str] = {"point": "a point of two", "box": "a box of four", "quad": "a quadrilateral of eight"}
_COUNTS: Mapping[int, RegionKind] = {1: "point", 2: "box", 4: "quad"}

Corner = tuple[float, float]


@dataclass(frozen=True)
class Region:
    """A point, a box or a quadrilateral.

    Attributes:
        corners: (x, y) in pixels of the upright image: the point; the upper left and the lower right corner of the box; or the
            four corners of the quadrilateral, in the order of the row.
        width, height: of the image.
    """

    corners: tuple[Corner, ...]
    width: int
    height: int

    @property
    def kind(self) -> RegionKind:
        """What the region is, by the number of its corners."""
        return _COUNTS[len(self.corners)]

    @property
    def x1(self) -> float:
        """The smallest x."""
        return min(x for x, _ in self.corners)

    @property
    def y1(self) -> float:
        """The smallest y."""
        return min(y for _, y in self.corners)

    @property
    def x2(self) -> float:
        """The largest x."""
        return max(x for x, _ in self.corners)

    @property
    def y2(self) -> float:
        """The largest y."""
        return max(y for _, y in self.corners)

    @property
    def corner_shares(self) -> tuple[Corner, ...]:
        """The corners as fractions of the image's width and height."""
        return tuple((x / self.width, y / self.height) for x, y in self.corners)

    @property
    def shares(self) -> tuple[float, ...]:
        """The numbers of `corner_shares`: x1, y1, x2, y2, ..."""
        return tuple(share for corner in self.corner_shares for share in corner)


@dataclass(frozen=True)
class NativeRegion:
    """A region that is written in the convention of the model's family, once its processor is known.

    Attributes:
        region: the region.
        label: written with the region, in the form of the family; None: the region alone.
    """

    region: Region
    label: str | None = None


@dataclass(frozen=True)
class RowConvention:
    """The convention in which rows have their regions.

    Attributes:
        kind: what the regions are.
        layout: one of the kind's `LAYOUTS`.
        unit: what the numbers are of the image's width and height, or its pixels.
    """

    kind: RegionKind
    layout: str
    unit: Unit = "pixels"

    def __str__(self) -> str:
        return f"unit: {self.unit}, layout: {self.layout}"


def read_regions(
    value: Any, convention: RowConvention, size: tuple[int, int], clip: bool = False, resized: tuple[float, float] | None = None
) -> list[Region]:
    """Read a region or a list of regions from a row.

    Args:
        value: the numbers of a region, flat or as pairs, or a list of such lists, which can be empty.
        convention: of the numbers.
        size: (width, height) of the upright image in pixels.
        clip: clip boxes and quadrilaterals to the image.
        resized: the size of the image that pixels are of; None: `size`.

    Raises:
        DataIssueError: not a region, an empty one, one outside the image (with `clip`: entirely outside), or numbers that
            the unit cannot have.
    """
    if isinstance(value, (list, tuple)) and not value:
        return []
    items = [value] if _flat(value, convention.kind) is not None or not _is_list_of_lists(value) else value
    return [_read(item, convention, size, clip, resized) for item in items]


def conventions_that_fit(value: Any, kind: RegionKind, size: tuple[int, int]) -> frozenset[RowConvention]:
    """The conventions in which all numbers of a row's regions are possible; arguments as `read_regions`."""
    fitting = set()
    for unit in UNITS:
        for layout in LAYOUTS[kind]:
            convention = RowConvention(kind, layout, unit)
            try:
                read_regions(value, convention, size)
            except DataIssueError:
                continue
            fitting.add(convention)
    return frozenset(fitting)


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, (list, tuple)) for item in value)


def _flat(value: Any, kind: RegionKind) -> list[float] | None:
    """The numbers of one region, whose corners may be pairs; None for any other value."""
    if _is_list_of_lists(value) and kind != "point" and all(len(pair) == 2 for pair in value):
        value = [number for pair in value for number in pair]
    if not isinstance(value, (list, tuple)) or len(value) != _NUMBERS[kind]:
        return None
    numbers = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value)
    return list(value) if numbers and all(-1e9 < number < 1e9 for number in value) else None


def _read(
    value: Any, convention: RowConvention, size: tuple[int, int], clip: bool, resized: tuple[float, float] | None
) -> Region:
    kind, layout, unit = convention.kind, convention.layout, convention.unit
    numbers = _flat(value, kind)
    if numbers is None:
        raise DataIssueError("box_malformed", f"expected {_WORDS[kind]} finite numbers, got {value!r}"[:200])
    shown = f"the {kind} {numbers} ({unit}, {layout})"
    scale = UNITS[unit]
    if scale != 1 and all(0 <= number <= 1 for number in numbers) and any(number % 1 for number in numbers):
        raise DataIssueError("box_unit", f"{shown} has no number above 1: expected {unit}, got what looks like fractions")
    extent = (resized or size) if scale is None else (scale, scale)
    corners = [(_scaled(x, size[0], extent[0]), _scaled(y, size[1], extent[1])) for x, y in _corners_in_layout(numbers, layout)]
    region = Region(tuple(corners), *size)
    if kind == "box" and not (corners[0][0] < corners[1][0] and corners[0][1] < corners[1][1]):
        raise DataIssueError("box_malformed", f"expected a box with a positive width and height, got {numbers} ({layout})")
    if kind == "quad" and _is_degenerate(corners):
        detail = "expected a quadrilateral with an area, whose corners follow each other around it"
        raise DataIssueError("box_malformed", f"{detail}, got {numbers} ({layout})")
    width, height = size
    outside = min(region.x1, region.y1) < -SLACK or region.x2 > width + SLACK or region.y2 > height + SLACK
    entirely = kind == "point" or region.x1 >= width or region.y1 >= height or region.x2 <= 0 or region.y2 <= 0
    if outside and (entirely or not clip):
        if scale is None:
            pixels_of = f", in pixels of {extent[0]:g} x {extent[1]:g}" if resized else ""
            image = f"the image of {width} x {height} pixels{pixels_of}"
        else:
            image = f"the image, whose {unit} are 0 to {scale}"
        raise DataIssueError("box_outside", f"{shown} is {'' if entirely else 'partly '}outside {image}")
    return Region(tuple((min(max(x, 0), width), min(max(y, 0), height)) for x, y in corners), *size)


def _scaled(number: float, side: int, extent: float) -> float:
    return number if side == extent else number * side / extent


def _corners_in_layout(numbers: Sequence[float], layout: str) -> list[Corner]:
    """The corners in the order (x, y)."""
    if layout in ("xywh", "cxcywh"):
        x, y, width, height = numbers
        if layout == "cxcywh":
            x, y = x - width / 2, y - height / 2
        return [(x, y), (x + width, y + height)]
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [(x, y) for y, x in pairs] if layout.startswith("y") else pairs


def _is_degenerate(corners: Sequence[Corner]) -> bool:
    """Whether a quadrilateral has no area or crosses itself."""
    turns = [_turn(corners[index], corners[(index + 1) % 4], corners[(index + 2) % 4]) for index in range(4)]
    left, right = sum(turn > 0 for turn in turns), sum(turn < 0 for turn in turns)
    # A quadrilateral turns in one direction at all corners, or at three if it is concave; one that crosses itself at two.
    return (left >= 2 and right >= 2) or left + right < 2 or (left < 2 and right < 2)


def _turn(first: Corner, second: Corner, third: Corner) -> float:
    """Positive if the path from `first` over `second` to `third` turns to one side, negative if to the other."""
    return (second[0] - first[0]) * (third[1] - second[1]) - (second[1] - first[1]) * (third[0] - second[0])


def thousandths(region: Region) -> str:
    """`[x1, y1, x2, y2]` in thousandths of the image's width and height, as integers from 0 to 1000, rounded half up."""
    return _format_list(str(_round_half_up(1000 * share)) for share in require_region(region).shares)


def fractions(region: Region, digits: int = 3) -> str:
    """`[x1, y1, x2, y2]` as fractions of the image's width and height, from 0 to 1, with `digits` decimals."""
    return _format_list(f"{share:.{digits}f}" for share in require_region(region).shares)


def pixels(region: Region) -> str:
    """`[x1, y1, x2, y2]` in whole pixels of the upright (and augmented) image, rounded half up."""
    return _format_list(str(_round_half_up(number)) for corner in require_region(region).corners for number in corner)


def require_region(value: Any) -> Region:
    """The region itself. Raises TypeError for any other value."""
    if not isinstance(value, Region):
        expected = "a region declared in the template's 'boxes', 'points' or 'quads'"
        raise TypeError(f"expected {expected}, got {type(value).__name__}")
    return value


def _round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _format_list(parts: Any) -> str:
    return f"[{', '.join(parts)}]"
