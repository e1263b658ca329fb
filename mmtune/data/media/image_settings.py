"""Per-source image settings: a window for grey values, and an augmentation drawn for every visit of a row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtune.data.media.augmentation import ImageAugmentation
from mmtune.data.media.media import EmbeddedMedia, ImageView, Media
from mmtune.data.media.pixels import Window
from mmtune.data.message import Message, RowError, text_of
from mmtune.data.templates.boxes import Box
from mmtune.data.templates.prompts import draw
from mmtune.recipe.media_sections import Augment

NUMBER = r"\s*-?\d+(?:\.\d+)?\s*"
BOX_IN_TEXT = re.compile(
    rf"[\[(<]{NUMBER}(?:,{NUMBER}){{3}}[\])>]|\({NUMBER},{NUMBER}\),\s*\({NUMBER},{NUMBER}\)|<\|?box(?:_start)?\|?>|<loc\d{{4}}>|bbox_2d"
)
"""Text that gives a box: four numbers in brackets, two points, or the marks of Qwen, InternVL and PaliGemma."""


@dataclass(frozen=True)
class ImageSettings:
    """Image settings of one row at one of its visits.

    Attributes:
        window: the recipe's.
        augment: the recipe's.
        seed: of the draws.
        visit: how many times the row has trained before; each visit has its own draws.
    """

    window: Window | None = None
    augment: Augment | None = None
    seed: int = 0
    visit: int = 0

    def view(self, image: Path | EmbeddedMedia, row_id: str, number: int, boxes: Sequence[Box] = ()) -> Media:
        """An image as it is to be opened; what needs no setting comes back as it is.

        Args:
            image: of the row.
            row_id: of the row.
            number: which of the row's images it is.
            boxes: in the image, which a crop keeps whole.
        """
        if self.window is None and self.augment is None:
            return image
        return ImageView(image, self.window, self._drawn(row_id, number, boxes))

    def _drawn(self, row_id: str, number: int, boxes: Sequence[Box]) -> ImageAugmentation | None:
        augment = self.augment
        if augment is None:
            return None

        def at(name: str) -> float:
            return draw(self.seed, row_id, "augment", self.visit, number, name)

        def factor(name: str, most: float) -> float:
            return 1 + most * (2 * at(name) - 1)

        keep = None
        if boxes:
            keep = (min(b.x1 for b in boxes), min(b.y1 for b in boxes), max(b.x2 for b in boxes), max(b.y2 for b in boxes))
        return ImageAugmentation(
            crop=augment.crop + (1 - augment.crop) * at("crop"),
            place=(at("left"), at("top")),
            keep=keep,
            longest=augment.resize,
            flipped=at("flip") < augment.flip,
            brightness=factor("brightness", augment.brightness),
            contrast=factor("contrast", augment.contrast),
            saturation=factor("saturation", augment.saturation),
        )

    def shown(self, row_id: str, messages: Sequence[Message]) -> None:
        """Put a view in place of every image of the messages.

        Raises:
            RowError: as `check_text`.
        """
        self.check_text(row_id, messages)
        images = [block for message in messages for block in message["content"] if block["type"] == "image"]
        for number, block in enumerate(images):
            block["image"] = self.view(block["image"], row_id, number)

    def check_text(self, row_id: str, messages: Sequence[Message]) -> None:
        """Refuse a box in a text beside an augmentation that moves the image: the box would stay where it was.

        Raises:
            RowError: naming the message and the box.
        """
        if self.augment is None or not self.augment.moves:
            return
        for place, message in enumerate(messages):
            if box := BOX_IN_TEXT.search(text_of(message)):
                detail = f"the text has a box, '{box[0][:60]}', which `augment` of its source (resize, crop, flip) does not move"
                fix = "take these out, or declare the boxes in the data template (`boxes`)"
                raise RowError(row_id, f"messages[{place}]", f"{detail}; {fix}", "box_unmoved")


DEFAULT_IMAGE_SETTINGS = ImageSettings()
