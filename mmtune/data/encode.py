"""One sample to tensors: `input_ids`, `labels` and media, with labels on the assistant's words and nothing else.

The chat template is rendered once, with the character span of every answer. Spans are carried through the expansion of
image placeholders and through the tokenizer's offsets. No prefix is ever re-tokenized to guess a length.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from transformers import Gemma3nProcessor, Gemma3Processor, PaliGemmaProcessor, ProcessorMixin

from mmtune.chat_rendering import NotExact, Span, render_conversation, render_prompt, control_tokens
from mmtune.data.findings import kind_of
from mmtune.data.media import open_image
from mmtune.data.message import Message, RowError, Sample, text_of
from mmtune.data.tokens import Places, tokenize
from mmtune.errors import UserError

IGNORE_INDEX = -100

RENAMES_TYPES = (Gemma3Processor, Gemma3nProcessor)
"""Processors that give `mm_token_type_ids` under the name `token_type_ids`."""

Supervise = Literal["all", "last"]


@dataclass(frozen=True)
class EncodedText:
    """A conversation as tokens, image tokens included.

    Attributes:
        input_ids: token ids.
        supervised: for each token, whether the loss falls on it.
        media: for each token, whether it is part of what stands for an image.
        offsets: for each token, its first and past-the-last character in `text`; (0, 0) for one that the tokenizer added.
        text: the rendered conversation, image placeholders expanded.
    """

    input_ids: list[int]
    supervised: list[bool]
    media: list[bool]
    offsets: list[Span]
    text: str


def encode_text(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    supervise: Supervise = "all",
) -> EncodedText:
    """Encode the text of a whole conversation; training and counting both do it here.

    Args:
        sample_id: the row's id, for errors.
        messages: the conversation; its images are not opened.
        processor: the model's processor.
        replacements: for each image, the string that the processor puts in place of its placeholder.
        supervise: put the loss on all answers, or on the last alone.

    Raises:
        RowError: naming the row.
    """
    return _encode_text(sample_id, messages, processor, replacements, supervise, prompt=False)


def _encode_text(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    supervise: Supervise,
    prompt: bool,
) -> EncodedText:
    tokenizer, template = processor.tokenizer, _template(processor)
    check_text(sample_id, messages, processor)
    bare = _without_pixels(sample_id, messages)
    spans: list[Span] = []
    try:
        if prompt:
            text = render_prompt(bare, template, tokenizer.special_tokens_map)
        else:
            control = control_tokens(tokenizer, template)
            text, spans = render_conversation(bare, template, tokenizer.special_tokens_map, control)
    except NotExact as error:
        raise RowError(sample_id, "messages", str(error), "chat_template") from error
    writes_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    text, media_spans, spans = _expand(sample_id, text, spans, processor, replacements)
    input_ids, offsets = tokenize(tokenizer, text, add_special_tokens=not writes_bos)
    places = Places(offsets)
    supervised, media = [False] * len(input_ids), [False] * len(input_ids)
    for span in spans if supervise == "all" else spans[-1:]:
        tokens = places.of(span)
        supervised[tokens.start : tokens.stop] = [True] * len(tokens)
    for span in media_spans:
        tokens = places.of(span)
        media[tokens.start : tokens.stop] = [True] * len(tokens)
    encoded = EncodedText(input_ids, supervised, media, offsets, text)
    if not prompt:
        _check_beginnings(sample_id, messages, processor, replacements, encoded)
    return encoded


def _template(processor: ProcessorMixin) -> str:
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError("model: its processor has no chat template; name one with model.chat_template")
    return template


def _without_pixels(sample_id: str, messages: list[Message]) -> list[Message]:
    """The messages as a chat template sees them: it asks whether a block has an image, and never reads one."""
    bare = []
    for number, message in enumerate(messages):
        content: list[dict[str, str]] = []
        for block in message["content"]:
            if block["type"] == "text":
                content.append({"type": "text", "text": block["text"]})
            elif block["type"] == "image":
                content.append({"type": "image", "image": "<image>"})
            else:
                detail = f"{block['type']} cannot be encoded yet; images and text can"
                raise RowError(sample_id, f"messages[{number}]", detail, "media_unsupported")
        bare.append({**message, "content": content})
    return bare


def _expand(
    sample_id: str, text: str, spans: list[Span], processor: ProcessorMixin, replacements: list[str]
) -> tuple[str, list[Span], list[Span]]:
    """The text with its image placeholders expanded, the characters of each, and the other spans moved along."""
    token = getattr(processor, "image_token", None)
    found = text.count(token) if token else 0
    if found != len(replacements):
        raise RowError(
            sample_id,
            "messages",
            f"the chat template writes {found} image placeholders for {len(replacements)} images",
            "chat_template",
        )
    if not replacements:
        if isinstance(processor, PaliGemmaProcessor):
            raise RowError(sample_id, "image", "PaliGemma's processor takes no conversation without an image", "image_needed")
        return text, [], spans
    if isinstance(processor, PaliGemmaProcessor):
        text, spans = _as_prefix(text, spans, processor)
    texts, changes = processor.get_text_with_replacements([text], replacements)
    ends = [change["span"][1] for change in changes[0]]
    gained = [0, *(change["new_span"][1] - change["span"][1] for change in changes[0])]

    def moved(position: int) -> int:
        return int(position + gained[bisect_right(ends, position)])

    return texts[0], [change["new_span"] for change in changes[0]], [(moved(start), moved(end)) for start, end in spans]


def _as_prefix(text: str, spans: list[Span], processor: PaliGemmaProcessor) -> tuple[str, list[Span]]:
    """PaliGemma's processor writes the beginning of the sequence after the last image, and a newline at the end."""
    bos, last = processor.tokenizer.bos_token, text.rindex(processor.image_token) + len(processor.image_token)
    moved = [(start + len(bos) * (start >= last), end + len(bos) * (end > last)) for start, end in spans]
    return f"{text[:last]}{bos}{text[last:]}\n", moved


def with_images(sample_id: str, messages: list[Message]) -> list[Message]:
    """The same messages with every image opened, at the `size` that its block asks for, if it does.

    Raises:
        RowError: naming the row, for an image that cannot be opened or decoded.
    """
    opened = []
    for message in messages:
        content = []
        for block in message["content"]:
            if block["type"] == "image":
                try:
                    image = open_image(block["image"])
                except ValueError as error:
                    raise RowError(sample_id, "image", str(error), kind_of(error)) from error
                if "size" in block:  # `data.over_length: shrink_media` asks for it
                    image = image.resize(block["size"], Image.Resampling.LANCZOS)
                block = {"type": "image", "image": image}
            content.append(block)
        opened.append({**message, "content": content})
    return opened


def check_text(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> None:
    """Refuse text that spells a control token, which the tokenizer would take for the real one, or that is no Unicode.

    Control tokens are the tokenizer's special ones, and those of its added tokens that the chat template writes.

    Raises:
        RowError: naming the row and the token.
    """
    control = control_tokens(processor.tokenizer, _template(processor))
    for number, message in enumerate(messages):
        text = text_of(message)
        found = control.search(text)
        if found:
            raise RowError(
                sample_id, f"messages[{number}]", f"the text spells the control token {found[0]!r}; take it out", "control_token"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                sample_id, f"messages[{number}]", f"the text is not valid Unicode: {error}", "text_not_unicode"
            ) from error


def encode_sample(
    sample: Sample, processor: ProcessorMixin, max_tokens: int | None = None, supervise: Supervise = "all"
) -> dict[str, torch.Tensor]:
    """Encode a whole conversation for training.

    Args:
        sample: the conversation; its images are opened here.
        processor: the model's processor.
        max_tokens: refuse a longer sample, image tokens counted.
        supervise: put the loss on all answers, or on the last alone.

    Returns:
        `input_ids`, `labels` (int64, shape (1, length); -100 where not supervised), `attention_mask`, and the processor's
        media tensors.

    Raises:
        RowError: naming the row; `OverLength` when it is too long.
    """
    media, replacements = _process_images(sample.id, sample.messages, processor)
    text = encode_text(sample.id, sample.messages, processor, replacements, supervise)
    length = len(text.input_ids)
    if max_tokens is not None and length > max_tokens:
        raise OverLength(sample.id, "messages", f"{length} tokens, more than data.max_tokens: {max_tokens}")
    tensors = {**_per_token(processor, text), **media}
    unsupervised = ~torch.tensor([text.supervised])
    return {**tensors, "labels": tensors["input_ids"].masked_fill(unsupervised, IGNORE_INDEX)}


def _process_images(
    sample_id: str, messages: list[Message], processor: ProcessorMixin
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The media tensors of a conversation's images, as the processor makes them, and what it writes for each image."""
    opened = with_images(sample_id, messages)
    images = [block["image"] for message in opened for block in message["content"] if block["type"] == "image"]
    if not images:
        return {}, []
    try:
        own: Mapping[str, Any] = processor(
            images=[images],
            text=[processor.image_token * len(images)],
            images_kwargs={"return_tensors": "pt"},
            return_text_replacement_offsets=True,
        )
    except ValueError as error:  # a shape that the family refuses, such as a line of pixels
        raise RowError(sample_id, "image", str(error), kind_of(error, "image_refused")) from error
    replacements = [change["replacement"] for change in own["text_replacement_offsets"][0]]
    text_keys = {"text_replacement_offsets", "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
    return {key: torch.as_tensor(value) for key, value in own.items() if key not in text_keys}, replacements


@lru_cache(maxsize=8)
def _text_settings(processor: ProcessorMixin) -> dict[str, Any]:
    return dict(processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)["text_kwargs"])


def _per_token(processor: ProcessorMixin, text: EncodedText) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([text.input_ids])
    tensors = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    types = _text_settings(processor).get("return_token_type_ids")
    if types or (types is None and "token_type_ids" in processor.tokenizer.model_input_names):
        tensors["token_type_ids"] = torch.zeros_like(input_ids)
    if processor.return_mm_token_type_ids:
        name = "token_type_ids" if isinstance(processor, RENAMES_TYPES) else "mm_token_type_ids"
        tensors[name] = torch.tensor(processor.create_mm_token_type_ids([text.input_ids]))
    if isinstance(processor, PaliGemmaProcessor):
        # Tokens of type 0 see each other in both directions, so an answer that the loss falls on is of type 1.
        prefix = text.supervised.index(True) if True in text.supervised else len(text.supervised)
        tensors["token_type_ids"] = (torch.arange(len(text.input_ids)) >= prefix).long()[None]
    return tensors


def _check_beginnings(
    sample_id: str, messages: list[Message], processor: ProcessorMixin, replacements: list[str], encoded: EncodedText
) -> None:
    """Refuse an answer whose first white space became one token with what the chat template writes before it.

    That token would be supervised whole, and a prompt never ends inside it.
    """
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and text_of(message)[:1].isspace():
            before = messages[:number]
            images = sum(block["type"] == "image" for earlier in before for block in earlier["content"])
            prompt = _encode_text(sample_id, before, processor, replacements[:images], "all", prompt=True).input_ids
            if encoded.input_ids[: len(prompt)] != prompt:
                detail = "the answer begins with white space that the tokenizer joins to the chat template's; take it out"
                raise RowError(sample_id, f"messages[{number}]", detail, "answer_begins_with_space")


def encode_prompt(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """Encode a conversation that ends with the user, up to where the model's answer begins.

    Returns:
        As `encode_sample`, without labels.

    Raises:
        RowError: naming the row.
    """
    media, replacements = _process_images(sample_id, messages, processor)
    text = _encode_text(sample_id, messages, processor, replacements, "all", prompt=True)
    return {**_per_token(processor, text), **media}


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
