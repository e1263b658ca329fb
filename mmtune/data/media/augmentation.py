"""Augmentation of one image: crop, resize, horizontal flip, brightness, contrast and saturation, in this order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from mmtune.data.templates.boxes import Box

Size = tuple[int, int]
"""(width, height) in pixels, upright."""


@dataclass(frozen=True)
class ImageAugmentation:
    """What was drawn for one image. The defaults change nothing.

    Attributes:
        crop: the share of each side that is kept, above 0 and up to 1; the cut is resized to the size before it.
        place: where the cut lies, from left and from top, each from 0 up to 1 of the free space.
        keep: (x1, y1, x2, y2) in pixels, a region that the cut holds whole; None for none.
        longest: the longer side is brought down to so many pixels; None leaves it.
        flipped: left and right change places.
        brightness, contrast, saturation: factors of Pillow's `ImageEnhance`, from black, the mean grey and the image's grey.
    """

    crop: float = 1.0
    place: tuple[float, float] = (0.0, 0.0)
    keep: tuple[float, float, float, float] | None = None
    longest: int | None = None
    flipped: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def size(self, size: Size) -> Size:
        """The size of a changed image of that size; nothing that is drawn has a part in it."""
        scale = 1.0 if self.longest is None else self.longest / max(size)
        return size if scale >= 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    def cut(self, size: Size) -> tuple[int, int, int, int]:
        """The part of an image of that size that is kept: (left, top, right, bottom) in whole pixels."""
        x1, y1, x2, y2 = self.keep or (None,) * 4
        left, right = self._span(size[0], self.place[0], x1, x2)
        top, bottom = self._span(size[1], self.place[1], y1, y2)
        return left, top, right, bottom

    def _span(self, side: int, place: float, first: float | None, last: float | None) -> tuple[int, int]:
        length = max(1, round(side * self.crop))
        least, most = 0, side - length
        if first is not None and last is not None:
            length = max(length, math.ceil(last) - math.floor(first))
            least, most = max(0, math.ceil(last) - length), min(side - length, math.floor(first))
        start = least + int(place * (most - least + 1))
        return start, start + length

    def apply(self, image: Image.Image) -> Image.Image:
        """The changed image.

        Args:
            image: upright, in RGB.
        """
        cut, size = self.cut(image.size), self.size(image.size)
        image = image.crop(cut) if cut != (0, 0, *image.size) else image
        image = image.resize(size, Image.Resampling.LANCZOS) if image.size != size else image
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image
        for enhance, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            image = enhance(image).enhance(factor) if factor != 1 else image
        return image

    def box(self, box: Box) -> Box:
        """A box of the image as it lies in the changed image. The cut has to hold it whole: see `keep`."""
        left, top, right, bottom = self.cut((box.width, box.height))
        width, height = self.size((box.width, box.height))
        x1, x2 = ((x - left) * width / (right - left) for x in (box.x1, box.x2))
        y1, y2 = ((y - top) * height / (bottom - top) for y in (box.y1, box.y2))
        if self.flipped:
            x1, x2 = width - x2, width - x1
        return Box(max(x1, 0), max(y1, 0), min(x2, width), min(y2, height), width, height)
