"""Comparison of single answers, and the causes that need no engine to be shown."""

from __future__ import annotations

from typing import Any

import pytest

from mmtune.data.message import Sample
from mmtune.serving.causes import answers_as_base, find_hidden_cause
from mmtune.serving.engine_client import EngineAnswer
from mmtune.serving.served_question import ServedQuestion
from mmtune.serving.trained_answers import TrainedAnswer


@pytest.mark.parametrize(
    ("trained", "served", "same"),
    [
        ("two dogs", " two dogs\n", True),
        ("一只\ufffd", "一只", True),  # max_new_tokens ends within a character: vLLM 0.32 leaves it out, transformers does not
        ("一\ufffd只", "一只", False),
        ("two dogs", "two dog", False),
    ],
)
def test_an_answer_that_ends_within_a_character(trained: str, served: str, same: bool) -> None:
    sample = Sample(id="a", messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}])
    question = ServedQuestion(sample, TrainedAnswer(trained, 3, [], [], [], []), EngineAnswer(served, 3))
    assert question.same_answer is same


class Answers:
    """A trained model with given answers of its base."""

    has_base = True

    def __init__(self, base: list[str], rounding: float = 0.1) -> None:
        self._base = base
        self._rounding = rounding

    def answers_of_base(self, samples: list[Sample]) -> list[TrainedAnswer]:
        return [answer(self._base[int(sample.id)]) for sample in samples]

    def rounding(self, _: Any) -> float:
        return self._rounding


def answer(text: str) -> TrainedAnswer:
    return TrainedAnswer(text, 3, [], [], [], [])


def questions(trained: list[str], served: list[str]) -> list[ServedQuestion]:
    return [
        ServedQuestion(Sample(str(number), []), answer(ours), EngineAnswer(theirs, 3))
        for number, (ours, theirs) in enumerate(zip(trained, served, strict=True))
    ]


def test_one_answer_that_is_the_bases_is_not_the_base() -> None:
    """One of four answers is the base's by chance; the engine answers the others as trained."""
    base: Any = Answers(["no", "no", "no", "yes"])
    trained = ["yes", "yes", "no", "yes"]
    assert not answers_as_base(base, questions(trained, ["no", "yes", "no", "yes"]))
    assert answers_as_base(base, questions(trained, ["no", "no", "no", "yes"]))
    assert not answers_as_base(Answers(trained), questions(trained, ["no", "yes", "no", "yes"]))  # type: ignore[arg-type]


def test_equal_answers_may_hide_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    trained = ["yes", "no"]
    tuned: Any = Answers(["yes", "yes"], rounding=0.1)
    for difference, cause in ((None, None), (1e-5, None), (0.15, None), (0.25, "the weights: the answers are the same")):
        named = find_hidden_cause(tuned, questions(trained, trained), difference)
        assert named is None if cause is None else str(named).startswith(cause)
    assert capsys.readouterr().out == ""
    untuned: Any = Answers(trained)
    assert find_hidden_cause(untuned, questions(trained, trained), None) is None
    assert "warning: the untuned base gives the same answers" in capsys.readouterr().out


def test_an_answer_of_which_the_engine_took_a_part_is_not_compared() -> None:
    sample = Sample("0", [])
    assert ServedQuestion(sample, answer('<tool_call>{"name": "f"}'), EngineAnswer("f({})", 3, parsed=True)).same_answer
