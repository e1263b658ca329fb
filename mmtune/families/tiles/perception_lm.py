"""Perception LM: its vision tower takes the tiles of all images in one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class PerceptionLm(Family):
    """Tiles without images of their own, so that images with different numbers of tiles need no padding."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels of shape (tiles, 1, channels, height, width); the padding of its processor would be encoded."""
        import torch

        each = [super(PerceptionLm, self).process_images(processor, [image]) for image in images]
        pixels = torch.cat([media["pixel_values"].flatten(0, 1) for media, _ in each])
        return {"pixel_values": pixels[:, None]}, [replacement for _, (replacement,) in each]


PERCEPTION_LM = PerceptionLm("perception_lm", model_types=("perception_lm",), processors=("PerceptionLMProcessor",))
