"""Text to token ids with the characters that each stands for."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from transformers import PreTrainedTokenizerBase

from mmtune.chat_rendering import Span


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
    """Token ids of a text, and for each token its first and past-the-last character; (0, 0) for what the tokenizer adds."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, return_attention_mask=False)
    return encoded["input_ids"], encoded["offset_mapping"]


class Places:
    """Which tokens stand for which characters."""

    def __init__(self, offsets: list[Span]) -> None:
        last = len(offsets)
        while last and offsets[last - 1] == (0, 0):  # an end of sequence that the tokenizer adds has no characters
            last -= 1
        self._starts = [start for start, _ in offsets[:last]]
        self._ends = [end for _, end in offsets[:last]]

    def of(self, span: Span) -> range:
        """Positions of the tokens that share a character with a span."""
        return range(bisect_right(self._ends, span[0]), bisect_left(self._starts, span[1]))

    def crosses(self, span: Span) -> bool:
        """Whether the first token begins before the span, or the last one ends after it."""
        tokens = self.of(span)
        return bool(tokens) and (self._starts[tokens[0]] < span[0] or self._ends[tokens[-1]] > span[1])
