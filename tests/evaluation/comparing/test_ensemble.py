"""The vote of several models: what is one answer, ties, weights, means of probabilities, the gain over the best model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmtune.cli.main import entry_point
from mmtune.evaluation.answers import Answer, score_answers
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.ensemble import vote_of_models
from mmtune.evaluation.metrics.metric_table import METRICS
from mmtune.utils.errors import UserError

OPTIONS = ("a cat", "a dog", "a cow")


def _model(predictions: list[str], metric: str = "multiple_choice", **changes: Any) -> list[Answer]:
    answer = Answer("", None, "Which?", (), ("B",), "", "c", metric, options=OPTIONS, choices=("A", "B", "C"))
    rows = [
        dataclasses.replace(answer, id=f"r{number}", cluster=f"c{number}", prediction=text, **changes)
        for number, text in enumerate(predictions)
    ]
    return score_answers(rows)


def _predictions(*models: list[Answer], how: Any = "majority", weights: tuple[float, ...] = (1, 1, 1)) -> list[str]:
    return [answer.prediction for answer in vote_of_models(models, how, weights).answers]


def test_answers_that_the_metric_reads_as_the_same_are_one_vote() -> None:
    models = [_model(["A", "not sure"]), _model(["(B) a dog", "B"]), _model(["The answer is B", "perhaps C"])]
    assert _predictions(*models) == ["(B) a dog", "B"]  # the earliest of equal answers; unparsed ones have no vote
    vote = vote_of_models(models, "majority", (1, 1, 1))
    assert [answer.score for answer in vote.answers] == [1, 1] and vote.best == 1
    assert vote.gain.tasks[-1].result.first == 1 and vote.gain.tasks[-1].result.difference == 0


def test_of_equal_sums_the_earliest_wins_and_weights_decide() -> None:
    models = [_model(["A"]), _model(["B"]), _model(["C"])]
    assert _predictions(*models) == ["A"]
    assert _predictions(*models, weights=(1, 1, 1.5)) == ["C"]
    assert _predictions(*[_model(["unclear"])] * 3) == ["unclear"]


def test_a_marker_of_one_model_is_used_for_its_answer() -> None:
    models = [_model(["I think. Answer: B"], answer_after="Answer:"), _model(["C"]), _model(["B"])]
    [answer] = vote_of_models(models, "majority", (1, 1, 1)).answers
    assert answer.answer_after == "Answer:" and answer.score == 1


def test_the_references_of_a_vote_are_read_with_the_marker_of_its_answer() -> None:
    references = ("2+3=5 #### 5",)
    models = [
        _model(["#### 4"], "exact_match", references=references, answer_after="####"),
        *[_model(["#### 5"], "exact_match", references=references, answer_after="####")] * 2,
    ]
    models[1] = [dataclasses.replace(each, references=("5",), answer_after=None, prediction="5") for each in models[1]]
    models[2] = models[1]
    [answer] = vote_of_models(models, "majority", (1, 1, 1)).answers
    assert answer.prediction == "5" and answer.score == 1


def test_a_model_against_itself_gains_nothing_on_common_rows() -> None:
    """CIDEr-D of a row depends on the other rows of its file."""
    captions = ["a cat on a mat", "two dogs run", "a red bus", "a man eats", "a tree", "the sea"]
    references = [("a cat sits on a mat", "a cat"), ("dogs running", "two dogs run"), ("a bus", "a red bus")] * 2
    answers = [
        dataclasses.replace(each, references=accepted)
        for each, accepted in zip(_model(captions, "exact_match"), references, strict=True)
    ]
    answers = score_answers([dataclasses.replace(each, metric="cider_d") for each in answers])
    vote = vote_of_models([answers, answers[:3]], "majority", (1, 1))
    assert vote.left_out == 3 and vote.undecided == 0
    assert vote.gain.tasks[-1].result.difference == 0


SAME = {
    "exact_match": ("A cat.", "a  cat"),
    "token_f1": ("the cat", "Cat"),
    "vqa_accuracy": ("Two", "2"),
    "anls": ("A Cat", "a cat"),
    "relaxed_accuracy": ("14", "14.0"),
    "multiple_choice": ("B", "(B) a dog"),
    "mmmu": ("B", "(B)"),
    "yes_no": ("Yes", "Yes, it is."),
    "classification": ("A", "a"),
    "numeric": ("3 cats", "There are 3."),
    "json_fields": ('{"a": 1, "b": 2}', '{"b":2,"a":1}'),
    "iou": ("[1, 2, 3, 4]", "[1,2,3,4.0]"),
    "acc_at_iou_0.5": ("[1, 2, 3, 4]", "[1,2,3,4.0]"),
}
REFERENCE = {
    "yes_no": "yes",
    "numeric": "3",
    "json_fields": '{"a": 1, "b": 2}',
    "iou": "[1, 2, 3, 4]",
    "acc_at_iou_0.5": "[1, 2, 3, 4]",
}
WRONG = {"yes_no": "no", "numeric": "4", "json_fields": '{"a": 7}', "iou": "[9, 9, 10, 10]", "acc_at_iou_0.5": "[9, 9, 10, 10]"}


@pytest.mark.parametrize("metric", METRICS)
def test_two_right_answers_win_against_one_wrong_answer(metric: str) -> None:
    first, second = SAME.get(metric, ("A Cat", "a  cat"))
    wrong = WRONG.get(metric, "C")
    accepted = (
        REFERENCE.get(metric, "B" if metric in ("multiple_choice", "mmmu") else "A" if metric == "classification" else "a cat"),
    )
    models = [_model([text], metric, references=accepted) for text in (wrong, first, second)]
    vote = vote_of_models(models, "majority", (1, 1, 1))
    assert vote.answers[0].prediction == first and vote.undecided == 0


def test_sums_that_are_equal_but_for_rounding_are_a_tie() -> None:
    models = [_model(["A"]), _model(["B"]), _model(["B"])]
    vote = vote_of_models(models, "majority", (0.3, 0.1, 0.2))
    assert vote.answers[0].prediction == "A" and vote.undecided == 1


@pytest.mark.parametrize("scores", [(float("nan"), 0.0, 0.0), (-math.inf, 0.0, 0.0), (0.0, 0.0)])
def test_a_mean_of_scores_that_are_not_finite_is_an_error(scores: tuple[float, ...]) -> None:
    models = [_model(["A"], choice_scores=(0.0, 0.0, 0.0)), _model(["A"], choice_scores=scores)]
    with pytest.raises(UserError, match=r"^row r0 of model 2: choice_scores: expected 3 finite numbers"):
        vote_of_models(models, "mean", (1, 1))


def test_a_mean_of_probabilities_equals_the_closed_form() -> None:
    scores = [(-1.0, -1.2, -9.0), (-1000.0, -1001.0, -1002.0), (-3.0, -0.1, -0.2)]
    models = [_model(["A"], choice_scores=each) for each in scores]
    weights = (2.0, 1.0, 0.5)
    means = [
        sum(
            weight * math.exp(each[choice] - max(each)) / sum(math.exp(s - max(each)) for s in each)
            for weight, each in zip(weights, scores, strict=True)
        )
        for choice in range(3)
    ]
    assert _predictions(*models, how="mean", weights=weights) == ["ABC"[means.index(max(means))]]
    assert _predictions(*models, how="mean", weights=(0.01, 0.01, 1)) == ["B"]
    with pytest.raises(UserError, match=r"^row r0 of model 3: a mean needs the log-likelihoods of choices"):
        _predictions(*models[:2], _model(["A"]), how="mean")


def test_rows_that_are_not_common_or_asked_differently_are_left_out() -> None:
    first, second = _model(["B", "B", "B"]), _model(["B", "B"])
    second[1] = dataclasses.replace(second[1], question="another")
    vote = vote_of_models([first, second], "majority", (1, 1))
    assert [answer.id for answer in vote.answers] == ["r0"] and vote.left_out == 2
    with pytest.raises(UserError, match="no row is asked in the same way"):
        vote_of_models([first, second[1:]], "majority", (1, 1))
    with pytest.raises(UserError, match=r"answers of one metric.*multiple_choice, exact_match"):
        mixed = [*first, *[dataclasses.replace(each, id="x") for each in _model(["B"], "exact_match")]]
        vote_of_models([mixed, mixed], "majority", (1, 1))
    with pytest.raises(UserError, match="human:rating is not a metric of the table"):
        rated = [dataclasses.replace(each, metric="human:rating") for each in first]
        vote_of_models([rated, rated], "majority", (1, 1))


def test_the_best_model_by_an_error_rate_is_the_lowest() -> None:
    models = [_model(["xyz"], "cer", references=("abc",)), _model(["abc"], "cer", references=("abc",))]
    assert vote_of_models(models, "majority", (1, 1)).best == 1


def test_compare_prints_the_vote_and_writes_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for number, predictions in enumerate((["B", "A", "B", "A"], ["B", "B", "A", "A"], ["A", "B", "B", "B"])):
        files.append(str(tmp_path / f"m{number}.jsonl"))
        write_answers(_model(predictions), Path(files[-1]))
    out = tmp_path / "new" / "vote.jsonl"
    assert entry_point(["compare", *files, "--vote", "majority", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"vote of 3 models on 4 rows; the best of them is {files[2]}" in printed
    assert f"vote (majority) against {files[2]}:" in printed
    assert [answer.prediction for answer in read_answers(out)] == ["B", "B", "B", "A"]
    assert entry_point(["compare", *files, "--vote", "majority", "--weights", "1,1,3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["vote"] == {"how": "majority", "weights": [1, 1, 3], "rows": 4, "left_out": 0, "undecided": 0, "best": files[2]}
    last = result["comparisons"][-1]
    assert last["second"] == "vote (majority)" and last["tasks"][-1]["difference"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,2"], "--weights: needs --vote"),
        (["--vote", "majority", "--weights", "1,-2"], "--weights 1,-2: expected 2 positive numbers"),
        (["--vote", "majority", "--weights", "1"], "--weights 1: expected 2 positive numbers"),
        (["--vote", "majority", "--out", "{file}"], "this file holds answers that are compared"),
        (["--vote", "majority", "--out", "vote.csv"], "--out vote.csv: expected a .jsonl file"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    write_answers(_model(["B"]), file)
    filled = [each.format(file=file) for each in arguments]
    assert entry_point(["compare", str(file), str(file), *filled]) == 2
    assert message in capsys.readouterr().err
