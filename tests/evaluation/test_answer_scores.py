"""Scores of answers against scipy and hand counts; answers that are similar but not equal."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from mmtune.evaluation.answers import Answer, final_answer, group_scores, score_answers
from mmtune.evaluation.metrics.answer_text import normalize
from mmtune.evaluation.metrics.entries.text_match import EXACT_MATCH
from mmtune.evaluation.metrics.intervals import wilson_interval
from mmtune.evaluation.metrics.metric import Item


def exact_match(prediction: str, reference: str) -> bool:
    return EXACT_MATCH.score(Item(prediction, (reference,))) == 1


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 600), (600, 600), (1, 600), (299, 600), (513, 600), (7, 10)])
def test_the_interval_equals_scipys_wilson_interval(correct: int, total: int, confidence: float) -> None:
    expected = binomtest(correct, total).proportion_ci(confidence_level=confidence, method="wilson")
    low, high = wilson_interval(correct, total, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / total <= high <= 1


def test_metrics_without_questions() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert all(wilson_interval(0, total)[0] == 0 and wilson_interval(total, total)[1] == 1 for total in range(1, 100))
    assert group_scores([]) == [] == score_answers([])


@pytest.mark.parametrize("prediction", ["yes", "Yes", "YES.", " yes\n", "yes .", "y" + "e" + "s.", "\tyes"])
def test_exact_match_ignores_case_whitespace_and_a_full_stop(prediction: str) -> None:
    assert exact_match(prediction, "yes") and exact_match("yes", prediction)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("no", "yes"),
        ("not yes", "yes"),
        ("yes and no", "yes"),
        ("yesterday", "yes"),
        ("y es", "yes"),
        ("", "yes"),
        (".", "yes"),
        ("12", "1"),
        ("1", "12"),
        ("1 2", "12"),
        ("1.5", "15"),
        ("-1", "1"),
        ("1", "one"),
        ("yes..", "yes"),
        ("yes!", "yes"),
        ("top left", "left top"),
        ("None", "no"),
    ],
)
def test_another_answer_is_wrong(prediction: str, reference: str) -> None:
    assert not exact_match(prediction, reference)


def test_runs_of_space_are_one() -> None:
    assert normalize("  Top \n\t LEFT. ") == "top left"
    assert exact_match("STRASSE", "straße")
    assert exact_match("cafe\u0301", "caf\u00e9") and exact_match("CAF\u00c9", "cafe\u0301")


@pytest.mark.parametrize(
    ("text", "marker", "answer"),
    [
        ("1 2 3 4. Answer: yes", "Answer:", "yes"),
        ("Answer: yes. Answer: no ", "Answer:", "no"),
        ("yes", "Answer:", None),
        ("Answer:", "Answer:", ""),
        ("1 2 3 4. answer: yes", "Answer:", None),
        (" 1 Answer: 2 ", None, "1 Answer: 2"),
        ("", "Answer:", None),
    ],
)
def test_the_conclusion_of_an_answer(text: str, marker: str | None, answer: str | None) -> None:
    assert final_answer(text, marker) == answer


def _answers(references: list[str], tasks: list[str | None]) -> list[Answer]:
    rows = enumerate(zip(references, tasks, strict=True))
    return [Answer(str(n), task, "?", (), (text,), "?", str(n), "exact_match") for n, (text, task) in rows]


def test_the_majority_class_baseline_is_counted_per_task() -> None:
    references = ["yes", "no", "Yes.", "2", "3", "3", "2", "1"]
    by_task = group_scores(_answers(references, [*["presence"] * 3, *["count"] * 5]))
    assert [(score.task, score.baseline) for score in by_task] == [
        ("presence", 2 / 3),
        ("count", 2 / 5),
        ("overall", (2 + 2) / 8),
    ]
    assert [score.baseline for score in group_scores(_answers(references, [None] * 8))] == [2 / 8]
    assert group_scores(_answers(["a", "b"], ["x", None]))[-1].baseline == 1
