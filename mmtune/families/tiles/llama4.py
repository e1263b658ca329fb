"""Llama 4: rows and columns of tiles, and the whole image; its class applies the projector after `get_image_features`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmtune.families.family import Family


class Llama4(Family):
    """Features with the projector, which the model's forward pass applies."""

    def image_features(self, model: Any) -> Callable[..., Any]:
        """The features of all tiles in one tensor, from the vision tower and the projector."""

        def features(pixel_values: Any, **settings: Any) -> Any:
            output = model.get_image_features(pixel_values=pixel_values, **settings)
            output.pooler_output = model.multi_modal_projector(output.last_hidden_state.flatten(0, -2))
            return output

        return features


LLAMA4 = Llama4("llama4", model_types=("llama4",), processors=("Llama4Processor",), placeholder_is_image_token=False)
