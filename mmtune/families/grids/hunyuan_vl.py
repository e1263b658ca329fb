"""HunYuan-VL: its processor takes an image only between the tokens that mark its start and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class HunyuanVl(Family):
    """The chat template writes the marks with the image token."""

    def placeholder(self, processor: Any) -> str:
        """The image token between its marks."""
        return _marked(processor, processor.image_token)

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The text of an image has the marks of its placeholder."""
        media, texts = super().process_images(processor, images)
        return media, [_marked(processor, text) for text in texts]


def _marked(processor: Any, text: str) -> str:
    return f"{processor.image_start_token}{text}{processor.image_end_token}"


HUNYUAN_VL = HunyuanVl(
    "hunyuan_vl",
    model_types=("hunyuan_vl",),
    processors=("HunYuanVLProcessor",),
    mrope=True,
    unpackable="its model takes positions in the image only, and refuses those of the text that tell samples apart",
)
