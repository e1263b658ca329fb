"""Parsers of closed answers: hostile answers are unparsed, never guessed."""

from __future__ import annotations

import pytest

from mmtune.evaluation.metrics.entries.closed_answers import CLASSIFICATION, MULTIPLE_CHOICE, YES_NO, read_letter, read_yes_no
from mmtune.evaluation.metrics.entries.numeric_answers import read_number
from mmtune.evaluation.metrics.metric import Item

OPTIONS = ("cat", "dog", "bird", "none of these")
LONG = "The picture shows many things. " * 2000


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *((text, "B") for text in ("B", "b", "(B)", "b)", "B.", "**B**", "[B]", '"B"', "B. dog", "B) dog", "(B) dog", "B: dog")),
        *((text, "B") for text in ("dog", "Dog.", "Option B", "The answer is B.", "The answer is (B) dog.", "Answer: B")),
        *(
            (text, "B")
            for text in ("option B is correct", "The answer is B because it barks", "I think it is B", f"{LONG}Answer: B")
        ),
        *((text, "B") for text in ("答案是B", "答案\uff1aB", "\uff08B\uff09", "Ответ: B", "La respuesta es B")),
        *(
            (text, "B")
            for text in ("$B$", "\\boxed{B}", "$\\boxed{\\text{B}}$", "Answer: $B", "b. dog", "The correct answer is dog.")
        ),
        *((text, "B") for text in ("The answer is B. Note that A is a common distractor.", "选项 (B) $3.3\\mathrm{MeV}$。")),
        *((text, "D") for text in ("ANSWER: None of these", "D. None of these")),
        *(
            (text, None)
            for text in ("ANSWER: I don't know", "Don't know", "rules out C, leaving D", "It is not B, the answer is D")
        ),
        *((text, "A") for text in ("A", "A. A cat", "The image shows option A: a cat")),
        *((text, None) for text in ("", " ", "No", "There is none", "Not sure", "E", "I", "?", "1", "A cat", LONG)),
        *((text, None) for text in ("A or B", "A, B", "A/B", "(A) and (B)", "Both A and B", "B or maybe C", "A. cat B. dog")),
        *((text, None) for text in ("The answer is not A", "neither A nor B", "not (B)", "It is not B, it is C")),
        *((text, None) for text in ("B. cat", "A. cat, not B. dog", "Perro", "犬", "Which animal is it? A. cat B. dog C. bird")),
    ],
)
def test_the_letter_of_an_option(answer: str, letter: str | None) -> None:
    assert read_letter(answer, OPTIONS) == letter


def test_a_letter_without_options_and_a_text_that_two_options_share() -> None:
    assert read_letter("Q") == "Q" and read_letter("quarter") is None
    assert read_letter("cat", ("cat", "Cat.")) is None
    assert read_letter("D", ("cat", "dog")) is None


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        *((text, "yes") for text in ("yes", "Yes.", "YES!", "**Yes**", "Yes, it has no tail", "A dog? Yes", "Answer: yes")),
        *((text, "no") for text in ("No", "no.", "'no'", "No, there is a cat", "Is it yes? no", "The answer is no.")),
        *((text, "no") for text in ("Is there a dog? No, there is none.", f"No. {LONG}")),
        *(
            (text, None)
            for text in ("", "There is none", "Not sure", "There is no dog", "no one", "No idea", "Nope", "yesterday")
        ),
        *((text, None) for text in ("Yes or no", "yes/no", "Yes and no", "No. Yes.", "No problem, yes", "The answer is not yes")),
        *((text, None) for text in ("Oui", "Ja", "yesterday", "да", "はい", "是", "y", "True", "1", LONG, "Is there a dog?")),
    ],
)
def test_yes_or_no(answer: str, meaning: str | None) -> None:
    assert read_yes_no(answer) == meaning


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *((text, 5.0) for text in ("5", "5.", "5.0", " 5 apples", "+5", "5%", "I count 5", "5 and 5", "5e0", "\uff15")),
        *(("-3", -3.0), ("\u22123", -3.0), ("$1,000", 1000.0), ("1,234,567.5", 1234567.5), ("0", 0.0)),
        *((text, None) for text in ("", "five", "3 of 10", "3 + 4 = 7", "1.2.3", "1,23", "x2", "nan", "inf", "9" * 400, LONG)),
    ],
)
def test_the_only_number_of_an_answer(answer: str, number: float | None) -> None:
    assert read_number(answer) == number


def test_an_unparsed_answer_is_neither_right_nor_wrong() -> None:
    choice = {"options": OPTIONS}
    assert [MULTIPLE_CHOICE.score(Item(text, ("B",), "", choice)) for text in ("dog", "(A)", "A or B")] == [1, 0, None]
    assert [YES_NO.score(Item(text, ("no",))) for text in ("No.", "Yes", "None")] == [1, 0, None]
    labels = {"choices": ("cat", "dog")}
    assert [CLASSIFICATION.score(Item(text, ("dog",), "", labels)) for text in ("Dog.", "cat", "a dog")] == [1, 0, None]


def test_a_reference_that_cannot_be_used_is_named() -> None:
    assert "got 'E'" in str(MULTIPLE_CHOICE.problem(Item("", ("E",), "", {"options": OPTIONS})))
    assert "got 'maybe'" in str(YES_NO.problem(Item("", ("maybe",))))
    assert "got 'bird'" in str(CLASSIFICATION.problem(Item("", ("bird",), "", {"choices": ("cat", "dog")})))
    assert MULTIPLE_CHOICE.problem(Item("", ("dog",), "", {"options": OPTIONS})) is None


def test_precision_recall_and_f1_of_yes_count_unparsed_answers() -> None:
    references, predictions = ["yes", "yes", "yes", "no", "no", "no"], ["yes", "no", "maybe", "yes", "no", "maybe"]
    items = [Item(prediction, (reference,)) for prediction, reference in zip(predictions, references, strict=True)]
    further = YES_NO.further(items, YES_NO.score_all(items))
    assert further == {"precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(2 / 5), "yes_ratio": 2 / 6}
