"""Image placeholders of a rendered conversation: their expansion, and the tokens of the expanded text."""

from __future__ import annotations

import re
from bisect import bisect_right

from transformers import ProcessorMixin

from mmtune.chat_templates.jinja_rendering import ChatTemplateError, Span
from mmtune.data.encoding.token_spans import ADDED, tokenize, tokenize_escaped
from mmtune.families.family import TextError
from mmtune.families.family_table import family_of_processor
from mmtune.utils.transformers_private import ESCAPE_START


def image_tokens(processor: ProcessorMixin) -> tuple[str, ...]:
    """The image placeholder of the chat template, and the token of image features if it is different."""
    tokens = (family_of_processor(processor).placeholder(processor), getattr(processor.tokenizer, "image_token", None))
    return tuple(dict.fromkeys(token for token in tokens if token))


def expand_placeholders(
    text: str, spans: list[Span], processor: ProcessorMixin, replacements: list[str]
) -> tuple[str, list[Span], list[Span]]:
    """Expand the image placeholders: the text, the shifted spans, and the spans of the expanded placeholders.

    Args:
        text: a rendered conversation.
        spans: of its answers.
        processor: the model's processor.
        replacements: for each image, the string with which the processor replaces its placeholder.

    Raises:
        ChatTemplateError: the numbers of placeholders and images differ, or the family needs an image and there is none.
    """
    family = family_of_processor(processor)
    token = family.placeholder(processor)
    placeholder = re.compile(f"(?<!{ESCAPE_START}){re.escape(token)}")
    if family.images_first:
        head = token * len(replacements)
        text, spans = head + text, [(start + len(head), end + len(head)) for start, end in spans]
    image_ends = [match.end() for match in placeholder.finditer(text)]
    if len(image_ends) != len(replacements):
        raise ChatTemplateError(
            f"expected {len(replacements)} image placeholders from the chat template, one for each image, got {len(image_ends)}"
        )
    if family.one_image and len(image_ends) > 1:
        raise ChatTemplateError(f"{type(processor).__name__} takes one image in a conversation, got {len(image_ends)}")
    if family.needs_image and not image_ends:
        raise ChatTemplateError(f"{type(processor).__name__} needs an image in every conversation")
    try:
        text, spans = family.mark_text(processor, text, spans, image_ends)
    except TextError as error:
        raise ChatTemplateError(str(error)) from error
    placeholders = [match.span() for match in placeholder.finditer(text)]
    pieces, media_spans, shifts, last = [], [], [0], 0
    placed = family.replacements_in_text(processor, text, placeholders, replacements)
    for (start, end), replacement in zip(placeholders, placed, strict=True):
        pieces += [text[last:start], replacement]
        media_spans.append((start + shifts[-1], start + shifts[-1] + len(replacement)))
        shifts.append(media_spans[-1][1] - end)
        last = end
    ends = [end for _, end in placeholders]

    def shift(position: int) -> int:
        return position + shifts[bisect_right(ends, position)]

    return "".join([*pieces, text[last:]]), [(shift(start), shift(end)) for start, end in spans], media_spans


def tokenize_expanded(
    processor: ProcessorMixin, text: str, media_spans: list[Span], add_special_tokens: bool, escaped: bool
) -> tuple[list[int], list[Span]]:
    """Token ids of a text from `expand_placeholders`, and their offsets as of `tokenize`.

    Args:
        add_special_tokens: let the tokenizer add special tokens around the text, after images that come first.
        escaped: whether the text has escaped control tokens; offsets are then of the text without escape characters.

    Raises:
        ChatTemplateError: as `tokenize_escaped`.
    """
    tokenizer, repeated = processor.tokenizer, image_tokens(processor)
    head = media_spans[-1][1] if family_of_processor(processor).images_first and media_spans else 0
    ids, offsets = tokenize(tokenizer, text[:head], False, repeated) if head else ([], [])
    if escaped:
        text_ids, text_offsets = tokenize_escaped(tokenizer, text[head:], add_special_tokens)
    else:
        text_ids, text_offsets = tokenize(tokenizer, text[head:], add_special_tokens, repeated)
    first = next((index for index, offset in enumerate(text_offsets) if offset != ADDED), len(text_offsets))
    shifted = [  # a token that is added at the end keeps its offsets
        (start + head, end + head) if (start, end) != ADDED or index < first else ADDED
        for index, (start, end) in enumerate(text_offsets)
    ]
    return ids + text_ids, offsets + (shifted if head else text_offsets)
