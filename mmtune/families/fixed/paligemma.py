"""PaliGemma: a prompt that attends in both directions, and an answer after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families import box_convention
from mmtune.families.family import Family, Geometry, Size, Span
from mmtune.families.image_geometry import SQUARE_PROCESSORS, grid_tokens

if TYPE_CHECKING:
    import torch


class PaliGemma(Family):
    """A fixed number of tokens for every image."""

    def complete_processor(self, processor: Any, filled: Mapping[str, Any]) -> None:
        """Its processor counts with its own copy of the image processor's number."""
        processor.image_seq_length = processor.image_processor.image_seq_length

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """Nothing depends on the sizes."""
        return {}

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The bos token after the last image, and a newline at the end.

        In a prompt that is the newline before the answer, which the model then does not generate.
        """
        last, bos = image_ends[-1], processor.tokenizer.bos_token
        spans = [(start + text.startswith("\n", start), end) for start, end in spans]
        text = f"{text[:last]}{bos}{text[last:]}\n"
        return text, [(start + len(bos) * (start >= last), end + len(bos) * (end > last)) for start, end in spans]

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tokens of type 0 attend in both directions, so supervised tokens need type 1."""
        import torch

        prefix = supervised.index(True) if True in supervised else len(supervised)
        return {"token_type_ids": (torch.arange(len(input_ids)) >= prefix).long()[None]}


PALIGEMMA = PaliGemma(
    "paligemma",
    model_types=("paligemma",),
    processors=("PaliGemmaProcessor",),
    unpackable="its prompts attend in both directions, so the prompts of all samples in a row would attend to each other",
    image_processors=SQUARE_PROCESSORS,
    processor_keys={"image_processor.image_seq_length": grid_tokens},
    needs_image=True,
    embeds_image_token=False,
    box_conventions={"PaliGemmaProcessor": box_convention.PALIGEMMA},
)
