"""Copies of a conversation's images for the browser: small, upright, RGB, with the regions of an answer drawn on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from PIL import Image

from mmtune.chat.session import ChatSession
from mmtune.data.media.drawing import draw_regions
from mmtune.data.media.media import ImageView, Media, image_size, open_image
from mmtune.data.region_text import Corners, read_areas, read_points
from mmtune.families.box_convention import KIND_NAMES, RegionKind

MAX_EDGE = 768
"""Longer edge of a copy in pixels."""

SMALL_EDGE = 128
"""A smaller image is enlarged by a whole factor, up to this longer edge in pixels."""

REGION_COLOR = "#e5484d"
THOUSANDTHS = (1000, 1000)


class ShownImages:
    """The copies of the images of one conversation.

    Args:
        session: whose answers are read.
        folder: where the copies are written.
    """

    def __init__(self, session: ChatSession, folder: Path) -> None:
        self._session = session
        self._folder = folder
        self._copies: dict[tuple[int, str], tuple[ImageView, Path | None, str]] = {}

    def original(self, view: ImageView) -> tuple[Path | None, str]:
        """The path of an image's copy, and its description."""
        return self._copy(view, "")

    def with_regions(self, view: ImageView, answer: str) -> tuple[Path | None, str]:
        """The path of a copy with the regions of an answer drawn on it, and its description; None if the answer has none."""
        return self._copy(view, answer)

    def clear(self) -> None:
        """Delete all copies."""
        for _, path, _ in self._copies.values():
            if path is not None:
                path.unlink(missing_ok=True)
        self._copies.clear()

    def _copy(self, view: ImageView, answer: str) -> tuple[Path | None, str]:
        key = (id(view), answer)  # the image stays in `_copies`, so its id is not used again
        if key not in self._copies:
            self._copies[key] = (view, *self._write(view, answer))
        _, path, description = self._copies[key]
        return path, description

    def _write(self, view: ImageView, answer: str) -> tuple[Path | None, str]:
        size = image_size(view)
        description = f"{file_name(view)}, {size[0]} x {size[1]} pixels"
        shares: list[Corners] = []
        if answer:
            shares, drawn = _regions_in(answer, size, self._session)
            if not shares:
                return None, ""
            description = f"{drawn} drawn on {description}"
        image = open_image(view)
        image.thumbnail((MAX_EDGE, MAX_EDGE))
        if (times := SMALL_EDGE // max(image.size)) > 1:  # a browser would blur it
            image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
        draw_regions(image, shares, REGION_COLOR)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{uuid4().hex}.png"
        image.save(path)
        return path, description


def file_name(media: Media) -> str:
    """The name of an image's file, without its folder."""
    image = media.image if isinstance(media, ImageView) else media
    return image.name if isinstance(image, Path) else Path(image.name).name


def _regions_in(answer: str, size: tuple[int, int], session: ChatSession) -> tuple[list[Corners], str]:
    """The regions in an answer as fractions of the image's width and height, and what they are."""
    regions = read_areas(answer) or read_points(answer)
    if not regions:
        return [], ""
    kind = _kind(regions[0])
    extent, unit = session.text_extent(kind, size), "in the coordinates of the model's family"
    if extent is None:
        extent, unit = _likely_extent(regions, size)
    shares = [tuple((x / extent[0], y / extent[1]) for x, y in corners) for corners in regions]
    noun = kind if len(regions) == 1 else KIND_NAMES[kind]
    return shares, f"{len(regions)} {noun} ({unit})"


def _kind(corners: Corners) -> RegionKind:
    kinds: dict[int, RegionKind] = {1: "point", 2: "box", 4: "quad"}
    return kinds[len(corners)]


def _likely_extent(regions: Sequence[Corners], size: tuple[int, int]) -> tuple[tuple[int, int], str]:
    """The coordinates of the lower right corner of regions of an unknown convention, and its name."""
    largest = max(number for corners in regions for corner in corners for number in corner)
    if largest <= 1:
        return (1, 1), "read as fractions of the image"
    if largest <= THOUSANDTHS[0]:
        return THOUSANDTHS, "read as thousandths of the image"
    return size, "read as pixels"
