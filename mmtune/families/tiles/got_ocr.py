"""GOT-OCR 2: its processor takes the images of a conversation in one list, and no conversation without an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class GotOcr2(Family):
    """The number of tokens of a tile is a default of the processor class."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Nested lists would be the pages of one document, with one placeholder."""
        text = [processor.image_token * len(images)]
        settings = {"images_kwargs": {"return_tensors": "pt"}, "return_text_replacement_offsets": True}
        outputs = processor(images=list(images), text=text, **settings)
        replacements = [change["replacement"] for change in outputs["text_replacement_offsets"][0]]
        return {"pixel_values": outputs["pixel_values"]}, replacements


GOT_OCR2 = GotOcr2("got_ocr2", model_types=("got_ocr2",), processors=("GotOcr2Processor",), needs_image=True)
