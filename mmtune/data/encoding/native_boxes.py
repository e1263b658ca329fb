"""Native boxes: boxes of messages in the convention of the processor's family, and the tokens of boxes in answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmtune.chat_templates.jinja_rendering import BOX_TOKENS
from mmtune.data.media.resizing import image_kwargs
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.templates.boxes import corner_shares
from mmtune.families.box_convention import UNKNOWN_CONVENTION, BoxConvention
from mmtune.families.family import Size
from mmtune.families.family_table import family_of_processor
from mmtune.utils.errors import RecipeValueError


def with_native_boxes(sample: Sample, processor: ProcessorMixin) -> Sample:
    """The sample whose messages have been written by `write_native_boxes`. Raises as that."""
    return replace(sample, messages=write_native_boxes(sample.id, sample.messages, processor))


def write_native_boxes(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> list[Message]:
    """The messages with their native boxes as text. Pixels are those of the image as the processor resizes it.

    Args:
        sample_id: the row's id, for errors.
        messages: with all images that their boxes are in; an image may have a `size`, to which it is resized before.
        processor: the model's processor.

    Raises:
        RecipeValueError: the convention of the processor's family is unknown.
        RowError: the processor rejects the size of an image.
    """
    blocks = [block for message in messages for block in message["content"]]
    if not any("native" in block for block in blocks):
        return messages
    convention = _convention(processor)
    try:
        resized = {id(block): _resized(block, blocks, processor) for block in blocks if "native" in block}
    except ValueError as error:
        detail = f"{type(processor).__name__} rejects the image of a box: {error}"
        raise RowError(sample_id, "image", detail, "image_refused") from error
    written = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for is_text, group in groupby(message["content"], key=lambda block: block["type"] == "text"):
            if not is_text:
                content += group
                continue
            texts = [
                convention.write(corner_shares(block["native"].box), resized[id(block)], block["native"].label)
                if "native" in block
                else block["text"]
                for block in group
            ]
            content.append({"type": "text", "text": "".join(texts)})
        written.append({**message, "content": content})
    return written


def decode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """The texts of generated answers without special tokens, except for `BOX_TOKENS`.

    Args:
        answers: token ids.
    """
    special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not any(BOX_TOKENS.fullmatch(content) for content in special.values()):
        return list(tokenizer.batch_decode(answers, skip_special_tokens=True))
    skipped = {number for number, content in special.items() if not BOX_TOKENS.fullmatch(content)}
    answer_tokens = [[token for token in answer if token not in skipped] for answer in answers]
    return list(tokenizer.batch_decode(answer_tokens, skip_special_tokens=False))


@lru_cache(maxsize=8)
def _convention(processor: ProcessorMixin) -> BoxConvention:
    conventions = family_of_processor(processor).box_conventions
    names = [each.__name__ for each in type(processor).__mro__]
    convention = next((conventions[name] for name in names if name in conventions), None)
    if convention is None:
        raise RecipeValueError("model", f"{type(processor).__name__}: {UNKNOWN_CONVENTION}")
    return convention


def _resized(block: dict[str, Any], blocks: list[dict[str, Any]], processor: ProcessorMixin) -> Size:
    """The size of a box's image after the image processor. The box is of the image before `data.over_length` resizes it."""
    box = block["native"].box
    images = [other for other in blocks if other["type"] == "image" and other["image"] == block["box_image"]]
    size = images[0].get("size", (box.width, box.height)) if images else (box.width, box.height)
    return family_of_processor(processor).resized_size(image_kwargs(processor), size)
