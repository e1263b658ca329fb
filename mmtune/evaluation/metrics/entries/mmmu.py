"""MMMU's accuracy (Yue et al., arXiv 2311.16502): the letter of an option, or an open answer that contains the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from string import ascii_uppercase as LETTERS

from mmtune.evaluation.metrics.metric import Item, Metric

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words after which a sentence states its answer."""
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Numbers with thousands separators, in scientific notation, and others."""
_LONG = 5
"""An answer of more words than this also names an option by its text."""


class Mmmu(Metric):
    """A question with `options` is multiple choice, any other one is open."""

    def problem(self, item: Item) -> str | None:
        """The reference of a multiple-choice question must be the letter of an option."""
        letters = LETTERS[: len(item.texts("options"))]
        wrong = [reference for reference in item.references if letters and reference not in tuple(letters)]
        return f"expected the letter of an option ({letters}) as reference, got {wrong[0][:80]!r}" if wrong else None

    def score(self, item: Item) -> float | None:
        """1 or 0; None for an answer to a multiple-choice question that names no option."""
        if options := item.texts("options"):
            letter = read_mmmu_letter(item.prediction, options)
            return None if letter is None else float(letter in item.references)
        stated = [value for text in _statements(item.prediction) for value in _values(text)]
        accepted = [value for reference in item.references for value in _values(reference)]
        return float(any(map(_agrees(accepted), stated)))

    def answer_class(self, item: Item) -> str:
        """The letter of the option; of an open question the text."""
        options = item.texts("options")
        return str(read_mmmu_letter(item.prediction, options)) if options else super().answer_class(item)


def read_mmmu_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names last: as `(B)`; else as the word `B`; else, in a long answer, by the option's text.

    None where it names none; MMMU's code then draws a letter at random.
    """
    for mark in _MARKS:
        answer = answer.strip(mark)
    text = f" {answer} "
    letters = LETTERS[: len(options)]
    searched = [(text, [f"({letter})" for letter in letters]), (text, [f" {letter} " for letter in letters])]
    if len(text.split()) > _LONG:
        searched.append((text.lower(), [option.lower() for option in options]))
    for place, forms in searched:
        positions = [place.rfind(form) for form in forms]
        if max(positions) >= 0:
            return letters[positions.index(max(positions))]
    return None


def _statements(answer: str) -> list[str]:
    """For each line the shortest text after an indicator, or the whole answer if there is none; and the numbers in them."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for line in lines:
        indicators = _INDICATORS if line is not lines[-1] else (*_INDICATORS, "=")
        shortest = ""
        for indicator in indicators:
            tail = line.rpartition(indicator)[2].strip()
            if indicator in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _MARKS:
            parts.append(shortest)
    parts = parts or [text]
    return parts + [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]


def _values(text: str) -> list[str | float]:
    """A number, rounded to two digits; or a text in lower case, and a single character with the space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _agrees(accepted: Sequence[str | float]) -> Callable[[str | float], bool]:
    """Whether a stated text contains an accepted one, or a stated number is an accepted one."""
    texts = [value for value in accepted if isinstance(value, str)]
    return lambda value: any(text in value for text in texts) if isinstance(value, str) else value in accepted


MMMU = Mmmu(
    "mmmu",
    "the letter of an option, or an open answer that contains the reference or its number",
    "MMMU's evaluation code (arXiv 2311.16502)",
    unparsed="names no option of a multiple-choice question",
    proportion=True,
)
