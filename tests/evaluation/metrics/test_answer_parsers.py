"""Parsers against `fixtures/answers.txt`: what a careful reader takes from ordinary and hostile answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mmtune.evaluation.metrics.entries.closed_answers import MULTIPLE_CHOICE, YES_NO, read_letter, read_yes_no
from mmtune.evaluation.metrics.entries.numeric_answers import NUMERIC, read_number
from mmtune.evaluation.metrics.metric import Item

OPTIONS = ("cat", "dog", "bird", "none of these")
READERS: dict[str, Callable[[str], str | float | None]] = {
    "multiple_choice": partial(read_letter, options=OPTIONS),
    "yes_no": read_yes_no,
    "numeric": read_number,
}


def _answers(metric: str) -> list[tuple[str, str]]:
    """The answers of a metric in the file, each with its reading as text."""
    text = (Path(__file__).parent / "fixtures" / "answers.txt").read_text(encoding="utf-8")
    sections = re.findall(rf"^\[{metric} ([^]]+)\]\n(.+?)(?=\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return [
        (answer.strip().replace("\\n", "\n"), reading)
        for reading, lines in sections
        for line in lines.splitlines()
        for answer in line.split(" | ")
    ]


@pytest.mark.parametrize("metric", READERS)
def test_answers_are_read_as_a_careful_reader_does(metric: str) -> None:
    answers = _answers(metric)
    hostile = [reading for _, reading in answers if reading == "unparsed"]
    assert len(hostile) >= 120 and len(answers) - len(hostile) >= 80
    readings = [
        (answer, reading, "unparsed" if (value := READERS[metric](answer)) is None else str(value)) for answer, reading in answers
    ]
    assert [each for each in readings if each[1] != each[2]] == []


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (("A", "O", "B", "AB"), "O", "B"),
        (("A", "O", "B", "AB"), "AB", "D"),
        (("A", "O", "B", "AB"), "A", "A"),
        (("A", "O", "B", "AB"), "D", "D"),
        (("A", "O", "B", "AB"), "B", None),  # the label of O, and the text of option C
        (("A", "O", "B", "AB"), "B. O", "B"),
        (("A", "O", "B", "AB"), "C. B", "C"),
        (("A", "O", "B", "AB"), "B. AB", None),
        (("X", "Y"), "X", "A"),
        (("X", "Y"), "B", "B"),
        (("X", "Y"), "C", None),
        (("*", "+"), "", None),
        (("*", "+"), "*", "A"),
        (("*", "+"), "+", "B"),
        (("*", "+"), "B. +", "B"),
        (("xy", "x*y"), "x*y", "B"),
        (("xy", "x*y"), "xy", "A"),
        (("$5", "$6"), "$5", "A"),
        (("5", "6"), "B. 6", "B"),
        (("5", "6"), "6", "B"),
        ((".", ","), "", None),
        (("no", "yes"), "No.", "A"),
        (("hot dog", "dog"), "(A) hot dog", "A"),
        (("a small brown dog", "a cat"), "A. a small brown", "A"),
        (("It is not a dog", "It is a dog"), "A. It is not a dog.", "A"),
        (("It is not a dog", "It is a dog"), "The answer is (A) It is not a dog.", "A"),
        (tuple(f"opt {n}" for n in range(30)), "opt 28", None),
        (tuple(f"opt {n}" for n in range(26)), "opt 25", "Z"),
        ((), "B. dog", "B"),
        ((), "(B) cat because it purrs", "B"),
        ((), "B) cat", "B"),
        ((), "Q", "Q"),
        ((), "The answer is not B.", None),
        ((), "Hepatitis B.", None),
    ],
)
def test_unusual_options(options: tuple[str, ...], answer: str, letter: str | None) -> None:
    assert read_letter(answer, options) == letter


def test_references_among_unusual_options() -> None:
    blood = {"options": ("A", "O", "B", "AB")}
    assert [MULTIPLE_CHOICE.problem(Item("", (text,), "", blood)) for text in ("O", "B", "AB", "D", "C. B")] == [None] * 5
    assert MULTIPLE_CHOICE.score(Item("O", ("B",), "", blood)) == 1  # a reference that is a label is the label
    assert MULTIPLE_CHOICE.score(Item("B. O", ("O",), "", blood)) == 1
    many = {"options": tuple(f"opt {n}" for n in range(30))}
    assert MULTIPLE_CHOICE.problem(Item("", ("opt 28",), "", many)) == "expected at most 26 options, got 30"
    assert MULTIPLE_CHOICE.score(Item("opt 28", ("A",), "", many)) is None


def test_no_and_a_thing_is_an_answer_to_a_question_about_it() -> None:
    question = {"question": "Is there a brown dog in the image? Answer yes or no."}
    assert [YES_NO.score(Item(text, ("no",), "", question)) for text in ("No dog.", "No brown dogs", "No dog, only a cat")] == [
        1
    ] * 3
    assert [YES_NO.score(Item(text, ("no",), "", question)) for text in ("No comment", "No image", "No answer", "No perro")] == [
        None
    ] * 4
    assert YES_NO.score(Item("No dog", ("no",))) is None


def test_a_sign_counts() -> None:
    assert [NUMERIC.score(Item("- 5", (reference,))) for reference in ("5", "-5")] == [0, 1]
    assert NUMERIC.score(Item("2*3", ("23",))) is None


@pytest.mark.parametrize("metric", READERS)
def test_long_and_odd_text_is_read_in_no_time(metric: str) -> None:
    for text in (
        "A " * 20_000,
        "no " * 20_000,
        "answer is " * 5_000,
        "*_$`" * 5_000,
        "5" * 40_000,
        "5-" * 20_000,
        " " * 40_000 + "5",
        "(" * 20_000,
        "a" * 40_000,
        "the answer " * 5_000 + "?",
    ):
        READERS[metric](text)
