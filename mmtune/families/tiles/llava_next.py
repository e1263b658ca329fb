"""LLaVA-NeXT and LLaVA-OneVision: tiles of the best-fitting resolution, and the whole image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.family import ConfigRule, Family, Geometry, Size
from mmtune.families.fixed.llava import LLAVA_KEYS
from mmtune.families.image_geometry import grid_tokens, shape_only_image

_TILES: dict[str, ConfigRule] = {"image_processor.image_grid_pinpoints": lambda config: config.image_grid_pinpoints}
# The projector is a module, and the vector that ends each row of features a parameter of its own.
_PROJECTOR = ("model.multi_modal_projector", "model.image_newline")


class LlavaNext(Family):
    """Tiles, which the processor counts from the sizes of the images."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """One tile for each image, and the sizes of the images."""
        size = settings["size"]
        edge = size.get("shortest_edge")
        tile = (size["width"], size["height"]) if size.get("height") and size.get("width") else (edge, edge)
        if settings["do_center_crop"]:
            tile = (settings["crop_size"]["width"], settings["crop_size"]["height"])
        return {
            "pixel_values": [[shape_only_image(tile)] * len(sizes)],
            "image_sizes": [(height, width) for width, height in sizes],
            "batch_num_images": [len(sizes)],  # LLaVA-OneVision tiles only the single image of a sample
        }


LLAVA_NEXT = LlavaNext(
    "llava_next",
    model_types=("llava_next", "llava_next_video"),
    processors=("LlavaNextProcessor", "LlavaNextVideoProcessor"),
    projector=_PROJECTOR,
    image_processors=("LlavaNextImageProcessor",),
    processor_keys={**LLAVA_KEYS, **_TILES},
)
LLAVA_ONEVISION = LlavaNext(
    "llava_onevision",
    model_types=("llava_onevision",),
    processors=("LlavaOnevisionProcessor",),
    projector=_PROJECTOR,
    image_processors=("LlavaOnevisionImageProcessor",),
    processor_keys={
        "num_image_tokens": grid_tokens,
        "vision_feature_select_strategy": LLAVA_KEYS["vision_feature_select_strategy"],
        "vision_aspect_ratio": lambda config: config.vision_aspect_ratio,
        **_TILES,
    },
)
