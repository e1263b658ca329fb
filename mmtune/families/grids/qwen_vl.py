"""Qwen-VL and families with its image processor: a grid of patches that keeps the aspect ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if not settings["do_resize"]:
            return None
        patch, bounds = settings["patch_size"], settings["size"]
        grids = []
        for width, height in sizes:
            min_pixels, max_pixels = bounds["shortest_edge"], bounds["longest_edge"]
            factor = patch * settings["merge_size"]
            resized = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
            grids.append([1, *(edge // patch for edge in resized)])
        return {"image_grid_thw": np.array(grids)}


QWEN_VL = QwenVl(
    "qwen_vl",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    processors=("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"),
    mrope=True,
    image_processors=("Qwen2VLImageProcessor",),
    processor_keys=_KEYS,
)
