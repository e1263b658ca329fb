"""`mmtune score`, metrics that are functions of the user, and the metric that a data template names."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.templates.template import load_data_template, shipped_templates
from mmtune.evaluation.answers import Answer, group_scores, score_answers, score_metrics
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.evaluate import check_questions, unanswered
from mmtune.evaluation.metrics.metric import Item
from mmtune.evaluation.metrics.metric_table import METRICS, find_metric
from mmtune.recipe.recipe import EvaluateSection
from mmtune.utils.errors import UserError

LINES = [
    {"prediction": "Yes", "references": ["yes"], "task": "a"},
    {"prediction": "No", "references": ["yes"], "task": "b", "cluster": "image 1"},
    {"prediction": "maybe", "references": ["no"], "task": "b", "cluster": "image 1", "id": "third"},
]


def _write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_answers_made_elsewhere_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path / "answers.jsonl", LINES)
    assert entry_point(["score", str(path), "--metric", "yes_no", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [(row["task"], row["score"], row["unparsed"], row["clusters"]) for row in result["scores"]] == [
        ("a", 1, 0, 1),
        ("b", 0, 1, 1),
        ("overall", pytest.approx(1 / 3), 1, 2),
    ]
    assert result["answers"][1:] == [
        {"id": "2", "score": 0, "parsed": True},
        {"id": "third", "score": 0, "parsed": False},
    ]
    assert "Held-out yes_no" in captured.err and "recall 50.0%" in captured.err and "tuned" not in captured.err


def test_faulty_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = [
        {"prediction": "yes"},
        [1],
        {"references": ["yes"]},
        {"prediction": "yes", "references": "yes"},
        {"prediction": "yes", "references": []},
        "\n",
        {"prediction": "yes", "references": ["yes"], "options": [1]},
        {"prediction": "yes", "references": ["perhaps"]},
        {"prediction": 5, "references": ["yes"]},
        {"prediction": "", "references": ["yes"], "cluster": [1]},
        "{\n",
    ]
    path = _write(tmp_path / "answers.jsonl", faulty)
    assert entry_point(["score", str(path), "--metric", "yes_no"]) == 2
    errors = capsys.readouterr().err.splitlines()
    expected = [
        f"error: {path}:1: references: expected a list of texts, got no such key; the line has prediction",
        f"{path}:2: expected a JSON object, got list",
        f"{path}:3: prediction: expected a text, got no such key",
        f'{path}:4: references: expected a list of texts, got "yes"; write ["yes"]',
        f"{path}:5: references: expected a list of texts, got []",
        f'{path}:7: options: expected a list of texts, got [1]; write ["1"]',
        f"{path}:8: references: expected yes or no as reference, got 'perhaps' (metric yes_no)",
        f"{path}:9: prediction: expected a text, got 5",
        f"{path}:10: cluster: expected a text or an integer, got [1]",
        f"{path}:11: expected a JSON object, got text that is not JSON: ",
    ]
    assert len(errors) == len(expected) and all(map(str.startswith, errors, expected))
    assert entry_point(["score", str(_write(path, [{}] * 12)), "--metric", "yes_no"]) == 2
    assert capsys.readouterr().err.splitlines()[10:] == ["... and 2 more lines"]
    assert entry_point(["score", str(_write(path, ["\n"])), "--metric", "yes_no"]) == 2
    assert capsys.readouterr().err == f"error: {path}: expected one JSON object per line, got no line with text\n"
    path.write_text(json.dumps(LINES[0]), encoding="utf-16")
    for argument, message in {
        path: "expected JSON Lines in UTF-8, got byte 0xff at position 0",
        tmp_path: "expected a file of answers, got a directory",
    }.items():
        assert entry_point(["score", str(argument), "--metric", "yes_no"]) == 2
        assert capsys.readouterr().err == f"error: {argument}: {message}\n"
    (tmp_path / "answers_after.jsonl").touch()
    for argument, message in {
        tmp_path: f"{tmp_path}: expected a file of answers, got a directory; did you mean {tmp_path}/answers_after.jsonl?",
        tmp_path / "answer.jsonl": f"no such file of answers: {tmp_path}/answer.jsonl; did you mean '{path}'?",
    }.items():
        assert entry_point(["score", str(argument), "--metric", "yes_no"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    for text, first in {
        "prediction,references\nyes,yes\n": "prediction,references",
        "[{}]": "[{}]",
        "{\n}": "{",
        "[\n{}\n]": "[",
    }.items():
        path.write_text("\n" + text)
        assert entry_point(["score", str(path), "--metric", "yes_no"]) == 2
        message = f"{path}:2: expected JSON Lines, a JSON object on each line, got '{first}'"
        assert capsys.readouterr().err == f"error: {message}\n"
    assert entry_point(["score", str(path), "--metric", "yesno"]) == 2
    assert capsys.readouterr().err == "error: unknown metric 'yesno'; did you mean 'yes_no'?\n"
    assert entry_point(["score", str(path), "--metric", "mine"]) == 2
    assert "yes_no; one of your own is FILE.py:function or module:function\n" in capsys.readouterr().err


SCORED = {"id": "r", "prediction": "yes", "references": ["yes"], "metric": "yes_no", "score": 1.0, "cluster": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id: expected a text or an integer, got null"),
        ({"id": True}, "id: expected a text or an integer, got true"),
        ({"task": ["x"]}, 'task: expected a text or an integer, got ["x"]'),
        ({"question": 1}, "question: expected a text, got 1"),
        ({"images": "a.png"}, 'images: expected a list of texts, got "a.png"'),
        ({"metric": None}, "metric: expected a text, got null"),
        ({"metric": "yesno"}, "unknown metric 'yesno'; did you mean 'yes_no'?"),
        ({"metric": "mine"}, "unknown metric 'mine'; valid here: acc_at_iou_0.5, "),
        ({"metric": "own.py"}, "unknown metric 'own.py'; a function in a file is FILE.py:function, such as 'own.py:score'"),
        ({"metric": "accuracy"}, "unknown metric 'accuracy'; did you mean 'exact_match'?"),
        ({"metric": "F1"}, "unknown metric 'F1'; did you mean 'token_f1'?"),
        ({"score": None}, "score: expected a finite number, got null"),
        ({"score": "1.0"}, 'score: expected a finite number, got "1.0"'),
        ({"score": True}, "score: expected a finite number, got true"),
        ({"score": float("nan")}, "score: expected a finite number, got NaN"),
        ({"score": 10**400}, "score: expected a finite number, got 1000"),
        ({"score": 0.5}, "score: expected 0 or 1 (metric yes_no), got 0.5"),
        ({"score": 7.0, "metric": "anls"}, "score: expected a number from 0 to 1 (metric anls), got 7"),
        ({"score": -1, "metric": "cer"}, "score: expected a number from 0 to inf (metric cer), got -1"),
        ({"parsed": False}, "score: expected 0, because parsed is false (metric yes_no), got 1"),
        ({"parsed": "no"}, 'parsed: expected true or false, got "no"'),
        ({"sampled": [1]}, "sampled: expected a list of texts, got [1]"),
        ({"choice_scores": ["1"]}, 'choice_scores: expected a list of numbers, got ["1"]'),
        ({"references": ["?"]}, "references: expected yes or no as reference, got '?' (metric yes_no)"),
        ({"id": "first"}, "id: expected another one than in line 1, got 'first' again"),
    ],
)
def test_a_faulty_line_of_scores_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = _write(tmp_path / "answers.jsonl", [{**SCORED, "id": "first"}, {**SCORED, **change}])
    with pytest.raises(UserError) as error:
        read_answers(path)
    assert str(error.value).startswith(f"{path}:2: {message}") and "\n" not in str(error.value)


def test_what_other_programs_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    numbers = {**SCORED, "id": 1, "task": 2, "cluster": 3, "score": 1, "weight": [4], "question": None, "choices": None}
    path.write_text("\ufeff" + json.dumps(numbers) + "\r\n\r\n\n" + json.dumps({**SCORED, "cluster": ""}) + "\n \n", "utf-8")
    first, second = read_answers(path)
    assert (first.id, first.task, first.cluster, first.score, first.question, first.choices) == ("1", "2", "3", 1, "", ())
    assert first.extra == {"weight": [4]} and first.item().fields["weight"] == [4]
    assert second.cluster == "line 4"
    write_answers([first, second], path)
    assert read_answers(path) == [first, second]


def test_rows_without_a_cluster_are_independent(tmp_path: Path) -> None:
    lines = [{"prediction": "x", "references": ["x"], "cluster": cluster} for cluster in (None, "", None, "a", "a")]
    answers = read_answers(_write(tmp_path / "answers.jsonl", lines), METRICS["anls"])
    assert len({answer.cluster for answer in answers}) == 4


def test_the_answers_of_an_evaluation_can_be_scored_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["a cat on a mat", "two dogs in a park", "a red bus", "a man in a hat"]
    answers = [
        Answer(
            f"r{n % 2}",
            None,
            "?",
            (),
            (text,),
            f"So. Answer: {text}",
            str(n),
            "cider_d",
            source="ab"[n // 2],
            answer_after="Answer:",
        )
        for n, text in enumerate(captions)
    ]
    path = tmp_path / "answers.jsonl"
    write_answers(score_answers(answers), path)
    for arguments, expected in {
        (): answers,
        ("--answer-after", ""): [replace(each, answer_after="") for each in answers],
    }.items():
        assert entry_point(["score", str(path), "--metric", "cider_d", "--json", *arguments]) == 0
        scores = [(score["task"], score["score"]) for score in json.loads(capsys.readouterr().out)["scores"]]
        assert scores == [(score.task, score.score) for score in group_scores(score_answers(expected))]
        assert [task for task, _ in scores] == ["a", "b", "overall"]


def test_a_function_of_the_user_is_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def score(prediction, references, row):\n"
        "    return None if not prediction else row['weight'] * (prediction in references)\n"
        "def text(prediction, references, row):\n    return 'good'\n"
        "def not_a_number(prediction, references, row):\n    return float('nan')\n"
        "def too_large(prediction, references, row):\n    return 10**400\n"
        "def faulty(prediction, references, row):\n    return row['wieght']\n"
        "def two_arguments(prediction, references):\n    return 1\n"
        "def numpy_number(prediction, references, row):\n    import numpy\n    return numpy.float32(0.5)\n"
    )
    (tmp_path / "broken.py").write_text("x = 1\nx.y\n")
    lines = [{"prediction": text, "references": ["x"], "weight": 3, "cluster": text} for text in ("x", "y", "")]
    path = _write(tmp_path / "answers.jsonl", lines)
    monkeypatch.chdir(tmp_path)
    assert entry_point(["score", str(path), "--metric", "own_metric.py:score", "--json"]) == 0
    [overall] = json.loads(capsys.readouterr().out)["scores"]
    assert (overall["score"], overall["unparsed"], overall["baseline"]) == (1, 1, None)
    assert find_metric("own_metric.py:numpy_number").score(Item("x", ("x",))) == 0.5
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_metric("own_metric:score").name == "own_metric:score"
    for name, message in {
        "own_metric.py:text": "expected a finite number or None, got 'good' for 'x'",
        "own_metric.py:not_a_number": "expected a finite number or None, got nan",
        "own_metric.py:too_large": "expected a finite number or None, got 1000",
        "own_metric.py:faulty": f"KeyError: 'wieght' ({tmp_path}/own_metric.py:10), for 'x'",
        "own_metric:faulty": f"KeyError: 'wieght' ({tmp_path}/own_metric.py:10), for 'x'",
        "own_metric.py:two_arguments": "expected a function of (prediction, references, row), got one of (prediction, refer",
        "broken.py:score": f"cannot import broken.py: AttributeError: 'int' object has no attribute 'y' ({tmp_path}/broken.py:2)",
        "own_metric.py:scores": "own_metric.py has no function 'scores'; did you mean 'score'?",
        "other_metric.py:score": "no file other_metric.py; the path is relative to the working directory",
        "other_metric:score": "cannot import other_metric: ModuleNotFoundError: No module named 'other_metric'; a file",
    }.items():
        assert entry_point(["score", str(path), "--metric", name]) == 2
        assert f"error: metric {name}: {message}" in capsys.readouterr().err


def test_a_function_with_other_arguments_is_an_error_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "arguments.py").write_text(
        "def two(prediction, references): ...\n"
        "def four(prediction, references, row, more): ...\n"
        "def named(*, prediction, references, row): ...\n"
        "def any_number(*arguments): ...\n"
        "def default(prediction, references, row=None, more=1): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("two", "four", "named"):
        with pytest.raises(
            UserError, match=rf"evaluate\.metric: metric arguments\.py:{name}: expected a function of \(prediction, "
        ):
            check_questions(_section(tmp_path, metric=f"arguments.py:{name}"))
    for name in ("any_number", "default"):
        check_questions(_section(tmp_path, metric=f"arguments.py:{name}"))


def test_every_shipped_template_names_a_metric_of_the_table() -> None:
    named = {name: load_data_template(name).metric for name in shipped_templates()}
    assert {metric for metric in named.values() if metric is not None} <= METRICS.keys()
    assert (named["vqa_v2"], named["docvqa"], named["chartqa"]) == ("vqa_accuracy", "anls", "relaxed_accuracy")


def test_the_page_lists_every_metric() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page.partition("## Metrics")[2].partition("\n## ")[0]
    names = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert sorted(itertools.chain(*names)) == sorted(METRICS)


def _section(folder: Path, **changes: Any) -> EvaluateSection:
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    chart = {"imgname": "a.png", "query": "How much?", "label": "100"}
    _write(folder / "charts.json", [json.dumps([chart, {**chart, "label": "Yes"}])])
    question = {"question": "What?", "image": "a.png", "answers": ["Paris", "paris"], "ucsf_document_id": "d1"}
    _write(folder / "pages.json", [json.dumps({"data": [question]})])
    sources = [{"path": str(folder / f"{name}.json"), "template": t} for name, t in (("charts", "chartqa"), ("pages", "docvqa"))]
    return EvaluateSection.model_validate({"data": sources, **changes})


def test_each_source_is_scored_by_the_metric_of_its_template(tmp_path: Path) -> None:
    section = _section(tmp_path)
    check_questions(section)
    rows = IndexedSamples(section.data)
    questions = [each for index, sample in enumerate(iterate_rows(rows)) for each in unanswered(rows, index, sample, section)]
    assert [(q.metric, q.references) for q in questions] == [
        ("relaxed_accuracy", ("100",)),
        ("relaxed_accuracy", ("Yes",)),
        ("anls", ("Paris", "paris")),
    ]
    texts = ["104", "no", "pari"]
    answers = score_answers([Answer(**{**vars(q), "prediction": text}) for q, text in zip(questions, texts, strict=True)])
    scores = [(s.task, s.metric, s.score) for s in group_scores(answers)]
    assert scores == [
        ("charts.json", "relaxed_accuracy", 0.5),
        ("overall", "relaxed_accuracy", 0.5),
        ("pages.json", "anls", 0.8),
        ("overall", "anls", 0.8),
    ]
    summary = score_metrics([], answers)
    assert "tuned_score" not in summary and len(summary["tuned_scores"]) == 4
    assert {q.metric for q in unanswered(rows, 0, rows[0], _section(tmp_path, metric="anls"))} == {"anls"}


def test_each_source_is_a_data_set_of_its_own() -> None:
    captions = ("a cat on a mat", "two dogs run in a park", "a red bus", "a man in a hat", "a cat on a red chair", "two men")
    answers = [
        Answer(str(n), None, "?", (), (text,), text, str(n), "cider_d", source="ab"[n % 2]) for n, text in enumerate(captions)
    ]
    both = score_answers(answers)
    for source in "ab":
        alone = score_answers([answer for answer in answers if answer.source == source])
        assert [answer.score for answer in both if answer.source == source] == [answer.score for answer in alone]
    assert [answer.score for answer in both] != METRICS["cider_d"].score_all([answer.item() for answer in answers])


@pytest.mark.parametrize("field", ["query", "label"])
def test_a_text_that_cannot_be_written_is_an_error_before_anything_is_generated(tmp_path: Path, field: str) -> None:
    section = _section(tmp_path)
    [first, second] = json.loads((tmp_path / "charts.json").read_text())
    _write(tmp_path / "charts.json", [json.dumps([first, {**second, field: "caf\ud83d"}])])
    where = {"query": 0, "label": 1}[field]
    with pytest.raises(
        UserError, match=rf"charts\.json\[1\]: messages\[{where}\]: expected valid Unicode, got a lone surrogate in '"
    ):
        check_questions(section)


def test_a_metric_that_does_not_fit_the_rows_is_an_error_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"charts\.json\[0\]: references: expected yes or no as reference, got '100'"):
        check_questions(_section(tmp_path, metric="yes_no"))
    with pytest.raises(UserError, match=r"evaluate\.metric: unknown metric 'anl'; did you mean 'anls'\?"):
        check_questions(_section(tmp_path, metric="anl"))


def test_an_unknown_metric_is_named_with_its_line(
    make_recipe: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert entry_point(["recipe", "check", str(tmp_path / "recipe.yaml"), "evaluate.metric=bleuu"]) == 2
    assert "evaluate.metric=bleuu: unknown metric 'bleuu'; did you mean 'bleu'?" in capsys.readouterr().err
    template = tmp_path / "own.yaml"
    template.write_text(Path(shipped_templates()["chartqa"]).read_text().replace("relaxed_accuracy", "os:system"))
    (tmp_path / "rows.json").write_text("[]")
    source = f"evaluate.data=[{{path: {tmp_path / 'rows.json'}, template: {template}}}]"
    assert entry_point(["recipe", "check", str(tmp_path / "recipe.yaml"), source]) == 2
    assert f"{template}: unknown metric 'os:system'" in capsys.readouterr().err
