"""ERNIE 4.5 VL: experts of their own for the tokens of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class ErnieVl(Family):
    """Tokens of an image, with those that mark its start and end, go to the experts for vision."""

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`moe_mm_token_type_ids`: 1 for the tokens of images."""
        import torch

        return {"moe_mm_token_type_ids": torch.tensor(processor.create_moe_mm_token_type_ids([input_ids]))}


ERNIE_VL = ErnieVl("ernie_vl", model_types=("ernie4_5_vl_moe",), processors=("Ernie4_5_VLMoeProcessor",), mrope=True)
