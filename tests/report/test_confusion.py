"""Confusion matrices of the report."""

from __future__ import annotations

from mmtune.evaluation.answers import Answer
from mmtune.report.confusion import confusion_tables


def test_a_class_that_is_named_other_is_not_counted_with_the_answers_outside_all_classes() -> None:
    answered = [("other", "other"), ("other", "cat"), ("cat", "cat"), ("cat", "dog"), ("cat", "horse"), ("other", "unparsed")]
    answers = [
        Answer(
            f"r[{number}]",
            "t",
            "?",
            (),
            (reference,),
            prediction,
            cluster=str(number),
            metric="exact_match",
            score=float(reference == prediction),
        )
        for number, (reference, prediction) in enumerate(answered)
    ]
    [table] = confusion_tables(answers)
    assert table.columns == ["cat", "other", "(other)"]
    assert table.rows == [("cat", [1, 0, 2]), ("other", [1, 1, 1])]
