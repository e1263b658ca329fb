"""Tokenization with character offsets, and escaping of control tokens in the text of rows.

A control token in a row's text, such as `<image>` or an end of turn, must not become the real token. It is escaped between two
private characters before the chat template is rendered, and then encoded as ordinary text. The token ids are those of
transformers' `apply_chat_template(..., sanitize_control_tokens=True)`, which does not return offsets.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from mmtune.chat_templates.jinja_rendering import ChatTemplateError, Messages, Span, Tools
from mmtune.utils.transformers_private import ESCAPE_END, ESCAPE_START, encode_without_added_tokens

ADDED: Span = (0, 0)
"""The offsets of a token that the tokenizer adds."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, repeated: tuple[str, ...] = ()
) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and for each token its first and past-the-last character; (0, 0) for added special tokens.

    Args:
        tokenizer: a fast tokenizer, because only these return offsets.
        text: the text to encode.
        add_special_tokens: let the tokenizer add special tokens around the text.
        repeated: added tokens that are repeated many times. Tokenizers split at added tokens first, so that a run of one token
            is encoded as a single token and then repeated, which is faster.
    """
    runs = [match.span() for match in _runs(tokenizer, len(tokenizer), repeated).finditer(text)]
    tokens = {run: next(token for token in repeated if text.startswith(token, run[0])) for run in runs}
    shortened, positions, last = "", [], 0
    for start, stop in runs:
        shortened += text[last:start]
        positions.append(len(shortened))
        shortened += tokens[start, stop]
        last = stop
    encoded = tokenizer(
        shortened + text[last:], add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_attention_mask=False
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not runs:
        return ids, offsets
    all_ids: list[int] = []
    all_offsets: list[Span] = []
    done = shift = 0
    for (start, stop), position in zip(runs, positions, strict=True):
        size = len(tokens[start, stop])
        index = bisect_left(offsets, position, lo=done, key=itemgetter(0))
        if index == len(offsets) or offsets[index] != (position, position + size):
            return tokenize(tokenizer, text, add_special_tokens)  # the token includes white space next to it
        all_ids += ids[done:index] + [ids[index]] * ((stop - start) // size)
        all_offsets += _shift(offsets[done:index], shift)
        all_offsets += zip(range(start, stop, size), range(start + size, stop + size, size), strict=True)
        done, shift = index + 1, stop - position - size
    return all_ids + ids[done:], all_offsets + _shift(offsets[done:], shift)


@lru_cache(maxsize=8)
def _runs(tokenizer: PreTrainedTokenizerBase, size: int, repeated: tuple[str, ...]) -> re.Pattern[str]:
    added = tokenizer.added_tokens_encoder
    return re.compile("|".join(f"(?:{re.escape(token)}){{2,}}" for token in repeated if token in added) or "(?!)")


def _shift(offsets: list[Span], by: int) -> list[Span]:
    return [(start + by, end + by) if end else ADDED for start, end in offsets] if by else offsets


def has_control_tokens(text: str, control: re.Pattern[str]) -> bool:
    """Whether a text must be escaped: it contains a control token or one of the escape characters."""
    return control.search(text) is not None or ESCAPE_START in text or ESCAPE_END in text


def escape_control_tokens(content: list[dict[str, Any]], control: re.Pattern[str]) -> list[dict[str, Any]]:
    """The blocks of a message with every control token in their texts escaped."""
    escaped = [
        {**block, "text": mark_control_tokens(block["text"], control)} if block["type"] == "text" else block for block in content
    ]
    for (first, second), block in zip(pairwise(content), escaped, strict=False):
        if first["type"] == second["type"] == "text":
            both, border = first["text"] + second["text"], len(first["text"])
            if any(match.start() < border < match.end() for match in control.finditer(both)):
                block["text"] += ESCAPE_END  # separates the two halves of a control token
    return escaped


def escape_conversation(messages: Messages, tools: Tools, control: re.Pattern[str]) -> tuple[Messages, Tools, bool]:
    """Messages and function schemas with every control token in their texts escaped, and whether there was one.

    Raises:
        ChatTemplateError: a key of an object in a tool call or schema has a control token; only values can be escaped.
    """
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    if key := next((key for key in _keys_within([calls, tools]) if control.search(key)), None):
        raise ChatTemplateError(f"the key {key[:80]!r} of a tool call or schema contains a control token; rename it")
    values = [[value for key, value in message.items() if key not in ("role", "content")] for message in messages]
    contents = ["".join(block["text"] for block in message["content"] if block["type"] == "text") for message in messages]
    if not any(has_control_tokens(text, control) for text in _texts_within([contents, values, tools])):
        return messages, tools, False
    escaped = []
    for message in messages:
        others = {key: mark_control_tokens(value, control) for key, value in message.items() if key not in ("role", "content")}
        escaped.append({**message, **others, "content": escape_control_tokens(message["content"], control)})
    return escaped, mark_control_tokens(list(tools), control), True


def _texts_within(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_within(list(value.values()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts_within(item)


def _keys_within(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from map(str, value)
        yield from _keys_within(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _keys_within(item)


@lru_cache(maxsize=8)
def _escaped_token_pattern(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    longest_first = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    return re.compile(
        f"{ESCAPE_START}({'|'.join(map(re.escape, longest_first)) or '(?!)'}){ESCAPE_END}|[{ESCAPE_START}{ESCAPE_END}]"
    )


def unescape_control_tokens(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """Remove the escape characters from a text, and shift spans accordingly."""
    positions = [match.start() for match in re.finditer(f"[{ESCAPE_START}{ESCAPE_END}]", text)]
    unescaped = text.replace(ESCAPE_START, "").replace(ESCAPE_END, "")
    return unescaped, [(start - bisect_left(positions, start), end - bisect_left(positions, end)) for start, end in spans]


def tokenize_escaped(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    """Like `tokenize`, for a rendered text with escaped control tokens. Offsets are of the text without escape characters.

    All tokens of an escaped control token have the offsets of its whole text.

    Raises:
        ChatTemplateError: the tokenizer has no other encoding of the text than the control token.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids: list[int] = []
    offsets: list[Span] = []
    position = 0
    parts = _escaped_token_pattern(tokenizer, len(tokenizer)).split(text)  # text, control token or None, text, ...
    for number, piece in enumerate(parts):
        if not piece:
            continue
        if number % 2:
            text_ids = _after_newline(newline, encode_without_added_tokens(tokenizer, "\n" + piece))
            text_ids = encode_without_added_tokens(tokenizer, piece) if text_ids is None else text_ids
            if tokenizer.convert_tokens_to_ids(piece) in text_ids:
                raise ChatTemplateError(
                    f"the text contains {piece!r}, which the tokenizer can only encode as a control token; remove it"
                )
            ids += text_ids
            offsets += [(position, position + len(piece))] * len(text_ids)
        else:
            with_newline, spans = tokenize(tokenizer, "\n" + piece if number else piece, add_special_tokens=False)
            piece_ids, added = (_after_newline(newline, with_newline), 1) if number else (with_newline, 0)
            if piece_ids is None:
                (piece_ids, spans), added = tokenize(tokenizer, piece, add_special_tokens=False), 0
            ids += piece_ids
            spans = spans[len(spans) - len(piece_ids) :]
            offsets += [(position + start - added, position + end - added) for start, end in spans]
        position += len(piece)
    if not add_special_tokens:
        return ids, offsets
    example = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    before = example["special_tokens_mask"].index(0)
    after = example["special_tokens_mask"][::-1].index(0)
    special = example["input_ids"]
    return [*special[:before], *ids, *special[len(special) - after :]], [*[ADDED] * before, *offsets, *[ADDED] * after]


def _after_newline(newline: list[int], ids: list[int]) -> list[int] | None:
    """The ids after a leading newline, which prevents SentencePiece from adding a space; None if a token includes the newline."""
    return ids[len(newline) :] if ids[: len(newline)] == newline else None


class TokenSpans:
    """Maps character spans to tokens."""

    def __init__(self, offsets: list[Span]) -> None:
        self._offsets = offsets
        self._last = len(offsets)
        while self._last and offsets[self._last - 1] == ADDED:  # an added end-of-sequence token has no characters
            self._last -= 1

    def of(self, span: Span) -> slice:
        """The tokens that overlap a character span."""
        first = bisect_right(self._offsets, span[0], hi=self._last, key=itemgetter(1))
        return slice(first, bisect_left(self._offsets, span[1], lo=first, hi=self._last, key=itemgetter(0)))

    def mask(self, spans: list[Span]) -> list[bool]:
        """For each token, whether it overlaps any of the character spans."""
        inside = [False] * len(self._offsets)
        for span in spans:
            tokens = self.of(span)
            inside[tokens] = [True] * (tokens.stop - tokens.start)
        return inside

    def crosses(self, span: Span) -> bool:
        """Whether the first token starts before the span, or the last token ends after it."""
        tokens = self.of(span)
        return self._offsets[tokens.start][0] < span[0] or self._offsets[tokens.stop - 1][1] > span[1]
