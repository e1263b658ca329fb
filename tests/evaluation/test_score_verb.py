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
from mmtune.evaluation.answers import Answer, group_scores, read_items, score_answers, score_metrics, write_answers
from mmtune.evaluation.evaluate import check_questions, unanswered
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
        "{\n",
        [1],
        {"references": ["yes"]},
        {"prediction": "yes", "references": "yes"},
        {"prediction": "yes", "references": []},
        "\n",
        {"prediction": "yes", "references": ["yes"], "options": [1]},
        {"prediction": "yes", "references": ["perhaps"]},
    ]
    path = _write(tmp_path / "answers.jsonl", faulty)
    assert entry_point(["score", str(path), "--metric", "yes_no"]) == 2
    errors = capsys.readouterr().err.splitlines()
    expected = [
        f"error: {path}:1: expected a JSON object, got text that is not JSON: ",
        f"{path}:2: expected a JSON object, got list",
        f"{path}:3: prediction: expected a text, got no such key",
        f'{path}:4: references: expected a list of texts, got "yes"',
        f"{path}:5: references: expected a list of texts, got []",
        f"{path}:7: options: expected a list of texts, got [1]",
        f"{path}:8: references: expected yes or no as reference, got 'perhaps' (metric yes_no)",
    ]
    assert len(errors) == len(expected) and all(map(str.startswith, errors, expected))
    assert entry_point(["score", str(_write(path, ["x\n"] * 12)), "--metric", "yes_no"]) == 2
    assert capsys.readouterr().err.splitlines()[10:] == ["... and 2 more lines"]
    assert entry_point(["score", str(_write(path, ["\n"])), "--metric", "yes_no"]) == 2
    assert "got an empty file" in capsys.readouterr().err
    path.write_bytes(b"\xff\xfe")
    for argument in (path, tmp_path, tmp_path / "missing.jsonl"):
        assert entry_point(["score", str(argument), "--metric", "yes_no"]) == 2
        assert "expected JSON Lines in UTF-8" in capsys.readouterr().err
    assert entry_point(["score", str(path), "--metric", "yesno"]) == 2
    assert capsys.readouterr().err == "error: unknown metric 'yesno'; did you mean 'yes_no'?\n"


def test_the_answers_of_an_evaluation_can_be_scored_again(tmp_path: Path) -> None:
    answers = [Answer("r", None, "?", ("a.png",), ("A",), "Answer: cat", "a.png", "multiple_choice", options=("cat", "dog"))]
    write_answers(answers, tmp_path / "answers.jsonl")
    [item] = read_items(tmp_path / "answers.jsonl", METRICS["multiple_choice"], "Answer:")
    assert METRICS["multiple_choice"].score(item) == score_answers([replace(answers[0], answer_after="Answer:")])[0].score == 1
    assert (item.prediction, item.cluster, item.fields["id"]) == ("cat", "a.png", "r")


def test_a_function_of_the_user_is_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def score(prediction, references, row):\n"
        "    return None if not prediction else row['weight'] * (prediction in references)\n"
        "def text(prediction, references, row):\n    return 'good'\n"
        "def not_a_number(prediction, references, row):\n    return float('nan')\n"
    )
    lines = [{"prediction": text, "references": ["x"], "weight": 3, "cluster": text} for text in ("x", "y", "")]
    path = _write(tmp_path / "answers.jsonl", lines)
    monkeypatch.chdir(tmp_path)
    assert entry_point(["score", str(path), "--metric", "own_metric.py:score", "--json"]) == 0
    [overall] = json.loads(capsys.readouterr().out)["scores"]
    assert (overall["score"], overall["unparsed"], overall["baseline"]) == (1, 1, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_metric("own_metric:score").name == "own_metric:score"
    for name, message in {
        "own_metric.py:text": "expected a finite number or None, got 'good' for 'x'",
        "own_metric.py:not_a_number": "expected a finite number or None, got nan",
        "own_metric.py:scores": "own_metric.py has no function 'scores'; did you mean 'score'?",
        "other_metric.py:score": "no file other_metric.py; the path is relative to the working directory",
        "other_metric:score": "cannot import other_metric: No module named 'other_metric'; a file is given as FILE.py:function",
    }.items():
        assert entry_point(["score", str(path), "--metric", name]) == 2
        assert f"error: metric {name}: {message}" in capsys.readouterr().err


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
