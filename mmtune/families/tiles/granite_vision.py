"""Granite 4 Vision: LLaVA-NeXT's tiles, whose features several layers of the decoder add to the places of the image tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from mmtune.families.family import Family


class Granite4Vision(Family):
    """As many image tokens as the features of one layer."""

    def image_features(self, model: Any) -> Callable[..., Any]:
        """The features for the first of the decoder's layers; those for the others have the same shapes."""

        @wraps(model.get_image_features)
        def features(**inputs: Any) -> Any:
            output = model.get_image_features(**inputs)
            output.pooler_output = output.deepstack_features[0][1]
            return output

        return features


GRANITE4_VISION = Granite4Vision("granite4_vision", model_types=("granite4_vision",), processors=("Granite4VisionProcessor",))
