"""Pixtral and Mistral 3: whole patches in rows, with a maximum edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.family import Family, Geometry, Size
from mmtune.families.image_geometry import patch_size, shape_only_image


class Pixtral(Family):
    """Rows of patches that keep the aspect ratio."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """(height, width) of each image after resizing."""
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        longest, size = settings["size"].get("longest_edge"), settings["size"]
        if not settings["do_resize"] or settings["do_center_crop"]:
            return None
        bound = (longest, longest) if longest else (size["height"], size["width"])
        patch = processor.patch_size * processor.spatial_merge_size
        resized = [
            get_resize_output_image_size(shape_only_image(size), bound, patch, input_data_format="channels_first")
            for size in sizes
        ]
        if any(min(edges) < 1 for edges in resized):
            return None  # the real processor raises its own error
        return {"image_sizes": resized}


PIXTRAL = Pixtral(
    "pixtral",
    processors=("PixtralProcessor",),
    image_processors=("PixtralImageProcessor",),
    processor_keys={"patch_size": patch_size, "spatial_merge_size": lambda config: getattr(config, "spatial_merge_size", 1)},
)
