"""Image augmentation: crop, resize, horizontal flip, brightness, contrast and saturation, in this order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from mmtune.data.templates.regions import Region

Size = tuple[int, int]
"""(width, height) in pixels, upright."""


@dataclass(frozen=True)
class ImageAugmentation:
    """The augmentation drawn for one image. The defaults change nothing.

    Attributes:
        crop: length of each crop side relative to the image side, in (0, 1]; the crop is resized to the original size.
        position: position of the crop from the left and from the top, each in [0, 1) of the free space.
        region: (x1, y1, x2, y2) in pixels that the crop must contain; None for no region.
        longest_edge: maximum length of the longer side in pixels; None for no resizing.
        flip: whether to flip horizontally.
        brightness, contrast, saturation: factors of Pillow's `ImageEnhance`.
    """

    crop: float = 1.0
    position: tuple[float, float] = (0.0, 0.0)
    region: tuple[float, float, float, float] | None = None
    longest_edge: int | None = None
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def size(self, size: Size) -> Size:
        """The size after augmentation of an image of this size. It does not depend on the random draws."""
        scale = 1.0 if self.longest_edge is None else self.longest_edge / max(size)
        return size if scale >= 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    def crop_box(self, size: Size) -> tuple[int, int, int, int]:
        """The crop of an image of this size: (left, top, right, bottom) in whole pixels."""
        x1, y1, x2, y2 = self.region or (None,) * 4
        left, right = self._crop_range(size[0], self.position[0], x1, x2)
        top, bottom = self._crop_range(size[1], self.position[1], y1, y2)
        return left, top, right, bottom

    def _crop_range(self, side: int, position: float, first: float | None, last: float | None) -> tuple[int, int]:
        length = max(1, round(side * self.crop))
        smallest, largest = 0, side - length
        if first is not None and last is not None:
            length = max(length, math.ceil(last) - math.floor(first))
            smallest, largest = max(0, math.ceil(last) - length), min(side - length, math.floor(first))
        start = smallest + int(position * (largest - smallest + 1))
        return start, start + length

    def apply(self, image: Image.Image) -> Image.Image:
        """The augmented image.

        Args:
            image: upright, in RGB.
        """
        crop_box, size = self.crop_box(image.size), self.size(image.size)
        image = image.crop(crop_box) if crop_box != (0, 0, *image.size) else image
        image = image.resize(size, Image.Resampling.LANCZOS) if image.size != size else image
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image
        for enhance, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            image = enhance(image).enhance(factor) if factor != 1 else image
        return image

    def transform_region(self, region: Region) -> Region:
        """The region in the augmented image. `self.region` must contain it, so that the crop does too.

        A flip turns the order of a box's corners and that of a quadrilateral's, so that the first one stays the left one.
        """
        left, top, right, bottom = self.crop_box((region.width, region.height))
        width, height = self.size((region.width, region.height))
        corners = [
            (min(max((x - left) * width / (right - left), 0), width), min(max((y - top) * height / (bottom - top), 0), height))
            for x, y in region.corners
        ]
        if self.flip:
            mirrored = [(width - x, y) for x, y in corners]
            if region.kind == "box":
                (x2, y1), (x1, y2) = mirrored
                mirrored = [(x1, y1), (x2, y2)]
            elif region.kind == "quad":
                mirrored = [mirrored[index] for index in (1, 0, 3, 2)]
            corners = mirrored
        return Region(tuple(corners), width, height)
