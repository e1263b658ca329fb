"""Encoding of one sample to tensors: `input_ids`, `labels` and media, with labels exactly on the assistant's answers.

The chat template is rendered once, with the character span of every answer. The spans are mapped through the expansion of image
placeholders and through the tokenizer's offsets to tokens. No length is estimated by tokenizing a prefix.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from PIL import Image
from transformers import ProcessorMixin

from mmtune.chat_templates.jinja_rendering import ChatTemplateError, Span, Tools, control_tokens
from mmtune.chat_templates.rendering import render_conversation, render_prompt
from mmtune.data.encoding.native_regions import write_native_regions
from mmtune.data.encoding.placeholders import expand_placeholders, tokenize_expanded
from mmtune.data.encoding.token_spans import (
    TokenSpans,
    escape_control_tokens,
    escape_conversation,
    tokenize_escaped,
    unescape_control_tokens,
)
from mmtune.data.media.media import open_image
from mmtune.data.media.resizing import check_resized
from mmtune.data.message import Message, RowError, Sample, all_text_of, is_supervised, prompt_messages, text_message, text_of
from mmtune.data.time_spans import SpanLog
from mmtune.data.validation.issues import issue_type_of
from mmtune.families.family import TextError
from mmtune.families.family_table import family_of_processor
from mmtune.utils.errors import RecipeValueError
from mmtune.utils.transformers_private import processor_call_kwargs

IGNORE_INDEX = -100

CHAT_TEMPLATE_HINT = "set model.chat_template to another one, or to a .jinja file (docs/recipe.md)"

ProcessedImages = tuple[dict[str, torch.Tensor], list[str]]
"""The media tensors of a sample's images, and the text with which each placeholder is replaced."""

Supervise = Literal["all", "last", "without_tool_calls"]
"""The recipe's `data.supervise`: all answers, the last one, or all but those with a tool call. Answers with `"supervised": False`
never are."""


@dataclass(frozen=True)
class EncodedText:
    """A conversation as tokens, including image tokens.

    Attributes:
        input_ids: token ids.
        supervised: for each token, whether the loss includes it.
        media: for each token, whether it belongs to an expanded image placeholder.
        offsets: for each token, its first and past-the-last character in `text`; (0, 0) for tokens added by the tokenizer.
        text: the rendered conversation with expanded image placeholders.
        target_ids: for an encoder-decoder model, the tokens of the decoder: its start token and the answer. `input_ids` are then
            those of the question, which the encoder reads.
    """

    input_ids: list[int]
    supervised: list[bool]
    media: list[bool]
    offsets: list[Span]
    text: str
    target_ids: list[int] = field(default_factory=list)

    def tokens(self) -> list[tuple[int, bool, bool]]:
        """Every token of question and answer, with whether it belongs to an image and whether the loss includes it."""
        question = list(zip(self.input_ids, self.media, self.supervised, strict=True))
        return [*question, *((token, False, index > 0) for index, token in enumerate(self.target_ids))]


def encode_text(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    supervise: Supervise = "all",
    tools: Tools = (),
) -> EncodedText:
    """Encode the text of a whole conversation, for training and for counting.

    Args:
        sample_id: the row's id, for errors.
        messages: the conversation; its images are not opened.
        processor: the model's processor.
        replacements: for each image, the string with which the processor replaces its placeholder.
        supervise: which answers are supervised.
        tools: schemas of the functions that the conversation may call.

    Raises:
        RowError: the conversation cannot be encoded; names the row.
    """
    written = write_native_regions(sample_id, messages, processor)
    return _encode_text(sample_id, written, processor, replacements, supervise, tools, prompt=False)


def _encode_text(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    supervise: Supervise,
    tools: Tools,
    prompt: bool,
) -> EncodedText:
    tokenizer, template = processor.tokenizer, chat_template_of(processor)
    control = control_tokens(tokenizer, template).anywhere
    start = family_of_processor(processor).decoder_start(processor)
    if start is not None and not prompt:
        target = _target_ids(sample_id, messages, processor, supervise, start)
        question = _encode_text(sample_id, messages[:-1], processor, replacements, supervise, tools, prompt=True)
        return replace(question, target_ids=target)
    spans: list[Span] = []
    try:
        template_messages, template_tools, escaped = escape_conversation(
            to_template_messages(sample_id, messages), tools, control
        )
        if prompt:
            text = render_prompt(template_messages, template, tokenizer, template_tools)
        else:
            text, spans = render_conversation(template_messages, template, tokenizer, template_tools)
        rendered = text
        text, spans, media_spans = expand_placeholders(rendered, spans, processor, replacements)
        bos = tokenizer.bos_token  # written by the chat template, or by the family's `mark_text`
        writes_bos = bos is not None and (rendered.startswith(bos) or text.startswith(bos))
        adds_special_tokens = not writes_bos and _text_settings(processor).get("add_special_tokens", True)
        input_ids, offsets = tokenize_expanded(processor, text, media_spans, adds_special_tokens, escaped)
        if escaped:
            text, shifted = unescape_control_tokens(text, [*spans, *media_spans])
            spans, media_spans = shifted[: len(spans)], shifted[len(spans) :]
    except ChatTemplateError as error:
        raise RowError(sample_id, "messages", str(error), "chat_template") from error
    token_spans = TokenSpans(offsets)
    if prompt:
        return EncodedText(input_ids, token_spans.mask([]), token_spans.mask(media_spans), offsets, text)
    crossed = [token_spans.crosses(span) for span in spans]
    _check_answer_edges(sample_id, messages, processor, replacements, input_ids, crossed, tools)
    is_supervised_answer = _supervised_answers(messages, supervise)
    if is_supervised_answer and not any(is_supervised_answer):
        reason = {
            "all": "every answer has weight 0",
            "last": "the last answer (data.supervise: last) has weight 0",
            "without_tool_calls": "every answer has weight 0 or a tool call (data.supervise: without_tool_calls)",
        }[supervise]
        raise RowError(sample_id, "messages", f"{reason}, so no token is supervised", "nothing_supervised")
    supervised = [span for span, included in zip(spans, is_supervised_answer, strict=True) if included]
    return EncodedText(input_ids, token_spans.mask(supervised), token_spans.mask(media_spans), offsets, text)


def _target_ids(
    sample_id: str, messages: list[Message], processor: ProcessorMixin, supervise: Supervise, start: int
) -> list[int]:
    """The tokens of a decoder: its start token, and the answer as the tokenizer encodes a text, with its end.

    Raises:
        RowError: the conversation does not end with its only supervised answer.
    """
    supervised = _supervised_answers(messages, supervise)
    if messages[-1]["role"] != "assistant" or supervised.count(True) != 1 or not supervised[-1]:
        detail = f"expected one supervised answer, at the end, got {supervised.count(True)} in a conversation that ends with "
        detail += f"{messages[-1]['role']}: the model's decoder writes one answer to what its encoder reads; set data.supervise: "
        detail += "last to make the turns before the last answer a part of the question"
        raise RowError(sample_id, "messages", detail, "several_answers")
    tokenizer, answer = processor.tokenizer, messages[-1]["content"]
    control = control_tokens(tokenizer, chat_template_of(processor)).anywhere
    try:
        escaped = text_of({"role": "assistant", "content": escape_control_tokens(answer, control)})
        ids, _ = tokenize_escaped(tokenizer, escaped, add_special_tokens=True)
    except ChatTemplateError as error:
        raise RowError(sample_id, "messages", str(error), "chat_template") from error
    ids = ids[1:] if ids[0] == start else ids
    return [start, *ids, *([tokenizer.eos_token_id] if ids[-1] != tokenizer.eos_token_id else [])]


def _supervised_answers(messages: list[Message], supervise: Supervise) -> list[bool]:
    """For each answer, whether it is supervised."""
    answers = [message for message in messages if message["role"] == "assistant"]
    supervised = [is_supervised(message) for message in answers]
    if supervise == "last":
        return [False] * (len(answers) - 1) + supervised[-1:]
    if supervise == "without_tool_calls":
        return [included and "tool_calls" not in message for message, included in zip(answers, supervised, strict=True)]
    return supervised


def chat_template_of(processor: ProcessorMixin) -> str:
    """The source text of the processor's chat template.

    Raises:
        UserError: the processor has no chat template.
    """
    template = processor.chat_template or processor.tokenizer.chat_template  # BLIP-2's and Chameleon's processors drop it
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise RecipeValueError("model", "its processor has no chat template; set model.chat_template")
    return template


def to_template_messages(sample_id: str, messages: list[Message]) -> list[Message]:
    """The messages in the form that chat templates read, with a placeholder value for every image.

    Raises:
        RowError: media of a modality that cannot be encoded, or text that is not valid Unicode.
    """
    template_messages = []
    for number, message in enumerate(messages):
        content: list[dict[str, str]] = []
        for block in message["content"]:
            if block["type"] == "text":
                content.append({"type": "text", "text": block["text"]})
            elif block["type"] == "image":
                content.append({"type": "image", "image": "image"})
            else:
                detail = f"expected text or an image, got {block['type']}, which is not supported yet"
                raise RowError(sample_id, f"messages[{number}]", detail, "media_unsupported")
        try:
            all_text_of(message).encode()
        except UnicodeEncodeError as error:
            detail = f"the text is not valid Unicode: {error}"
            raise RowError(sample_id, f"messages[{number}]", detail, "text_not_unicode") from error
        template_messages.append({key: value for key, value in message.items() if key != "supervised"} | {"content": content})
    return template_messages


def open_images(sample_id: str, messages: list[Message]) -> list[Message]:
    """The same messages with every image opened, and resized to the `size` of its block if there is one.

    Raises:
        RowError: an image cannot be opened or decoded; names the row.
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
                if "size" in block:  # set by `data.over_length: shrink_media`
                    image = image.resize(block["size"], Image.Resampling.LANCZOS)
                block = {"type": "image", "image": image}
            content.append(block)
        opened.append({**message, "content": content})
    return opened


def encode_sample(
    sample: Sample,
    processor: ProcessorMixin,
    max_tokens: int | None = None,
    supervise: Supervise = "all",
    spans: SpanLog | None = None,
    images: ProcessedImages | None = None,
) -> dict[str, torch.Tensor]:
    """Encode a whole conversation for training.

    Args:
        sample: the conversation; its images are opened here.
        processor: the model's processor.
        max_tokens: the maximum length, including image tokens.
        supervise: which answers are supervised.
        images: from `process_images`, if they are processed already.

    Returns:
        `input_ids`, `labels` (int64, shape (1, length); -100 where not supervised), `attention_mask`, and the processor's
        media tensors. For an encoder-decoder model also `decoder_input_ids`, to which `labels` then belong: in both cases a
        position predicts the label of the next one.

    Raises:
        RowError: the sample cannot be encoded; `OverLength` if it is too long.
    """
    sample = replace(sample, messages=write_native_regions(sample.id, sample.messages, processor))
    images = images or process_images(sample.id, sample.messages, processor, spans)
    return _encode(sample, processor, images, max_tokens, supervise)


def encode_choices(sample: Sample, processor: ProcessorMixin) -> list[dict[str, torch.Tensor]]:
    """Encode the conversation with each of its candidate answers as the last one. Its images are processed once.

    Returns:
        The tensors of `encode_sample` for each of `sample.choices`, with labels on the last answer only. They share the media.

    Raises:
        RowError: the conversation cannot be encoded; names the row.
    """
    prompt = write_native_regions(sample.id, prompt_messages(sample), processor)
    media = process_images(sample.id, prompt, processor)
    encoded = []
    for choice in sample.choices:
        answer = text_message("assistant", choice)
        encoded.append(_encode(replace(sample, messages=[*prompt, answer]), processor, media, supervise="last"))
    return encoded


def _encode(
    sample: Sample,
    processor: ProcessorMixin,
    images: ProcessedImages,
    max_tokens: int | None = None,
    supervise: Supervise = "all",
) -> dict[str, torch.Tensor]:
    media, replacements = images
    text = _encode_text(sample.id, sample.messages, processor, replacements, supervise, sample.tools, prompt=False)
    length = len(text.input_ids) + len(text.target_ids)
    if max_tokens is not None and length > max_tokens:
        raise over_length_error(sample.id, length, max_tokens)
    tensors = _model_tensors(sample.id, sample.messages, sample.tools, processor, text, media)
    if text.target_ids:
        targets = torch.tensor([text.target_ids])
        labels = targets.masked_fill(torch.arange(targets.shape[1]) == 0, IGNORE_INDEX)
        return {**tensors, "decoder_input_ids": targets, "labels": labels}
    unsupervised = ~torch.tensor([text.supervised])
    return {**tensors, "labels": tensors["input_ids"].masked_fill(unsupervised, IGNORE_INDEX)}


def process_images(
    sample_id: str, messages: list[Message], processor: ProcessorMixin, spans: SpanLog | None = None
) -> ProcessedImages:
    """Open the images of a sample and run the image processor.

    Raises:
        RowError: an image cannot be opened, or is rejected by the processor; names the row.
    """
    with nullcontext() if spans is None else spans.span("decode"):
        opened = open_images(sample_id, messages)
    images = [block["image"] for message in opened for block in message["content"] if block["type"] == "image"]
    if not images:
        return {}, []
    family, name = family_of_processor(processor), type(processor).__name__
    try:
        check_resized(processor, [image.size for image in images])
        return family.process_images(processor, images)
    except ValueError as error:  # for example an image with an extreme aspect ratio
        detail = f"{name} rejects the sample's images: {error}"
        raise RowError(sample_id, "image", detail, "image_refused") from error


@lru_cache(maxsize=8)
def _text_settings(processor: ProcessorMixin) -> dict[str, Any]:
    return dict(processor_call_kwargs(processor)["text_kwargs"])


def _model_tensors(
    sample_id: str,
    messages: list[Message],
    tools: Tools,
    processor: ProcessorMixin,
    text: EncodedText,
    media: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """All tensors of a sample but the labels."""

    def first_prompt() -> str:
        first = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        before = to_template_messages(sample_id, messages[:first])
        return render_prompt(before, chat_template_of(processor), processor.tokenizer, tools)

    try:
        prompt_tensors = family_of_processor(processor).prompt_tensors(processor, first_prompt, media)
    except (ChatTemplateError, TextError) as error:
        raise RowError(sample_id, "messages", str(error), "chat_template") from error
    return {**_per_token(processor, text, media), **media, **prompt_tensors}


def _per_token(processor: ProcessorMixin, text: EncodedText, media: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([text.input_ids])
    tensors = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    types = _text_settings(processor).get("return_token_type_ids")
    if types or (types is None and "token_type_ids" in processor.tokenizer.model_input_names):
        tensors["token_type_ids"] = torch.zeros_like(input_ids)
    family = family_of_processor(processor)
    if processor.return_mm_token_type_ids:
        tensors[family.media_types_key] = torch.tensor(processor.create_mm_token_type_ids([text.input_ids]))
    return {**tensors, **family.token_tensors(processor, text.input_ids, text.supervised, media)}


def _check_answer_edges(
    sample_id: str,
    messages: list[Message],
    processor: ProcessorMixin,
    replacements: list[str],
    input_ids: list[int],
    crossed: list[bool],
    tools: Tools,
) -> None:
    """Check that no token contains both a part of an answer and text of the chat template.

    Such a token would be supervised as a whole, and no prompt ends inside it. If an answer starts with white space, the tokens
    of the prompt can depend on the answer, so the prompt is encoded too and compared.

    Raises:
        RowError: an answer shares a token with the chat template.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number, crosses in zip(answers, crossed, strict=True):
        before = messages[:number]
        detail = "the answer shares a token with the text that the chat template writes next to it"
        if text_of(messages[number])[:1].isspace():
            detail = "the answer starts with white space that the tokenizer joins with the chat template's; remove it"
            images = sum(block["type"] == "image" for message in before for block in message["content"])
            prompt = _encode_text(sample_id, before, processor, replacements[:images], "all", tools, prompt=True).input_ids
            crosses = crosses or input_ids[: len(prompt)] != prompt
        if crosses:
            raise RowError(sample_id, f"messages[{number}]", detail, "answer_edge")


def encode_prompt(
    sample_id: str, messages: list[Message], processor: ProcessorMixin, tools: Tools = ()
) -> dict[str, torch.Tensor]:
    """Encode a conversation that ends with a user turn or a tool result as a prompt, up to the start of the model's answer.

    Returns:
        The tensors of `encode_sample`, without labels.

    Raises:
        RowError: the conversation cannot be encoded; names the row.
    """
    messages = write_native_regions(sample_id, messages, processor)
    media, replacements = process_images(sample_id, messages, processor)
    text = _encode_text(sample_id, messages, processor, replacements, "all", tools, prompt=True)
    return _model_tensors(sample_id, messages, tools, processor, text, media)


def encode_prompt_text(
    sample_id: str, messages: list[Message], processor: ProcessorMixin, replacements: list[str], tools: Tools = ()
) -> EncodedText:
    """The text of `encode_prompt` as tokens; `replacements` as in `encode_text`.

    Raises:
        RowError: the conversation cannot be encoded; names the row.
    """
    written = write_native_regions(sample_id, messages, processor)
    return _encode_text(sample_id, written, processor, replacements, "all", tools, prompt=True)


class OverLength(RowError):
    """A sample longer than `data.max_tokens`."""


def over_length_error(row_id: str, tokens: int, max_tokens: int, tried: str = "") -> OverLength:
    """The error of a row with too many tokens; `tried` describes what was not enough to make it fit."""
    return OverLength(row_id, "messages", f"{tokens} tokens, more than data.max_tokens: {max_tokens}{tried}")
