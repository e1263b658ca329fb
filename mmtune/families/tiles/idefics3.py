"""Idefics3 and SmolVLM: rows and columns of tiles, and the whole image, with shuffled pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.family import Family, Geometry, Size
from mmtune.families.image_geometry import grid_tokens, shape_only_image


class Idefics3(Family):
    """Tiles after resizing the longest edge."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """Rows and columns of tiles of each image; 0 for an image that is not split."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

        tile = settings["max_image_size"]["longest_edge"]
        rows, columns = [], []
        for width, height in sizes:
            if settings["do_resize"] and settings["size"].get("longest_edge"):
                height, width = get_resize_output_image_size(
                    shape_only_image((width, height)), resolution_max_side=settings["size"]["longest_edge"]
                )
            elif settings["do_resize"]:
                height, width = settings["size"]["height"], settings["size"]["width"]
            if settings["do_image_splitting"]:
                height, width = _whole_tiles(height, width, tile)
            split = settings["do_image_splitting"] and max(height, width) > tile
            rows.append(height // tile if split else 0)
            columns.append(width // tile if split else 0)
            if split and not min(rows[-1], columns[-1]):
                return None
        return {"rows": [rows], "cols": [columns]}


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """`resize_for_vision_encoder` of Idefics3's image processor: (height, width) in whole tiles, the longer edge first."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width


IDEFICS3 = Idefics3(
    "idefics3",
    model_types=("idefics3", "smolvlm"),
    processors=("Idefics3Processor", "SmolVLMProcessor"),
    image_processors=("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    processor_keys={"image_seq_len": lambda config: grid_tokens(config) // config.scale_factor**2},
)
