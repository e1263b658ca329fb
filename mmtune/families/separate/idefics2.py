"""Idefics 2: a fixed number of resampled features for an image, or for each of its quarters and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family, Span

if TYPE_CHECKING:
    import torch


class Idefics2(Family):
    """Image tokens between two markers; adjacent images share one."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels with their mask, and `image_seq_len` tokens for an image or for each of its five parts."""
        outputs = processor.image_processor([list(images)], return_tensors="pt")
        parts = 5 if processor.image_processor.do_image_splitting else 1
        tokens = processor.image_token * processor.image_seq_len
        marker = processor.fake_image_token
        return dict(outputs), [marker + (tokens + marker) * parts] * len(images)

    def replacements_in_text(
        self, processor: Any, text: str, placeholders: Sequence[Span], replacements: Sequence[str]
    ) -> Sequence[str]:
        """One marker between adjacent images, and a space between the last marker and a word, as the processor writes them."""
        marker = processor.fake_image_token
        placed = []
        for number, (start, end) in enumerate(placeholders):
            adjacent = number > 0 and placeholders[number - 1][1] == start
            following = text[end : end + 1]
            space = " " if following and following != "<" and not following.isspace() else ""
            placed.append(replacements[number][len(marker) * adjacent :] + space)
        return placed


IDEFICS2 = Idefics2(
    "idefics2",
    model_types=("idefics2",),
    processors=("Idefics2Processor",),
    processor_keys={"image_seq_len": lambda config: config.perceiver_config.resampler_n_latents},
)
