"""Families without a vision tower: pixels are projected straight to embeddings, or become tokens of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mmtune.families.family import Family, Span


class Emu3(Family):
    """The processor writes the bos token at the start of every text. The codes of an image depend on its padding."""

    def prepare_model(self, model: Any) -> None:
        """An image is encoded alone, without the padding beside larger images of its batch."""
        tokenizer = model.get_submodule("model.vqmodel")
        tokenizer.encode = partial(_encode_alone, tokenizer.encode)

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The text after the bos token."""
        bos = processor.bos_token
        return bos + text, [(start + len(bos), end + len(bos)) for start, end in spans]


class Chameleon(Family):
    """The processor writes a separator at the end of every prompt; in a conversation it stands before each answer."""

    def prepare_model(self, model: Any) -> None:
        """Logits of selected positions keep a dimension of rows, which the class expects when it forbids image tokens."""
        model.get_output_embeddings().register_forward_hook(_with_rows)

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The text with a separator at its end."""
        return text + processor.tokenizer.sep_token, spans


def _encode_alone(encode: Callable[..., Any], pixel_values: Any, image_sizes: Any, **arguments: Any) -> Any:
    """`encode` of each image of shape (channels, height, width) at its own size; the codes of all images in one list."""
    outputs = [
        encode(pixels[None, :, : int(size[0]), : int(size[1])], size[None], **arguments)
        for pixels, size in zip(pixel_values, image_sizes, strict=True)
    ]
    return type(outputs[0])(
        last_hidden_state=[output.last_hidden_state for output in outputs],
        image_tokens=[codes for output in outputs for codes in output.image_tokens],
    )


def _with_rows(_: Any, __: Any, logits: Any) -> Any:
    return logits if logits.ndim > 2 else logits[None]


GEMMA4_UNIFIED = Family("gemma4_unified", model_types=("gemma4_unified",), encoder_free=True)
# The codes of an image are found without a gradient, so its encoder cannot be trained.
CHAMELEON = Chameleon(
    "chameleon", model_types=("chameleon",), processors=("ChameleonProcessor",), encoder_free=True, others=("model.vqmodel",)
)
EMU3 = Emu3("emu3", model_types=("emu3",), processors=("Emu3Processor",), encoder_free=True, others=("model.vqmodel",))
