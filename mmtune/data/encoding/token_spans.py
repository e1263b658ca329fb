"""Text to token ids with the characters that each stands for; control tokens that a text spells stay text.

Text that spells `<image>` or an end of turn would be taken for the real one. Its spelling is put between two private
characters before the chat template is rendered, and encoded apart from the rest: letters, and no control token. The ids are
those of transformers' `apply_chat_template(..., sanitize_control_tokens=True)`, which gives no offsets.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from mmtune.chat_templates.rendering import ChatTemplateError, Span
from mmtune.utils.transformers_private import ESCAPE_END, ESCAPE_START, encode_without_added_tokens

ADDED: Span = (0, 0)
"""The offsets of a token that the tokenizer adds by itself."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool, repeated: tuple[str, ...] = ()
) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and for each token its first and past-the-last character; (0, 0) for what the tokenizer adds.

    Args:
        tokenizer: one of the tokenizers library, which alone gives offsets.
        text: what to encode.
        add_special_tokens: let the tokenizer put its beginning and end around the text.
        repeated: added tokens that stand many times in a row. A tokenizer cuts added tokens out first, so that a run of one is
            encoded as one, and then repeated.
    """
    runs = [(found.start(), found.end()) for found in _runs(tokenizer, len(tokenizer), repeated).finditer(text)]
    tokens = {run: next(token for token in repeated if text.startswith(token, run[0])) for run in runs}
    short, places, last = "", [], 0
    for start, stop in runs:
        short += text[last:start]
        places.append(len(short))
        short += tokens[start, stop]
        last = stop
    encoded = tokenizer(
        short + text[last:], add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_attention_mask=False
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not runs:
        return ids, offsets
    all_ids: list[int] = []
    all_offsets: list[Span] = []
    done = moved = 0
    for (start, stop), place in zip(runs, places, strict=True):
        size = len(tokens[start, stop])
        at = bisect_left(offsets, place, lo=done, key=_start)
        if at == len(offsets) or offsets[at] != (place, place + size):
            return tokenize(tokenizer, text, add_special_tokens)  # a token that takes white space beside it along
        all_ids += ids[done:at] + [ids[at]] * ((stop - start) // size)
        all_offsets += _move(offsets[done:at], moved)
        all_offsets += zip(range(start, stop, size), range(start + size, stop + size, size), strict=True)
        done, moved = at + 1, stop - place - size
    return all_ids + ids[done:], all_offsets + _move(offsets[done:], moved)


@lru_cache(maxsize=8)
def _runs(tokenizer: PreTrainedTokenizerBase, size: int, repeated: tuple[str, ...]) -> re.Pattern[str]:
    added = tokenizer.added_tokens_encoder
    return re.compile("|".join(f"(?:{re.escape(token)}){{2,}}" for token in repeated if token in added) or "(?!)")


def _start(span: Span) -> int:
    return span[0]


def _end(span: Span) -> int:
    return span[1]


def _move(offsets: list[Span], by: int) -> list[Span]:
    return [(start + by, end + by) if end else ADDED for start, end in offsets] if by else offsets


def has_control_tokens(text: str, control: re.Pattern[str]) -> bool:
    """Whether a text must be marked: it spells a control token, or holds a character that marks one."""
    return control.search(text) is not None or ESCAPE_START in text or ESCAPE_END in text


def escape_control_tokens(content: list[dict[str, Any]], control: re.Pattern[str]) -> list[dict[str, Any]]:
    """The blocks of a message with every control token that their texts spell marked as text."""
    marked = [
        {**block, "text": mark_control_tokens(block["text"], control)} if block["type"] == "text" else block for block in content
    ]
    for (first, second), block in zip(pairwise(content), marked, strict=False):
        if first["type"] == second["type"] == "text":
            both, border = first["text"] + second["text"], len(first["text"])
            if any(found.start() < border < found.end() for found in control.finditer(both)):
                block["text"] += ESCAPE_END  # keeps the two halves apart
    return marked


@lru_cache(maxsize=8)
def _marked_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    longest_first = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    return re.compile(
        f"{ESCAPE_START}({'|'.join(map(re.escape, longest_first)) or '(?!)'}){ESCAPE_END}|[{ESCAPE_START}{ESCAPE_END}]"
    )


def unescape_control_tokens(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """The text without its marks, and where spans of the marked one lie in it."""
    marks = [found.start() for found in re.finditer(f"[{ESCAPE_START}{ESCAPE_END}]", text)]
    bare = text.replace(ESCAPE_START, "").replace(ESCAPE_END, "")
    return bare, [(start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in spans]


def tokenize_escaped(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    """As `tokenize`, for a rendered text with marks. Offsets are those of the text without them.

    All tokens of a marked spelling have the offsets of the whole spelling.

    Raises:
        ChatTemplateError: when the tokenizer gives the control token for plain text, so that nothing can tell them apart.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids: list[int] = []
    offsets: list[Span] = []
    place = 0
    parts = _marked_tokens(tokenizer, len(tokenizer)).split(text)  # text, a spelling or None, text, ...
    for number, piece in enumerate(parts):
        if not piece:
            continue
        if number % 2:
            spelt = _after_newline(newline, encode_without_added_tokens(tokenizer, "\n" + piece))
            spelt = encode_without_added_tokens(tokenizer, piece) if spelt is None else spelt
            if tokenizer.convert_tokens_to_ids(piece) in spelt:
                raise ChatTemplateError(
                    f"the text spells {piece!r}, and the tokenizer has no other way to write that; take it out"
                )
            ids += spelt
            offsets += [(place, place + len(piece))] * len(spelt)
        else:
            found, at = tokenize(tokenizer, "\n" + piece if number else piece, add_special_tokens=False)
            rest, back = (_after_newline(newline, found), 1) if number else (found, 0)
            if rest is None:
                (rest, at), back = tokenize(tokenizer, piece, add_special_tokens=False), 0
            ids += rest
            offsets += [(place + start - back, place + end - back) for start, end in at[len(at) - len(rest) :]]
        place += len(piece)
    if not add_special_tokens:
        return ids, offsets
    around = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    before = around["special_tokens_mask"].index(0)
    after = around["special_tokens_mask"][::-1].index(0)
    added = around["input_ids"]
    return [*added[:before], *ids, *added[len(added) - after :]], [*[ADDED] * before, *offsets, *[ADDED] * after]


def _after_newline(newline: list[int], ids: list[int]) -> list[int] | None:
    """What follows a leading newline, which keeps SentencePiece from adding a space; None if it became one with the rest."""
    return ids[len(newline) :] if ids[: len(newline)] == newline else None


class TokenSpans:
    """Which tokens stand for which characters."""

    def __init__(self, offsets: list[Span]) -> None:
        self._offsets = offsets
        self._last = len(offsets)
        while self._last and offsets[self._last - 1] == ADDED:  # an end of sequence that the tokenizer adds has no characters
            self._last -= 1

    def of(self, span: Span) -> slice:
        """The tokens that share a character with a span."""
        first = bisect_right(self._offsets, span[0], hi=self._last, key=_end)
        return slice(first, bisect_left(self._offsets, span[1], lo=first, hi=self._last, key=_start))

    def mask(self, spans: list[Span]) -> list[bool]:
        """For each token, whether it shares a character with any of the spans."""
        inside = [False] * len(self._offsets)
        for span in spans:
            tokens = self.of(span)
            inside[tokens] = [True] * (tokens.stop - tokens.start)
        return inside

    def crosses(self, span: Span) -> bool:
        """Whether the first token begins before the span, or the last one ends after it."""
        tokens = self.of(span)
        return self._offsets[tokens.start][0] < span[0] or self._offsets[tokens.stop - 1][1] > span[1]
