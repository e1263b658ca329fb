"""Image settings of a source: the grey-value window, and the augmentation drawn for every visit of a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtune.data.media.augmentation import ImageAugmentation
from mmtune.data.media.media import EmbeddedMedia, ImageView, Media
from mmtune.data.media.pixels import Window
from mmtune.data.message import Message, RowError, all_text_of
from mmtune.data.templates.prompts import draw
from mmtune.data.templates.regions import Region
from mmtune.recipe.source_section import Augment

NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
BOX_IN_TEXT = re.compile(
    rf"[\[(<]{NUMBER}(?:,{NUMBER}){{3}}(?:(?:,{NUMBER}){{4}})?[\])>]|\({NUMBER},{NUMBER}\),\s*\({NUMBER},{NUMBER}\)"
    r"|<\|?(?:box|quad|point)(?:_start)?\|?>|<points? |<loc_?\d{1,4}>|<patch_index_\d+>|bbox_2d|point_2d"
)
"""Text with a region: four or eight numbers in brackets, two points, or the tokens and keys with which models write regions."""


@dataclass(frozen=True)
class ImageSettings:
    """Image settings of one row at one visit.

    Attributes:
        window: the source's `window`.
        augment: the source's `augment`.
        seed: the seed of the random draws.
        visit: how many times the run used the row before; every visit has its own draws.
    """

    window: Window | None = None
    augment: Augment | None = None
    seed: int = 0
    visit: int = 0

    def view(self, image: Path | EmbeddedMedia, row_id: str, number: int, regions: Sequence[Region] = ()) -> Media:
        """The image with its window and augmentation; the image itself if the source sets neither.

        Args:
            image: an image of the row.
            row_id: the row's id.
            number: index of the image in the row.
            regions: regions of the image, which the crop must contain.
        """
        if self.window is None and self.augment is None:
            return image
        return ImageView(image, self.window, self._draw(row_id, number, regions))

    def _draw(self, row_id: str, number: int, regions: Sequence[Region]) -> ImageAugmentation | None:
        augment = self.augment
        if augment is None:
            return None

        def uniform(name: str) -> float:
            return draw(self.seed, row_id, "augment", self.visit, number, name)

        def factor(name: str, strength: float) -> float:
            return 1 + strength * (2 * uniform(name) - 1)

        region = None
        if regions:
            xs, ys = zip(*(corner for each in regions for corner in each.corners), strict=True)
            region = (min(xs), min(ys), max(xs), max(ys))
        return ImageAugmentation(
            crop=augment.crop + (1 - augment.crop) * uniform("crop"),
            position=(uniform("left"), uniform("top")),
            region=region,
            longest_edge=augment.resize,
            flip=uniform("flip") < augment.flip,
            brightness=factor("brightness", augment.brightness),
            contrast=factor("contrast", augment.contrast),
            saturation=factor("saturation", augment.saturation),
        )

    def apply_to_messages(self, row_id: str, messages: Sequence[Message]) -> None:
        """Replace every image of the messages with its `view`.

        Raises:
            RowError: as in `check_no_boxes_in_text`.
        """
        self.check_no_boxes_in_text(row_id, messages)
        images = [block for message in messages for block in message["content"] if block["type"] == "image"]
        for number, block in enumerate(images):
            block["image"] = self.view(block["image"], row_id, number)

    def check_no_boxes_in_text(self, row_id: str, messages: Sequence[Message]) -> None:
        """Check that no text has a box if the augmentation moves the image, because the box would not move with it.

        Raises:
            RowError: a text has a box; names the message and the box.
        """
        if self.augment is None or not self.augment.moves:
            return
        for number, message in enumerate(messages):
            if box := BOX_IN_TEXT.search(all_text_of(message)):
                detail = (
                    f"the text has a box, '{box[0][:60]}', which `augment` of the source (resize, crop, flip) does not transform"
                )
                fix = "remove these three, or declare the boxes in the data template (`boxes`)"
                raise RowError(row_id, f"messages[{number}]", f"{detail}; {fix}", "box_unmoved")


DEFAULT_IMAGE_SETTINGS = ImageSettings()
