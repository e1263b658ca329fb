"""Exact match, and the token F1 of SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmtune.evaluation.metrics.answer_text import normalize
from mmtune.evaluation.metrics.metric import Item, Metric

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_squad(answer: str) -> str:
    """SQuAD's normalization: lower case, without ASCII punctuation and the articles a, an, the, whitespace collapsed."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


class ExactMatch(Metric):
    """1 if the prediction equals a reference after `normalize`."""

    def score(self, item: Item) -> float:
        """1 or 0."""
        return float(normalize(item.prediction) in map(normalize, item.references))

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return normalize(text)


class TokenF1(Metric):
    """F1 over the words that prediction and reference share, the best of all references; two texts without words are equal."""

    def score(self, item: Item) -> float:
        """From 0 to 1."""
        prediction = normalize_squad(item.prediction).split()
        return max(_token_f1(prediction, normalize_squad(reference).split()) for reference in item.references)

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`exact_match`: the share of predictions that equal a reference after SQuAD's normalization."""
        equal = [normalize_squad(item.prediction) in map(normalize_squad, item.references) for item in items]
        return {"exact_match": sum(equal) / len(equal)} if equal else {}

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return normalize_squad(text)


def _token_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))


EXACT_MATCH = ExactMatch(
    "exact_match",
    "the answer equals a reference, case, whitespace and a final full stop aside",
    "defined by mmtune",
    proportion=True,
)
TOKEN_F1 = TokenF1("token_f1", "F1 over words, the best of the references", "SQuAD (arXiv 1606.05250, 1806.03822)")
