"""Cosmos 3 Edge: its model needs the types of tokens, which its processor returns only on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class Cosmos3Edge(Family):
    """`return_mm_token_type_ids` is False in its processor class, and its model refuses images without the types."""

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`mm_token_type_ids`: 1 for the tokens of images."""
        import torch

        return {"mm_token_type_ids": torch.tensor(processor.create_mm_token_type_ids([input_ids]))}


COSMOS3_EDGE = Cosmos3Edge("cosmos3_edge", model_types=("cosmos3_edge",), processors=("Cosmos3EdgeProcessor",), mrope=True)
