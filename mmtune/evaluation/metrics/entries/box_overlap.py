"""Metrics of boxes and quadrilaterals in answers: intersection over union, and accuracy at an IoU of 0.5."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmtune.data.region_text import Corner, Corners, read_areas
from mmtune.evaluation.metrics.answer_text import to_ascii
from mmtune.evaluation.metrics.metric import Array, Item, Metric


class BoxOverlap(Metric):
    """Intersection over union of the boxes and quadrilaterals in an answer with those in the reference.

    Both are read from the text by `read_areas`, in the same coordinates. Stretching an axis does not change the result, so boxes
    in thousandths give the IoU in pixels up to rounding. Several boxes are matched one to one so that the sum of the IoUs is
    largest; boxes without a partner count 0. A quadrilateral counts as its convex hull.
    """

    def problem(self, item: Item) -> str | None:
        """Every reference must have a box."""
        wrong = [reference for reference in item.references if not _areas(reference)]
        return f"expected a reference with a box [x1, y1, x2, y2], got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """The best of the references, from 0 to 1; None if the answer has no box."""
        boxes = _areas(item.prediction)
        if not boxes:
            return None
        return max(self.of_matches(*_matched_overlaps(boxes, _areas(reference))) for reference in item.references)

    def answer_class(self, item: Item) -> str:
        """The numbers of the boxes."""
        return str(sorted(_areas(item.prediction)))

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


def _areas(text: str) -> list[Corners]:
    return read_areas(to_ascii(text))


def _matched_overlaps(first: Sequence[Corners], second: Sequence[Corners]) -> tuple[Array, int]:
    from scipy.optimize import linear_sum_assignment

    if all(len(area) == 2 for area in (*first, *second)):
        boxes = [np.array(areas, dtype=np.float64).reshape(-1, 4) for areas in (first, second)]
        overlaps = box_iou(boxes[0], boxes[1])
    else:
        overlaps = np.array([[polygon_iou(_outline(a), _outline(b)) for b in second] for a in first])
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


def polygon_iou(first: Sequence[Corner], second: Sequence[Corner]) -> float:
    """Intersection over union of two convex polygons, each with its corners in the order of `_outline`.

    The intersection is the first polygon clipped at every side of the second (Sutherland and Hodgman, 1974).
    """
    clipped = list(first)
    for start, end in zip(second, [*second[1:], second[0]], strict=True):
        sides = [_side(start, end, corner) for corner in clipped]
        polygon: list[Corner] = []
        for index, (corner, side) in enumerate(zip(clipped, sides, strict=True)):
            before, side_before = clipped[index - 1], sides[index - 1]
            if (side >= 0) != (side_before >= 0):
                share = side_before / (side_before - side)
                polygon.append((before[0] + share * (corner[0] - before[0]), before[1] + share * (corner[1] - before[1])))
            if side >= 0:
                polygon.append(corner)
        clipped = polygon
    intersection = _area(clipped)
    union = _area(first) + _area(second) - intersection
    return intersection / union if union > 0 else 0.0


def _outline(corners: Corners) -> list[Corner]:
    """The convex hull of a box or a quadrilateral, in the order in which `_side` of a corner inside is positive."""
    if len(corners) == 2:
        (x1, y1), (x2, y2) = corners
        return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    halves: list[list[Corner]] = []
    for points in (sorted(corners), sorted(corners, reverse=True)):  # Andrew's monotone chain
        half: list[Corner] = []
        for point in points:
            while len(half) >= 2 and _side(half[-2], half[-1], point) <= 0:
                half.pop()
            half.append(point)
        halves.append(half[:-1])
    return halves[0] + halves[1]


def _side(start: Corner, end: Corner, point: Corner) -> float:
    return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])


def _area(polygon: Sequence[Corner]) -> float:
    following = [*polygon[1:], *polygon[:1]]
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(polygon, following, strict=True))) / 2


IOU = BoxOverlap(
    "iou",
    "intersection over union of boxes",
    "RefCOCO (arXiv 1608.00272)",
    unparsed="has no four or eight numbers in brackets, nor only four numbers",
    has_baseline=False,
)
ACC_AT_IOU_HALF = AccuracyAtHalf(
    "acc_at_iou_0.5",
    "boxes with an IoU of at least 0.5",
    "RefCOCO (arXiv 1608.00272)",
    unparsed="has no four or eight numbers in brackets, nor only four numbers",
    has_baseline=False,
)
