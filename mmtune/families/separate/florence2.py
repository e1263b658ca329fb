"""Florence-2: an encoder reads the image and one instruction or task, and a decoder writes the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families import box_convention
from mmtune.families.family import Family, Span, TextError

if TYPE_CHECKING:
    import torch


class Florence2(Family):
    """A fixed number of tokens for the image, before the text."""

    def decoder_start(self, processor: Any) -> int | None:
        """The decoder is BART's, which starts with the end-of-sequence token."""
        return int(processor.tokenizer.eos_token_id)

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels of shape (1, 3, height, width), and `num_image_tokens` tokens; the processor itself would add a placeholder."""
        outputs = processor.image_processor(list(images), return_tensors="pt")
        return dict(outputs), [processor.image_token * processor.num_image_tokens] * len(images)

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The instruction between special tokens; a task such as `<CAPTION>` is replaced by the question that it stands for."""
        tokenizer, head, prompt = processor.tokenizer, text[: image_ends[-1]], text[image_ends[-1] :]
        return f"{head}{tokenizer.bos_token}{_instruction(processor, prompt)}{tokenizer.eos_token}", spans


def _instruction(processor: Any, prompt: str) -> str:
    for task, question in processor.task_prompts_without_inputs.items():
        if task in prompt:
            if prompt != task:
                raise TextError(f"expected nothing beside the task {task}, got {prompt!r}")
            return str(question)
    for task, question in processor.task_prompts_with_input.items():
        if task in prompt:
            return str(question.format(input=prompt.replace(task, "").strip()))
    return prompt


FLORENCE2 = Florence2(
    "florence2",
    model_types=("florence2",),
    processors=("Florence2Processor",),
    unpackable="its encoder reads one question",
    takes_virtual_tokens=False,
    needs_image=True,
    one_image=True,
    images_first=True,
    box_conventions={"Florence2Processor": box_convention.FLORENCE2},
)
