"""VQA accuracy: agreement with ten annotators (Antol et al., arXiv 1505.00468; Goyal et al., arXiv 1612.00837)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmtune.evaluation.metrics.metric import Item, Metric

_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've "
    "he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _missing_apostrophe(contraction: str) -> set[str]:
    """A contraction without one of its apostrophes."""
    return {contraction[:index] + contraction[index + 1 :] for index, letter in enumerate(contraction) if letter == "'"}


_SPELLINGS = {wrong: contraction for contraction in _CONTRACTIONS.split() for wrong in _missing_apostrophe(contraction)} | {
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
"""Contractions that annotators write without an apostrophe, to the spelling that the published scorer compares."""
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_NUMBERS |= {"eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
"""The published scorer removes this many periods: it passes a flag where the number of replacements is expected."""


class VqaAccuracy(Metric):
    """The mean over annotators of min(1, annotators among the others who gave this answer / 3).

    Prediction and references are normalized, but only if not all annotators agree, as in the published scorer.
    """

    def problem(self, item: Item) -> str | None:
        """One annotator has no others."""
        number = len(item.references)
        return None if number > 1 else f"expected the answers of several annotators (VQA has ten), got {number}"

    def score(self, item: Item) -> float:
        """From 0 to 1."""
        prediction, references = _one_line(item.prediction), [_one_line(reference) for reference in item.references]
        if len(set(references)) > 1:
            prediction, references = normalize_vqa(prediction), [normalize_vqa(reference) for reference in references]
        return _agreement(prediction, references)

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return normalize_vqa(_one_line(text))


class TextVqaAccuracy(VqaAccuracy):
    """The same mean, after a normalization that always applies and also parts a possessive `'s`."""

    def score(self, item: Item) -> float:
        """From 0 to 1."""
        return _agreement(normalize_textvqa(item.prediction), list(map(normalize_textvqa, item.references)))

    def normalize_class(self, text: str) -> str:
        """The text as it is compared."""
        return normalize_textvqa(text)


def _agreement(prediction: str, references: Sequence[str]) -> float:
    matches = references.count(prediction)
    others = (matches - (reference == prediction) for reference in references)
    return sum(min(1.0, count / 3) for count in others) / len(references)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_vqa(text: str) -> str:
    """The normalization of VQA's evaluation: punctuation, case, numbers to ten, articles, contractions."""
    joined = text
    for mark in _PUNCTUATION:
        removed = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        joined = joined.replace(mark, "" if removed else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", joined, count=_MAX_PERIODS).lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_textvqa(text: str) -> str:
    """The normalization of TextVQA's evaluation: `normalize_vqa` of the text in lower case, without commas and question marks."""
    return normalize_vqa(_one_line(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()))


VQA_ACCURACY = VqaAccuracy(
    "vqa_accuracy",
    "agreement with the annotators, at least three of whom count as right",
    "VQA v2's evaluation code (arXiv 1612.00837)",
)
TEXTVQA_ACCURACY = TextVqaAccuracy(
    "textvqa_accuracy",
    "agreement with the annotators, as `vqa_accuracy`, always normalized",
    "TextVQA's evaluator in MMF (arXiv 1904.08920)",
)
