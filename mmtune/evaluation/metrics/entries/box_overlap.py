"""Metrics of bounding boxes in answers: intersection over union, and accuracy at an IoU of 0.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mmtune.evaluation.metrics.answer_text import to_ascii
from mmtune.evaluation.metrics.metric import Array, Item, Metric

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_BOX = re.compile(rf"[\[(<{{]\s*(?:<?\w+>\s*)?({_NUMBER}(?:\s*[,\s]\s*{_NUMBER}){{3}})\s*[\])>}}]")
_CORNERS = re.compile(rf"\(\s*({_NUMBER}\s*,\s*{_NUMBER})\s*\)\s*,?\s*\(\s*({_NUMBER}\s*,\s*{_NUMBER})\s*\)")
_LOCATIONS = re.compile(r"(?:<loc_?\d+>){4}")
_CELLS = re.compile(r"<patch_index_(\d+)>\s*<patch_index_(\d+)>")
_GRID = 32
"""Cells in a row of Kosmos-2's grid."""
_BARE = re.compile(rf"\s*{_NUMBER}(?:\s*[,\s]\s*{_NUMBER}){{3}}\s*")

_LARGEST = 1e9


class BoxOverlap(Metric):
    """Intersection over union of the boxes in an answer with those in the reference.

    Both are read from the text, in the same coordinates. Stretching an axis does not change the result, so boxes in
    thousandths give the IoU in pixels up to rounding. Several boxes are matched one to one so that the sum of the IoUs is
    largest; boxes without a partner count 0.
    """

    def problem(self, item: Item) -> str | None:
        """Every reference must have a box."""
        wrong = [reference for reference in item.references if not read_box_texts(reference)]
        return f"expected a reference with a box [x1, y1, x2, y2], got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """The best of the references, from 0 to 1; None if the answer has no box."""
        boxes = read_box_texts(item.prediction)
        if not boxes:
            return None
        return max(self.of_matches(*_matched_overlaps(boxes, read_box_texts(reference))) for reference in item.references)

    def answer_class(self, item: Item) -> str:
        """The numbers of the boxes."""
        return str(sorted(read_box_texts(item.prediction)))

    def of_matches(self, overlaps: Array, number: int) -> float:
        """The score from the IoUs of matched boxes.

        Args:
            overlaps: shape (matches,).
            number: boxes of the answer or the reference, whichever are more.
        """
        return float(overlaps.sum()) / number


class AccuracyAtHalf(BoxOverlap):
    """The share of boxes matched with an IoU of at least 0.5; of one box in RefCOCO, 1 or 0."""

    def of_matches(self, overlaps: Array, number: int) -> float:
        """Matches with an IoU of at least 0.5, over the boxes."""
        return float((overlaps >= 0.5).sum()) / number


def read_box_texts(text: str) -> list[tuple[float, float, float, float]]:
    """The boxes in a text, each two opposite corners.

    A box is four numbers in brackets, `(x1, y1), (x2, y2)`, four location tokens (`<loc0100>`, `<loc_100>`), two cells
    (`<patch_index_0044><patch_index_0863>`, in thirty-seconds of the image), or a text of four numbers.

    A box without area, which has x1 = x2 or y1 = y2, is a box; its IoU is 0. A text with a coordinate above 1e9 has no boxes.
    """
    text = _CELLS.sub(lambda cells: str([*_corners_of_cells(int(cells[1]), int(cells[2]))]), to_ascii(text))
    groups = [text] if _BARE.fullmatch(text) else _LOCATIONS.findall(text)
    groups = groups or _BOX.findall(_CORNERS.sub(r"[\1, \2]", text))
    boxes = []
    for group in groups:
        x1, y1, x2, y2 = corners = [float(number) for number in re.findall(_NUMBER, group)]
        if max(map(abs, corners)) > _LARGEST:
            return []
        boxes.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return boxes


def _corners_of_cells(first: int, last: int) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of the box from one cell to another: from center to center, or around the cells of one row or column.

    Source: transformers' `patch_index_to_coordinate` of Kosmos-2 (arXiv 2306.14824).
    """
    (y1, x1), (y2, x2) = divmod(first, _GRID), divmod(last, _GRID)
    if x1 == x2 or y1 == y2:
        return x1, y1, x2 + 1, y2 + 1
    return x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5


def _matched_overlaps(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[Array, int]:
    from scipy.optimize import linear_sum_assignment

    overlaps = box_iou(np.array(first, dtype=np.float64), np.array(second, dtype=np.float64))
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return overlaps[rows, columns], max(overlaps.shape)


def box_iou(first: Array, second: Array) -> Array:
    """Intersection over union of all pairs.

    Args:
        first, second: boxes x1, y1, x2, y2 of shapes (n, 4) and (m, 4).

    Returns:
        Shape (n, m); 0 for two boxes without area.
    """
    sides = np.minimum(first[:, None, 2:], second[None, :, 2:]) - np.maximum(first[:, None, :2], second[None, :, :2])
    intersection = sides.clip(min=0).prod(axis=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


IOU = BoxOverlap(
    "iou",
    "intersection over union of boxes",
    "RefCOCO (arXiv 1608.00272)",
    unparsed="has no four numbers in brackets, nor only four numbers",
    has_baseline=False,
)
ACC_AT_IOU_HALF = AccuracyAtHalf(
    "acc_at_iou_0.5",
    "boxes with an IoU of at least 0.5",
    "RefCOCO (arXiv 1608.00272)",
    unparsed="has no four numbers in brackets, nor only four numbers",
    has_baseline=False,
)
