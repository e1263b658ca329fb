"""Llama 4: rows and columns of tiles, and the whole image; its class applies the projector after `get_image_features`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


class Llama4(Family):
    """Pixels that its image processor returns in bf16, which a model in fp32 does not take."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels in fp32, as of all families; autocast casts them where the model is in bf16."""
        media, replacements = super().process_images(processor, images)
        return {**media, "pixel_values": media["pixel_values"].float()}, replacements

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """Pixels as `process_images` returns them."""
        return batch | {name: batch[name].float() for name in ("pixel_values",) if name in batch}

    def image_features(self, model: Any) -> Callable[..., Any]:
        """The features of all tiles in one tensor, from the vision tower and the projector."""

        def features(pixel_values: Any, **settings: Any) -> Any:
            output = model.get_image_features(pixel_values=pixel_values.to(model.vision_model.dtype), **settings)
            output.pooler_output = model.multi_modal_projector(output.last_hidden_state.flatten(0, -2))
            return output

        return features


LLAMA4 = Llama4("llama4", model_types=("llama4",), processors=("Llama4Processor",), placeholder_is_image_token=False)
