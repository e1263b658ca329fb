"""One sample to tensors: `input_ids`, `labels` and media, with labels on the assistant's words and nothing else.

The chat template is rendered once, with the character span of every answer. Spans are carried through the expansion of
image placeholders and through the tokenizer's offsets. No prefix is ever re-tokenized to guess a length.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from transformers import Gemma3nProcessor, Gemma3Processor, PaliGemmaProcessor, ProcessorMixin

from mmtune.chat_templates.rendering import (
    ESCAPE_START,
    ChatTemplateError,
    Span,
    control_tokens,
    render_conversation,
    render_prompt,
)
from mmtune.data.encoding.token_spans import (
    TokenSpans,
    escape_control_tokens,
    has_control_tokens,
    tokenize,
    tokenize_escaped,
    unescape_control_tokens,
)
from mmtune.data.media.media import blank_image, open_image
from mmtune.data.media.resizing import check_resized
from mmtune.data.message import Message, RowError, Sample, is_supervised, text_of
from mmtune.data.validation.issues import issue_type_of
from mmtune.utils.errors import RecipeValueError
from mmtune.utils.transformers_private import processor_call_kwargs

IGNORE_INDEX = -100

OTHER_TEMPLATE = "set model.chat_template to another one, or to a .jinja file (docs/recipe.md)"

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
        supervise: put the loss on all answers, or on the last alone; never on one with `"supervised": False`.

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
    tokenizer, template = processor.tokenizer, chat_template_of(processor)
    control = control_tokens(tokenizer, template).spelled
    shown = to_template_messages(sample_id, messages)
    marked = any(has_control_tokens(text_of(message), control) for message in shown)
    if marked:
        shown = [{**message, "content": escape_control_tokens(message["content"], control)} for message in shown]
    spans: list[Span] = []
    try:
        if prompt:
            text = render_prompt(shown, template, tokenizer)
        else:
            text, spans = render_conversation(shown, template, tokenizer)
        writes_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        text, spans, media_spans = _expand(text, spans, processor, replacements)
        if marked:
            input_ids, offsets = tokenize_escaped(tokenizer, text, not writes_bos)
            text, moved = unescape_control_tokens(text, [*spans, *media_spans])
            spans, media_spans = moved[: len(spans)], moved[len(spans) :]
        else:
            input_ids, offsets = tokenize(tokenizer, text, not writes_bos, image_tokens(processor))
    except ChatTemplateError as error:
        raise RowError(sample_id, "messages", str(error), "chat_template") from error
    places = TokenSpans(offsets)
    if not prompt:
        _check_edges(sample_id, messages, processor, replacements, input_ids, [places.crosses(span) for span in spans])
    in_loss = [] if prompt else _supervised_answers(messages, supervise)
    if in_loss and not any(in_loss):
        which = "every answer" if supervise == "all" else "the last answer, which data.supervise: last takes alone,"
        raise RowError(sample_id, "messages", f"{which} has weight 0, so that nothing trains", "nothing_supervised")
    trained = [span for span, trains in zip(spans, in_loss, strict=not prompt) if trains]
    return EncodedText(input_ids, places.mask(trained), places.mask(media_spans), offsets, text)


def _supervised_answers(messages: list[Message], supervise: Supervise) -> list[bool]:
    """Of each answer, whether the loss falls on it."""
    answers = [is_supervised(message) for message in messages if message["role"] == "assistant"]
    return answers if supervise == "all" else [False] * (len(answers) - 1) + answers[-1:]


def image_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """The token that a chat template writes for an image, and the one that stands for its features, if that is another."""
    tokens = (getattr(processor, "image_token", None), getattr(processor.tokenizer, "image_token", None))
    return tuple(dict.fromkeys(token for token in tokens if token))


def chat_template_of(processor: ProcessorMixin) -> str:
    """The text of the processor's chat template.

    Raises:
        UserError: when there is none.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise RecipeValueError("model", "its processor has no chat template; name one with model.chat_template")
    return template


def to_template_messages(sample_id: str, messages: list[Message]) -> list[Message]:
    """The messages as a chat template sees them: it asks whether a block has an image, and never reads one.

    Raises:
        RowError: media that cannot be encoded, or text that is not valid Unicode.
    """
    shown = []
    for number, message in enumerate(messages):
        content: list[dict[str, str]] = []
        for block in message["content"]:
            if block["type"] == "text":
                content.append({"type": "text", "text": block["text"]})
            elif block["type"] == "image":
                content.append({"type": "image", "image": "image"})
            else:
                detail = f"{block['type']} cannot be encoded yet; text and images can"
                raise RowError(sample_id, f"messages[{number}]", detail, "media_unsupported")
        try:
            text_of(message).encode()
        except UnicodeEncodeError as error:
            told = f"the text is not valid Unicode: {error}"
            raise RowError(sample_id, f"messages[{number}]", told, "text_not_unicode") from error
        shown.append({"role": message["role"], "content": content})
    return shown


def _expand(
    text: str, spans: list[Span], processor: ProcessorMixin, replacements: list[str]
) -> tuple[str, list[Span], list[Span]]:
    """The text with its image placeholders expanded, the spans moved along, and the spans of the expanded placeholders.

    Raises:
        ChatTemplateError: when there are not as many placeholders as images.
    """
    token = getattr(processor, "image_token", None)
    found = [match.end() for match in re.finditer(f"(?<!{ESCAPE_START}){re.escape(token)}", text)] if token else []
    if len(found) != len(replacements):
        raise ChatTemplateError(f"the chat template writes {len(found)} image placeholders for {len(replacements)} images")
    if isinstance(processor, PaliGemmaProcessor):
        if not found:
            raise ChatTemplateError("PaliGemma's processor takes no conversation without an image")
        # It writes the beginning of the sequence after the last image, and a newline at the end: of a prompt, the newline before
        # the answer, which the model then does not have to write.
        last, bos = found[-1], processor.tokenizer.bos_token
        spans = [(start + text.startswith("\n", start), end) for start, end in spans]
        text = f"{text[:last]}{bos}{text[last:]}\n"
        spans = [(start + len(bos) * (start >= last), end + len(bos) * (end > last)) for start, end in spans]
    if not replacements:
        return text, spans, []
    texts, [changes] = processor.get_text_with_replacements([text], replacements)
    ends = [change["span"][1] for change in changes]
    gained = [0, *(change["new_span"][1] - change["span"][1] for change in changes)]

    def moved(position: int) -> int:
        return int(position + gained[bisect_right(ends, position)])

    return texts[0], [(moved(start), moved(end)) for start, end in spans], [change["new_span"] for change in changes]


def open_images(sample_id: str, messages: list[Message]) -> list[Message]:
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
                    raise RowError(sample_id, "image", str(error), issue_type_of(error)) from error
                if "size" in block:  # `data.over_length: shrink_media` asks for it
                    image = image.resize(block["size"], Image.Resampling.LANCZOS)
                block = {"type": "image", "image": image}
            content.append(block)
        opened.append({**message, "content": content})
    return opened


def encode_sample(
    sample: Sample, processor: ProcessorMixin, max_tokens: int | None = None, supervise: Supervise = "all"
) -> dict[str, torch.Tensor]:
    """Encode a whole conversation for training.

    Args:
        sample: the conversation; its images are opened here.
        processor: the model's processor.
        max_tokens: refuse a longer sample, image tokens counted.
        supervise: put the loss on all answers, or on the last alone; never on one with `"supervised": False`.

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
        raise over_length_error(sample.id, length, max_tokens)
    tensors = {**_per_token(processor, text), **media}
    unsupervised = ~torch.tensor([text.supervised])
    return {**tensors, "labels": tensors["input_ids"].masked_fill(unsupervised, IGNORE_INDEX)}


def _process_images(
    sample_id: str, messages: list[Message], processor: ProcessorMixin
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The media tensors of a conversation's images, as the processor makes them, and what it writes for each image."""
    opened = open_images(sample_id, messages)
    images = [block["image"] for message in opened for block in message["content"] if block["type"] == "image"]
    if not images:
        return {}, []
    name = type(processor).__name__
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise RecipeValueError(
            "model", f"{name} does not tell what it writes for an image, so its samples cannot be encoded exactly"
        )
    try:
        check_resized(processor, [image.size for image in images])
        own: Mapping[str, Any] = processor(
            images=[images],
            text=[processor.image_token * len(images)],
            images_kwargs={"return_tensors": "pt"},
            return_text_replacement_offsets=True,
        )
    except ValueError as error:  # an image that is too long and narrow for it, for one
        told = f"{name} refuses the sample's images: {error}"
        raise RowError(sample_id, "image", told, "image_refused") from error
    replacements = [change["replacement"] for change in own["text_replacement_offsets"][0]]
    text_keys = {"text_replacement_offsets", "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}
    return {key: torch.as_tensor(value) for key, value in own.items() if key not in text_keys}, replacements


@lru_cache(maxsize=8)
def _text_settings(processor: ProcessorMixin) -> dict[str, Any]:
    return dict(processor_call_kwargs(processor)["text_kwargs"])


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


def _check_edges(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    input_ids: list[int],
    crossed: list[bool],
) -> None:
    """Refuse an answer whose edge became one token with what the chat template writes beside it.

    That token would be supervised whole, and a prompt never ends inside it. Where white space meets white space, how the
    prompt is split can depend on what follows, so the prompt of such an answer is encoded too and compared.
    """
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number, crosses in zip(spoken, crossed, strict=True):
        before = messages[:number]
        detail = "a token of the answer takes in what the chat template writes beside it"
        if text_of(messages[number])[:1].isspace():
            detail = "the answer begins with white space that the tokenizer joins to the chat template's; take it out"
            images = sum(block["type"] == "image" for message in before for block in message["content"])
            prompt = _encode_text(sample_id, before, processor, replacements[:images], "all", prompt=True).input_ids
            crosses = crosses or input_ids[: len(prompt)] != prompt
        if crosses:
            raise RowError(sample_id, f"messages[{number}]", detail, "answer_edge")


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
    # PaliGemma's processor takes nothing without an image.
    shown = [{"type": "image", "image": blank_image()}] * isinstance(processor, PaliGemmaProcessor)
    for word in ("yes", "no"):
        messages: list[Message] = [
            {"role": "user", "content": [*shown, {"type": "text", "text": "Is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": word}]},
        ]
        try:
            labels = encode_sample(Sample("chat template", messages), processor)["labels"]
        except RowError as error:
            raise RecipeValueError(
                "model", f"the chat template gives no exact labels: {error.detail}; {OTHER_TEMPLATE}"
            ) from error
        span = labels[labels != IGNORE_INDEX].tolist()
        text, end = processor.tokenizer.decode(span[:-1]), processor.tokenizer.decode(span[-1:])
        if text.strip() != word:
            raise RecipeValueError(
                "model",
                f"the chat template supervises {text + end!r} for the answer {word!r}; right is the answer and one token "
                f"that ends it; {OTHER_TEMPLATE}",
            )


class OverLength(RowError):
    """A sample longer than `data.max_tokens`."""


def over_length_error(row_id: str, tokens: int, max_tokens: int, tried: str = "") -> OverLength:
    """The error of a row with so many tokens; `tried` says what did not make it fit."""
    return OverLength(row_id, "messages", f"{tokens} tokens, more than data.max_tokens: {max_tokens}{tried}")
