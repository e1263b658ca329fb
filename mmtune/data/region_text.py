"""Regions in a text: boxes, quadrilaterals and points that a model or a row spells, as corners in the coordinates of the text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmtune.families.box_convention import KOSMOS2_CELLS

Corner = tuple[float, float]
Corners = tuple[Corner, ...]
"""(x, y) of a point, of the upper left and the lower right corner of a box, or of the four corners of a quadrilateral."""

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_SEPARATED = rf"(?:\s*[,\s]\s*{_NUMBER})"
_PAIR = rf"[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]"
_IN_BRACKETS = re.compile(rf"[\[(<{{]\s*(?:<?\w+>\s*)?({_NUMBER}{_SEPARATED}{{3}}(?:{_SEPARATED}{{4}})?)\s*[\])>}}]")
_BOX_OF_PAIRS = re.compile(rf"\(\s*({_NUMBER}\s*,\s*{_NUMBER})\s*\)\s*,?\s*\(\s*({_NUMBER}\s*,\s*{_NUMBER})\s*\)")
_QUAD_OF_PAIRS = re.compile(rf"{_PAIR}(?:\s*,?\s*{_PAIR}){{3}}")
_LOCATIONS = re.compile(r"(?:<loc_?\d+>){4,}")
_CELLS = re.compile(r"<patch_index_(\d+)>\s*<patch_index_(\d+)>")
_BARE = re.compile(rf"\s*{_NUMBER}{_SEPARATED}{{3}}\s*")
_POINT = re.compile(rf"[\[(]\s*({_NUMBER}\s*,\s*{_NUMBER})\s*[\])]|\bx\d*=[\"']?({_NUMBER})[\"']?\s+y\d*=[\"']?({_NUMBER})")

_LARGEST = 1e9


def read_areas(text: str) -> list[Corners]:
    """The boxes and quadrilaterals in a text.

    A box is four numbers in brackets, `(x1, y1), (x2, y2)`, four location tokens (`<loc0100>`, `<loc_100>`), two cells
    (`<patch_index_0044><patch_index_0863>`, in thirty-seconds of the image), or a text of four numbers. Its corners are ordered.
    A box without area, which has x1 = x2 or y1 = y2, is a box.

    A quadrilateral is eight numbers in brackets. It is also four pairs in brackets, or eight location tokens, of which the third
    corner is right of the fourth: so two boxes that follow each other never are. A text with a coordinate above 1e9 has none.
    """
    text = _CELLS.sub(lambda cells: str([*_corners_of_cells(int(cells[1]), int(cells[2]))]), text)
    if _BARE.fullmatch(text):
        groups = [_numbers(text)]
    elif runs := _LOCATIONS.findall(text):
        groups = [group for run in runs for group in _areas_of_locations(run)]
    else:
        text = _QUAD_OF_PAIRS.sub(lambda pairs: str(_numbers(pairs[0])) if _is_quad(_numbers(pairs[0])) else pairs[0], text)
        groups = [_numbers(group) for group in _IN_BRACKETS.findall(_BOX_OF_PAIRS.sub(r"[\1, \2]", text))]
    if any(abs(number) > _LARGEST for group in groups for number in group):
        return []
    return [_area(group) for group in groups]


def read_points(text: str) -> list[Corners]:
    """The points in a text: two numbers in brackets, or attributes `x="1" y="2"`. A text with a coordinate above 1e9 has none."""
    points = [_numbers(" ".join(groups)) for groups in _POINT.findall(text)]
    if any(abs(number) > _LARGEST for point in points for number in point):
        return []
    return [((x, y),) for x, y in points]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(_NUMBER, text)]


def _area(numbers: list[float]) -> Corners:
    if len(numbers) == 8:
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))
    x1, y1, x2, y2 = numbers
    return (min(x1, x2), min(y1, y2)), (max(x1, x2), max(y1, y2))


def _areas_of_locations(run: str) -> list[list[float]]:
    """The numbers of each region of a run of location tokens, x before y; those of four digits are y before x."""
    numbers = [float(number) for number in re.findall(r"\d+", run)]
    if "<loc_" not in run:
        numbers = [number for y, x in _batches(numbers, 2) for number in (x, y)]
    elif len(numbers) % 8 == 0 and all(map(_is_quad, quads := _batches(numbers, 8))):
        return quads
    return _batches(numbers, 4)


def _is_quad(numbers: Sequence[float]) -> bool:
    """Whether eight numbers are four corners and not two boxes: the third corner is right of the fourth."""
    return numbers[4] > numbers[6]


def _batches(numbers: Sequence[float], length: int) -> list[list[float]]:
    return [list(numbers[start : start + length]) for start in range(0, len(numbers) - length + 1, length)]


def _corners_of_cells(first: int, last: int) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the box from one cell to another: from center to center, or around the cells of one row or column.

    Source: transformers' `patch_index_to_coordinate` of Kosmos-2 (arXiv 2306.14824).
    """
    (y1, x1), (y2, x2) = divmod(first, KOSMOS2_CELLS), divmod(last, KOSMOS2_CELLS)
    if x1 == x2 or y1 == y2:
        return x1, y1, x2 + 1, y2 + 1
    return x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5
