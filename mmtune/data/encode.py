"""One sample to tensors: `input_ids`, `labels` and media, with labels on the assistant's words and nothing else.

Labels come from the chat template's `{% generation %}` marks: transformers renders the conversation, keeps the character
span of every marked piece, and maps it through tokenization and through the expansion of image placeholders. No prefix is
ever re-tokenized to guess a length.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from transformers import ProcessorMixin

from mmtune.data.media import open_image
from mmtune.data.message import Message, RowError, Sample, text_of
from mmtune.errors import UserError

IGNORE_INDEX = -100


def with_images(sample_id: str, messages: list[Message]) -> list[Message]:
    """The same messages with every image opened.

    Raises:
        RowError: naming the row, for an image that cannot be opened or decoded.
    """
    opened = []
    for message in messages:
        content = []
        for block in message["content"]:
            if block["type"] == "image":
                try:
                    block = {"type": "image", "image": open_image(block["image"])}
                except ValueError as error:
                    raise RowError(sample_id, "image", str(error)) from error
            content.append(block)
        opened.append({**message, "content": content})
    return opened


def check_text(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> None:
    """Refuse text that spells a control token, which the tokenizer would take for the real one, or that is no Unicode.

    Control tokens are the tokenizer's special ones, and those of its added tokens that the chat template writes.

    Raises:
        RowError: naming the row and the token.
    """
    added = processor.tokenizer.added_tokens_decoder.values()
    template = str(processor.chat_template)
    control = {*processor.tokenizer.all_special_tokens, *(t.content for t in added if t.special or t.content in template)}
    for number, message in enumerate(messages):
        text = text_of(message)
        found = sorted(token for token in control if token in text)
        if found:
            raise RowError(sample_id, f"messages[{number}]", f"the text spells the control token {found[0]!r}; take it out")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(sample_id, f"messages[{number}]", f"the text is not valid Unicode: {error}") from error


def encode_sample(sample: Sample, processor: ProcessorMixin, max_tokens: int | None = None) -> dict[str, torch.Tensor]:
    """Encode a whole conversation for training.

    Args:
        sample: the conversation; its images are opened here.
        processor: the model's processor, with a chat template that marks generations.
        max_tokens: refuse a longer sample, image tokens counted.

    Returns:
        `input_ids`, `labels` (int64, shape (1, length); -100 where not supervised), `attention_mask`, and the processor's
        media tensors.

    Raises:
        RowError: naming the row; `OverLength` when it is too long.
    """
    check_text(sample.id, sample.messages, processor)
    rendered = processor.apply_chat_template(
        with_images(sample.id, sample.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        # Text stays lists: transformers walks the offsets one by one, and walking a tensor is many times slower.
        processor_kwargs={"images_kwargs": {"return_tensors": "pt"}},
    )
    encoded = {key: torch.as_tensor(value) for key, value in rendered.items()}
    mask = encoded.pop("assistant_masks").bool()
    input_ids = encoded["input_ids"]
    length = input_ids.shape[1]
    if max_tokens is not None and length > max_tokens:
        raise OverLength(sample.id, "messages", f"{length} tokens, more than data.max_tokens: {max_tokens}")
    answers = sum(message["role"] == "assistant" for message in sample.messages)
    spans = sum(supervised for supervised, _ in groupby(mask[0].tolist()))
    if spans != answers:
        raise RowError(
            sample.id, "messages", f"{spans} supervised spans for {answers} answers: the chat template dropped or joined one"
        )
    _check_beginnings(sample, processor, input_ids)
    return {**encoded, "labels": input_ids.masked_fill(~mask, IGNORE_INDEX)}


def _check_beginnings(sample: Sample, processor: ProcessorMixin, input_ids: torch.Tensor) -> None:
    """Refuse an answer whose first white space became one token with what the chat template writes before it.

    That token would be supervised whole, and a prompt never ends inside it.
    """
    for number, message in enumerate(sample.messages):
        if message["role"] == "assistant" and text_of(message)[:1].isspace():
            prompt = encode_prompt(sample.id, sample.messages[:number], processor)["input_ids"]
            if not torch.equal(input_ids[:, : prompt.shape[1]], prompt):
                detail = "the answer begins with white space that the tokenizer joins to the chat template's; take it out"
                raise RowError(sample.id, f"messages[{number}]", detail)


def encode_prompt(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """Encode a conversation that ends with the user, up to where the model's answer begins.

    Returns:
        As `encode_sample`, without labels.

    Raises:
        RowError: naming the row.
    """
    check_text(sample_id, messages, processor)
    encoded: dict[str, torch.Tensor] = dict(
        processor.apply_chat_template(
            with_images(sample_id, messages), tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
    )
    return encoded


def check_chat_template(processor: ProcessorMixin) -> None:
    """Prove on two short conversations that what will be supervised is the answer and the token that ends it.

    Conversations of several turns are held to it sample by sample: `encode_sample` counts their spans.

    Raises:
        UserError: when the chat template marks more, less, or nothing after an answer, so that the end is never learnt.
    """
    for word in ("yes", "no"):
        messages: list[Message] = [
            {"role": "user", "content": [{"type": "text", "text": "Is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": word}]},
        ]
        labels = encode_sample(Sample("chat template", messages), processor)["labels"]
        span = labels[labels != IGNORE_INDEX].tolist()
        text, end = processor.tokenizer.decode(span[:-1]), processor.tokenizer.decode(span[-1:])
        if text.strip() != word:
            raise UserError(
                f"model: the chat template supervises {text + end!r} for the answer {word!r}; right is the answer and one token "
                "that ends it"
            )


class OverLength(RowError):
    """A sample longer than `data.max_tokens`."""
