"""Metrics of numbers: ChartQA's relaxed accuracy, and equality of numbers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import dropwhile, pairwise
from typing import Any

from mmtune.evaluation.metrics.answer_text import DENIAL, HEDGE, IGNORANCE, RETRACTION, is_question, plain, sentences
from mmtune.evaluation.metrics.metric import Item, Metric

RELAXED_TOLERANCE = 0.05
_LETTER = r"[^\W\d_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # of scripts with spaces between words: 有5只狗 has the number 5
_NAME = re.compile(rf"(?<!\w){_LETTER}+[-_]?\d(?:{_LETTER}|[\d_-])*")  # COVID-19
_RUN = re.compile(r"(?:\d|[.,](?=\d))+(?:[eE][-+]?\d+)?")
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?")
_SIGNED = re.compile(r"(?:(?:^|[(\[{:=])\s*[$€£¥]?\s*[-+]\s*|\s[$€£¥]?[-+])[$€£¥]?$")
_OPERATOR = re.compile(r"(?:[-+]\s*[$€£¥]?\s*|[._^*/\u00d7÷√±])$")
_UNIT = r"(?:kg|mg|g|km|cm|mm|ft|in|lbs?|oz|mph|px|ml|kcal|kWh?|[kMG]?Hz|[MGT]B|ms|yrs?)\b"
_NOT_AFTER = re.compile(
    rf"(?!{_UNIT}){_LETTER}|[_^*/\u00d7÷√+‰]|-(?:[A-Z]\b|\W|$)|\s*(?:[kKM]|bn|mn|mln|Mio|Mrd|тыс|млн)\b|\s*[万萬億亿千百兆半]"
)
_OPERATION = re.compile(r"\s*(?:[-+*/\u00d7÷^:·,x}{'\"]+|of|by|out of|to|over)?\s*")
_INEXACT = re.compile(
    r"(?<!\w)(?:(?:(?:(?:hundred|thousand|million|billion|trillion)(?:th)?|dozen|half|halve|third|quarter|pair)s?"
    r"|mil|mille|millones|milhões|millionen|miljoen|twice|double|squared|cubed|factorial|times|plus"
    r"|divided by|log|ln|sqrt|root|sum of"
    r"|(?:more|less|fewer|greater|larger|smaller|higher|lower) than|at (?:least|most)|(?:min|max)imum of|up to"
    r"|or (?:more|less|fewer|so|higher|lower))(?!\w)"
    r"|(?:over|under|above|below) \S?\d|\d+ [ap]\.?m(?!\w))|[<>≤≥]|\\(?:d?frac|sqrt)|以上|以下|以内",
    re.IGNORECASE,
)
_BULLET = re.compile(r"-\s+\S+\s+\w")  # - 12 apples: a list, or a negative number
_NUMERALS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WORDS = {word: float(number) for number, word in enumerate(_NUMERALS, start=2)}


class RelaxedAccuracy(Metric):
    """A number within 5% of the reference; other answers must be equal, case aside.

    `12%` is the number 0.12, as in the published scorer. A reference of 0 is compared as text.
    """

    def score(self, item: Item) -> float:
        """1 or 0; the best of the references."""
        return float(any(_relaxed_match(item.prediction, reference) for reference in item.references))

    def answer_class(self, item: Item) -> str:
        """The number, or the text."""
        number = _as_number(item.prediction)
        return super().answer_class(item) if number is None else repr(number)


def _relaxed_match(prediction: str, reference: str) -> bool:
    predicted, expected = _as_number(prediction), _as_number(reference)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= RELAXED_TOLERANCE
    return prediction.lower() == reference.lower()


def _as_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


class Numeric(Metric):
    """The number in the answer equals the number in a reference, up to rounding errors of floating point."""

    def problem(self, item: Item) -> str | None:
        """Every reference must have exactly one number."""
        wrong = [reference for reference in item.references if read_number(reference) is None]
        return f"expected one number in every reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None if the answer has no number, or several different ones."""
        number = read_number(item.prediction)
        if number is None:
            return None
        return float(any(_equal(number, read_number(reference)) for reference in item.references))

    def further(self, items: Sequence[Item], scores: Sequence[float | None]) -> dict[str, Any]:
        """`within_5_percent`: the share of all answers within 5% of a reference; `mean_absolute_error` of the parsed answers."""
        errors, close = [], 0
        for item in items:
            number, expected = read_number(item.prediction), [read_number(reference) for reference in item.references]
            differences = [(abs(number - each), abs(each)) for each in expected if number is not None and each is not None]
            if differences:
                errors.append(min(difference for difference, _ in differences))
                close += any(difference <= RELAXED_TOLERANCE * size for difference, size in differences)
        numbers: dict[str, Any] = {"within_5_percent": close / len(items)} if items else {}
        return numbers | ({"mean_absolute_error": math.fsum(errors) / len(errors)} if errors else {})

    def normalize_class(self, text: str) -> str:
        """The number."""
        return repr(read_number(text))


def read_number(text: str) -> float | None:
    """The only number in a text; None if it has none, several, or one that is denied, doubted, a bound or in arithmetic.

    A comma separates groups of three digits. `1.5e3` is a number. A sign or dash in front counts. Digits in a name, as in
    COVID-19, and numbers in a question are not read.
    """
    text = plain(text).replace("{,}", ",")
    numbers = set[float | None]()
    for sentence in dropwhile(is_question, sentences(text)):
        digits = _NAME.sub(" ", re.sub(r"\b(?:minus|negative)\s+(?=[\d.])", "-", sentence))
        if any(map(str.isdigit, digits)):
            open_words = any(words.search(sentence) for words in (DENIAL, HEDGE, _INEXACT))
            numbers |= {None} if open_words or is_question(sentence) or _BULLET.match(sentence) else _numbers_of(digits)
    number = numbers.pop() if len(numbers) == 1 and not (IGNORANCE.search(text) or RETRACTION.search(text)) else None
    return number if number is not None and math.isfinite(number) else None


def _numbers_of(sentence: str) -> set[float | None]:
    """The numbers of a sentence, and None for what has digits and is not one number."""
    runs = [*_RUN.finditer(sentence)]
    numbers: set[float | None] = {_WORDS[word] for word in re.findall(r"\w+", sentence.lower()) if word in _WORDS}
    if any(unicodedata.category(each) == "No" for each in sentence):  # 10², 2½
        numbers.add(None)
    if any(_OPERATION.fullmatch(sentence, one.end(), other.start()) for one, other in pairwise(runs)):
        numbers.add(None)
    for run in runs:
        sign = _sign(sentence, run.start())
        whole = _NUMBER.fullmatch(run[0]) and not _NOT_AFTER.match(sentence, run.end())
        numbers.add(sign * float(run[0].replace(",", "")) if whole and sign else None)
    return numbers


def _sign(sentence: str, start: int) -> int | None:
    """1 or -1, from the text before a number; None after an operator, and if a dash may separate or join: `Total - 5`, `3-5`."""
    window = max(0, start - 9), start
    if match := _SIGNED.search(sentence, *window):
        return -1 if "-" in match[0] else 1
    return None if _OPERATOR.search(sentence, *window) else 1


def _equal(number: float, reference: float | None) -> bool:
    return reference is not None and math.isclose(number, reference, rel_tol=1e-9, abs_tol=1e-12)


RELAXED_ACCURACY = RelaxedAccuracy(
    "relaxed_accuracy",
    "a number within 5% of the reference, or an equal text",
    "ChartQA (arXiv 2203.10244, section 5.1)",
    proportion=True,
)
NUMERIC = Numeric(
    "numeric",
    "the number in the answer equals the reference",
    "defined by mmtune",
    unparsed="has no number, several different ones, or one that is denied, doubted, a bound or in arithmetic",
    proportion=True,
    units={"mean_absolute_error": "over the parsed answers"},
)
