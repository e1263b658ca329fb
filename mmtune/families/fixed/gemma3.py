"""Gemma 3 and 3n: the whole image, and with pan and scan also crops of a long one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.families.family import Family, Geometry, Size
from mmtune.families.image_geometry import shape_only_image


class Gemma3(Family):
    """A fixed number of tokens for the whole image and for each crop."""

    def complete_processor(self, processor: Any, filled: Mapping[str, Any]) -> None:
        """Its processor builds the text of an image once, from `image_seq_length`."""
        if filled:
            tokenizer = processor.tokenizer
            tokens = tokenizer.image_token * processor.image_seq_length
            processor.full_image_sequence = f"\n\n{tokenizer.boi_token}{tokens}{tokenizer.eoi_token}\n\n"

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """The number of crops of each image."""
        names = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")
        if not settings["do_pan_and_scan"]:
            return {"num_crops": [0] * len(sizes)}
        if processor.image_processor.backend != "pil":
            return None
        limits = {name: settings[name] for name in names}
        crop = processor.image_processor.pan_and_scan
        return {"num_crops": [len(crop(shape_only_image(size), **limits)) for size in sizes]}


GEMMA3 = Gemma3(
    "gemma3",
    model_types=("gemma3",),
    processors=("Gemma3Processor",),
    unpackable="its image tokens attend in both directions by their position in the row, but positions restart in every sample",
    image_processors=("Gemma3ImageProcessor",),
    processor_keys={"image_seq_length": lambda config: config.mm_tokens_per_image},
    embeds_image_token=False,
    placeholder_is_image_token=False,
    media_types_key="token_type_ids",
)
GEMMA3N = Gemma3(
    "gemma3n",
    model_types=("gemma3n",),
    processors=("Gemma3nProcessor",),
    bypassed=("prediction_coefs", "correction_coefs"),  # AltUp bounds their weights in training
    processor_keys={"image_seq_length": lambda config: config.vision_soft_tokens_per_image},
    media_types_key="token_type_ids",
)
