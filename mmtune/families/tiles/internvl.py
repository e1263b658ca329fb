"""InternVL and Qianfan-OCR: the grid of tiles with the nearest aspect ratio, and a thumbnail if there is more than one tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families import box_convention
from mmtune.families.family import Family, Geometry, Size
from mmtune.families.image_geometry import grid_tokens


class InternVl(Family):
    """Tiles of one size."""

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """The number of tiles of each image."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        if not settings["crop_to_patches"] or settings["max_patches"] <= 1:
            return {"num_patches": [1] * len(sizes)}
        tile = (settings["size"]["height"], settings["size"]["width"])
        counts = []
        for width, height in sizes:
            columns, rows = get_optimal_tiled_canvas((height, width), tile, settings["min_patches"], settings["max_patches"])
            counts.append(columns * rows + (columns * rows > 1))
        return {"num_patches": counts}


INTERNVL = InternVl(
    "internvl",
    model_types=("internvl",),
    processors=("InternVLProcessor",),
    image_processors=("GotOcr2ImageProcessor",),
    processor_keys={"image_seq_length": lambda config: int(grid_tokens(config) * config.downsample_ratio**2)},
    box_conventions={"InternVLProcessor": box_convention.INTERNVL},
)


class QianfanOcr(InternVl):
    """InternVL's tiles, with a placeholder that is not the token of the image features."""

    def placeholder(self, processor: Any) -> str:
        """The placeholder has a name of its own."""
        return str(processor.image_placeholder_token)


QIANFAN_OCR = QianfanOcr(
    "qianfan_ocr",
    model_types=("qianfan_ocr",),
    processors=("QianfanOCRProcessor",),
    image_processors=INTERNVL.image_processors,
    processor_keys=INTERNVL.processor_keys,
)
