"""Molmo 2: overlapping tiles and the whole image, all of whose tokens attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmtune.families.family import Family, Span


class Molmo2(Family):
    """Text that the processor, and not the chat template, starts with a token."""

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The bos token before the text, or eos where the tokenizer has no bos."""
        start = processor.tokenizer.bos_token or processor.tokenizer.eos_token
        if text.startswith(start):
            return text, spans
        return start + text, [(begin + len(start), end + len(start)) for begin, end in spans]


MOLMO2 = Molmo2(
    "molmo2",
    model_types=("molmo2",),
    processors=("Molmo2Processor",),
    unpackable="its image tokens attend in both directions, to those of all images of the row",
    placeholder_is_image_token=False,
)
