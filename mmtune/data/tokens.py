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
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END as MARK_END
from transformers.utils.chat_template_utils import mark_control_tokens

from mmtune.chat_rendering import MARK_START, NotExact, Span

ADDED: Span = (0, 0)
"""The offsets of a token that the tokenizer adds by itself."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and for each token its first and past-the-last character; (0, 0) for what the tokenizer adds."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_attention_mask=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def spells(text: str, control: re.Pattern[str]) -> bool:
    """Whether a text must be marked: it spells a control token, or holds a character that marks one."""
    return control.search(text) is not None or MARK_START in text or MARK_END in text


def mark(content: list[dict[str, Any]], control: re.Pattern[str]) -> list[dict[str, Any]]:
    """The blocks of a message with every control token that their texts spell marked as text."""
    marked = [
        {**block, "text": mark_control_tokens(block["text"], control)} if block["type"] == "text" else block for block in content
    ]
    for (first, second), block in zip(pairwise(content), marked, strict=False):
        if first["type"] == second["type"] == "text":
            both, border = first["text"] + second["text"], len(first["text"])
            if any(found.start() < border < found.end() for found in control.finditer(both)):
                block["text"] += MARK_END  # keeps the two halves apart
    return marked


@lru_cache(maxsize=8)
def _marked_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    longest_first = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    return re.compile(f"{MARK_START}({'|'.join(map(re.escape, longest_first)) or '(?!)'}){MARK_END}|[{MARK_START}{MARK_END}]")


def unmark(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """The text without its marks, and where spans of the marked one lie in it."""
    marks = [found.start() for found in re.finditer(f"[{MARK_START}{MARK_END}]", text)]
    bare = text.replace(MARK_START, "").replace(MARK_END, "")
    return bare, [(start - bisect_left(marks, start), end - bisect_left(marks, end)) for start, end in spans]


def tokenize_marked(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    """As `tokenize`, for a rendered text with marks. Offsets are those of the text without them.

    All tokens of a marked spelling have the offsets of the whole spelling.

    Raises:
        NotExact: when the tokenizer gives the control token for plain text, so that nothing can tell them apart.
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
            spelt = _after_newline(newline, tokenizer._encode_without_added_tokens("\n" + piece))
            spelt = tokenizer._encode_without_added_tokens(piece) if spelt is None else spelt
            if tokenizer.convert_tokens_to_ids(piece) in spelt:
                raise NotExact(f"the text spells {piece!r}, and the tokenizer has no other way to write that; take it out")
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


class Places:
    """Which tokens stand for which characters."""

    def __init__(self, offsets: list[Span]) -> None:
        self._count = last = len(offsets)
        while last and offsets[last - 1] == ADDED:  # an end of sequence that the tokenizer adds has no characters
            last -= 1
        self._starts = [start for start, _ in offsets[:last]]
        self._ends = [end for _, end in offsets[:last]]

    def of(self, span: Span) -> slice:
        """The tokens that share a character with a span."""
        return slice(bisect_right(self._ends, span[0]), bisect_left(self._starts, span[1]))

    def mask(self, spans: list[Span]) -> list[bool]:
        """For each token, whether it shares a character with any of the spans."""
        inside = [False] * self._count
        for span in spans:
            tokens = self.of(span)
            inside[tokens] = [True] * (tokens.stop - tokens.start)
        return inside

    def crosses(self, span: Span) -> bool:
        """Whether the first token begins before the span, or the last one ends after it."""
        tokens = self.of(span)
        return self._starts[tokens.start] < span[0] or self._ends[tokens.stop - 1] > span[1]
