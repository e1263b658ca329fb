"""Metrics of captions, on Penn Treebank tokens: CIDEr-D, BLEU and ROUGE-L, as in pycocoevalcap."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmtune.evaluation.metrics.metric import Array, Item, Metric
from mmtune.evaluation.metrics.ptb_tokenizer import ptb_tokens

MAX_N = 4
SIGMA = 6.0
"""Standard deviation of CIDEr-D's penalty for a different length, in bigrams."""

BETA = 1.2
"""Weight of recall against precision in ROUGE-L."""

NGrams = tuple[Counter[tuple[str, ...]], ...]


def _words(text: str) -> list[str]:
    # The scorers split at every white space; a token can contain a no-break space.
    return " ".join(ptb_tokens(text)).split()


def _ngrams(words: Sequence[str]) -> NGrams:
    """Counts of the n-grams of each length from 1 to `MAX_N`."""
    return tuple(Counter(zip(*(words[shift:] for shift in range(n)), strict=False)) for n in range(1, MAX_N + 1))


class CiderD(Metric):
    """CIDEr-D: cosine of TF-IDF weighted n-grams, clipped, with a penalty for length (Vedantam et al., arXiv 1411.5726).

    The document frequencies are those of the references of all rows that are scored together (a source), so the score of
    one answer depends on the others; a single row scores 0.
    """

    def score_all(self, items: Sequence[Item]) -> list[float | None]:
        """From 0 to 10 for each answer."""
        references = [[_ngrams(_words(reference)) for reference in item.references] for item in items]
        frequencies: Counter[tuple[str, ...]] = Counter()
        for captions in references:
            frequencies.update({ngram for caption in captions for counts in caption for ngram in counts})
        documents = math.log(len(items)) if items else 0.0
        return [
            self._similarity(_ngrams(_words(item.prediction)), captions, frequencies, documents)
            for item, captions in zip(items, references, strict=True)
        ]

    def _similarity(
        self, prediction: NGrams, references: Sequence[NGrams], frequencies: Counter[tuple[str, ...]], documents: float
    ) -> float:
        def weighted(caption: NGrams) -> list[dict[tuple[str, ...], float]]:
            return [{gram: n * (documents - math.log(max(1, frequencies[gram]))) for gram, n in c.items()} for c in caption]

        def norm(vector: dict[tuple[str, ...], float]) -> float:
            return math.sqrt(sum(value * value for value in vector.values()))

        predicted, total = weighted(prediction), 0.0
        for reference in references:
            penalty = math.exp(-((prediction[1].total() - reference[1].total()) ** 2) / (2 * SIGMA**2))
            for own, other in zip(predicted, weighted(reference), strict=True):
                product = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
                norms = norm(own) * norm(other)
                total += penalty * product / (norms or 1.0)
        return 10 * total / MAX_N / len(references)


class Bleu(Metric):
    """BLEU-4 of all captions together, with the closest reference length (Papineni et al., 2002, P02-1040).

    An answer's score is BLEU-4 of it alone. The headline number is computed from the sums over all answers; it is not the mean.
    """

    def score(self, item: Item) -> float:
        """From 0 to 1."""
        return float(self.headline(np.array(self._counts(item), dtype=np.float64)))

    def statistics(self, items: Sequence[Item], scores: Sequence[float | None]) -> Array:
        """Matching and all n-grams for n from 1 to 4, length, and closest reference length: shape (items, 10)."""
        return np.array([self._counts(item) for item in items], dtype=np.float64).reshape(-1, 2 * MAX_N + 2)

    def headline(self, sums: Array) -> Array:
        """BLEU-4."""
        return self._bleu(sums, MAX_N)

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`bleu_1` to `bleu_3`."""
        sums = self.statistics(items, scores).sum(axis=0)
        return {f"bleu_{n}": float(self._bleu(sums, n)) for n in range(1, MAX_N)}

    @staticmethod
    def _bleu(sums: Array, order: int) -> Array:
        # The constants of pycocoevalcap, which avoid a division by 0.
        precisions = (sums[..., :order] + 1e-15) / (sums[..., MAX_N : MAX_N + order] + 1e-9)
        lengths = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
        return precisions.prod(axis=-1) ** (1 / order) * np.where(lengths < 1, np.exp(1 - 1 / np.minimum(lengths, 1)), 1.0)

    @staticmethod
    def _counts(item: Item) -> list[int]:
        words, references = _words(item.prediction), [_words(reference) for reference in item.references]
        counts, most = _ngrams(words), [_ngrams(reference) for reference in references]
        matches = []
        for n in range(MAX_N):
            allowed: Counter[tuple[str, ...]] = Counter()
            for caption in most:
                allowed |= caption[n]
            matches.append((counts[n] & allowed).total())
        closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
        return [*matches, *(max(0, len(words) - n) for n in range(MAX_N)), len(words), closest]


class RougeL(Metric):
    """ROUGE-L: F of the longest common subsequence, recall weighted (Lin, 2004, W04-1013).

    Precision and recall are each the best of the references, as in pycocoevalcap.
    """

    def score(self, item: Item) -> float:
        """From 0 to 1."""
        # A caption without tokens is one empty word, as `"".split(" ")` gives it to the published scorer.
        words = ptb_tokens(item.prediction) or ("",)
        references = [ptb_tokens(reference) or ("",) for reference in item.references]
        common = [_common_subsequence(words, reference) for reference in references]
        precision = max(common) / len(words)
        recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
        return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if max(common) else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the bit-parallel algorithm of Hyyrö (2004)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    mask = row = (1 << len(first)) - 1
    for word in second:
        match = row & positions.get(word, 0)
        row = ((row + match) | (row - match)) & mask
    return len(first) - row.bit_count()


CIDER_D = CiderD(
    "cider_d",
    "consensus of a caption with the references, TF-IDF weighted n-grams",
    "pycocoevalcap (arXiv 1411.5726)",
    percent=False,
    has_baseline=False,
)
BLEU = Bleu("bleu", "BLEU-4 of all captions; also BLEU-1 to 3", "pycocoevalcap (P02-1040)", has_baseline=False)
ROUGE_L = RougeL(
    "rouge_l", "longest common subsequence of a caption and a reference", "pycocoevalcap (W04-1013)", has_baseline=False
)
