"""Qwen-VL and families with its image processor: a grid of patches that keeps the aspect ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.box_convention import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from mmtune.families.family import ConfigRule, Family, Geometry, Size

_KEYS: dict[str, ConfigRule] = {
    "image_processor.patch_size": lambda config: config.vision_config.patch_size,
    "image_processor.merge_size": lambda config: config.vision_config.spatial_merge_size,
    "image_processor.temporal_patch_size": lambda config: config.vision_config.temporal_patch_size,
}


class QwenVl(Family):
    """Patches in groups of `merge_size` squared, with a minimum and maximum number of pixels."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """The grid of patches of each image."""
        import numpy as np

        if not settings["do_resize"]:
            return None
        patch = settings["patch_size"]
        resized = [self.resized_size(settings, size) for size in sizes]
        return {"image_grid_thw": np.array([[1, height // patch, width // patch] for width, height in resized])}

    def resized_size(self, settings: Mapping[str, Any], size: Size) -> Size:
        """Whole groups of patches, within the limits of pixels."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if not settings["do_resize"]:
            return size
        factor, bounds = settings["patch_size"] * settings["merge_size"], settings["size"]
        limits = {"min_pixels": bounds["shortest_edge"], "max_pixels": bounds["longest_edge"]}
        height, width = smart_resize(size[1], size[0], factor=factor, **limits)
        return width, height


QWEN_VL = QwenVl(
    "qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    processors=("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"),
    mrope=True,
    image_processors=("Qwen2VLImageProcessor",),
    processor_keys=_KEYS,
    box_conventions={"Qwen2VLProcessor": QWEN2_VL, "Qwen2_5_VLProcessor": QWEN2_5_VL, "Qwen3VLProcessor": QWEN3_VL},
)
