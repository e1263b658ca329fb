"""LLaVA: one image of one size, so that every image has the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.family import ConfigRule, Family, Geometry, Size
from mmtune.families.image_geometry import SQUARE_PROCESSORS, extra_tokens, patch_size, shape_only_image

LLAVA_KEYS: dict[str, ConfigRule] = {
    # A convolutional tower, as in FastVLM, has no patches.
    "patch_size": lambda config: patch_size(config) if hasattr(config.vision_config, "patch_size") else None,
    "vision_feature_select_strategy": lambda config: getattr(config, "vision_feature_select_strategy", None),
    "num_additional_image_tokens": extra_tokens,
}


class Llava(Family):
    """One crop or one fixed size, whatever the image size."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """The size after resizing and cropping."""
        final = settings["crop_size"] if settings["do_center_crop"] else settings["size"] if settings["do_resize"] else None
        if not final or not final.get("height") or not final.get("width"):
            return None
        return {"pixel_values": [shape_only_image((final["width"], final["height"]))] * len(sizes)}


VIDEO_LLAVA = Llava(
    "video_llava",
    model_types=("video_llava",),
    processors=("VideoLlavaProcessor",),
    image_settings={"return_legacy_image_output": False},  # pixels under the name that the model takes
    image_processors=("VideoLlavaImageProcessor",),
    processor_keys=LLAVA_KEYS,
)
LLAVA = Llava(
    "llava",
    model_types=("llava",),
    processors=("LlavaProcessor",),
    image_processors=(*SQUARE_PROCESSORS, "LlavaImageProcessor"),
    processor_keys=LLAVA_KEYS,
)
