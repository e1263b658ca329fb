"""Regions drawn on an image: points, boxes and quadrilaterals as outlines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw

LINE_WIDTH = 2  # in pixels
POINT_RADIUS = 5  # in pixels
OUTSIDE = 2.0
"""A corner further outside the image than this many of its sides is drawn there: a model can write any number."""


def draw_regions(image: Image.Image, regions: Iterable[Sequence[tuple[float, float]]], color: str) -> None:
    """Draw the outlines of regions on an image, in place.

    Args:
        image: in RGB.
        regions: the corners of each region as fractions of the image's width and height: one of a point, two of a box, four of a
            quadrilateral.
        color: a color of Pillow.
    """
    draw = ImageDraw.Draw(image)
    width = LINE_WIDTH if min(image.size) >= 64 else 1
    for region in regions:
        corners = [
            tuple(min(max(share, -OUTSIDE), 1 + OUTSIDE) * side for share, side in zip(corner, image.size, strict=True))
            for corner in region
        ]
        if len(corners) == 1:
            [(x, y)] = corners
            box = (x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS)
            draw.ellipse(box, outline=color, width=width)
            continue
        if len(corners) == 2:
            (x1, y1), (x2, y2) = corners
            corners = [(x1, y1), (x2 - 1, y1), (x2 - 1, y2 - 1), (x1, y2 - 1)]  # the last pixels that belong to the box
        draw.line([*corners, corners[0], corners[1]], fill=color, width=width)
