"""Metrics of edit distance: ANLS, character error rate, word error rate."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from mmtune.evaluation.metrics.metric import Array, Item, Metric


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Levenshtein distance of two sequences, by the bit-parallel algorithm of Myers (1999) in the form of Hyyrö (2001)."""
    if not first:
        return len(second)
    positions: dict[Hashable, int] = {}
    for index, symbol in enumerate(first):
        positions[symbol] = positions.get(symbol, 0) | 1 << index
    mask, last = (1 << len(first)) - 1, 1 << len(first) - 1
    increases, decreases, distance = mask, 0, len(first)  # vertical differences of the current column
    for symbol in second:
        match = positions.get(symbol, 0)
        diagonal = (((match & increases) + increases) ^ increases) | match | decreases
        up, down = decreases | ~(diagonal | increases), diagonal & increases
        distance += bool(up & last) - bool(down & last)
        up, down = (up << 1 | 1) & mask, down << 1
        increases, decreases = (down | ~(diagonal | up)) & mask, diagonal & up
    return distance


class Anls(Metric):
    """Average normalized Levenshtein similarity: 1 minus the distance over the longer length; 0 where that is below 0.5."""

    def score(self, item: Item) -> float:
        """The best of the references, from 0 to 1."""
        prediction = _normalize_anls(item.prediction)
        return max(_similarity(prediction, _normalize_anls(reference)) for reference in item.references)

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return _normalize_anls(text)


def _normalize_anls(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(prediction: str, reference: str) -> float:
    length = max(len(prediction), len(reference))
    if length == 0:
        return 1.0
    distance = edit_distance(prediction, reference) / length
    return 1 - distance if distance < 0.5 else 0.0


class ErrorRate(Metric):
    """Edits over the length of the reference. The headline number is all edits over all reference lengths.

    Of several references the one with the lowest rate counts.
    """

    split: Callable[[str], Sequence[str]]

    def problem(self, item: Item) -> str | None:
        """A reference of length 0 has no error rate."""
        return None if all(map(self.split, item.references)) else "expected references with text, got an empty one"

    def score(self, item: Item) -> float:
        """At least 0; above 1 if the prediction is longer than the reference."""
        edits, length = self._counts(item)
        return edits / length

    def statistics(self, items: Sequence[Item], scores: Sequence[float | None]) -> Array:
        """Edits and reference lengths: shape (items, 2)."""
        return np.array([self._counts(item) for item in items], dtype=np.float64).reshape(-1, 2)

    def _counts(self, item: Item) -> tuple[int, int]:
        prediction = self.split(item.prediction)
        counts = [(edit_distance(reference, prediction), len(reference)) for reference in map(self.split, item.references)]
        return min(counts, key=lambda count: count[0] / count[1])


class CharacterErrorRate(ErrorRate):
    """Edits of characters; whitespace is collapsed."""

    @staticmethod
    def split(text: str) -> str:
        """The characters, in NFC."""
        return " ".join(unicodedata.normalize("NFC", text).split())


class WordErrorRate(ErrorRate):
    """Edits of words, which whitespace separates."""

    @staticmethod
    def split(text: str) -> list[str]:
        """The words, in NFC."""
        return unicodedata.normalize("NFC", text).split()


ANLS = Anls("anls", "average normalized Levenshtein similarity, threshold 0.5", "ST-VQA and DocVQA (arXiv 1907.00490, eq. 1)")
CER = CharacterErrorRate(
    "cer",
    "character error rate: edits over reference characters",
    "the definition of jiwer",
    greater_is_better=False,
    unparsed_score=1.0,
    has_baseline=False,
)
WER = WordErrorRate(
    "wer",
    "word error rate: edits over reference words",
    "the definition of jiwer",
    greater_is_better=False,
    unparsed_score=1.0,
    has_baseline=False,
)
