"""`mmtune report A B`: recipes, versions, results, answers and curves of runs; `mmtune report` of an unfinished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import NARROW, axe_violations, opened_page, overflow

from mmtune.cli.main import entry_point
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.comparison import tuning_metrics
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory


@pytest.fixture
def runs(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path) -> list[RunDirectory]:
    """Three runs: two with answers to the same questions, and one that is not finished."""
    written = []
    for name, rank, right in (("first", 4, 12), ("second <b>", 8, 18), ("unfinished", 4, None)):
        evaluate = f"evaluate={{data: [{{path: {rows}, template: llava}}], before: false}}"
        recipe = make_recipe(evaluate, f"tune.language.r={rank}", f"output_dir={tmp_path / name.split()[0]}")
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        run.recipe.write_text(recipe.to_yaml())
        run.environment.write_text(json.dumps({"versions": {"torch": "2.13", "peft": f"0.{rank}"}, "python": "3.11"}))
        run.metrics.write_text("".join(json.dumps({"step": step, "loss": rank / step}) + "\n" for step in (1, 2, 3)))
        if right is not None:
            answer = Answer("", None, "?", (), ("yes",), "yes", "", "exact_match")
            answers = [replace(answer, id=f"r[{n}]", cluster=str(n), score=float(n < right)) for n in range(24)]
            write_answers(answers, run.answers("after"))
            numbers = {"trainable_parameters": 1, "total_parameters": 2, "train_seconds": 3.0, "peak_memory_mb": 4.0, "steps": 3}
            run.update_summary(numbers | tuning_metrics([], answers))
        written.append(run)
    return written


def test_runs_are_compared_with_the_first(
    runs: list[RunDirectory], tmp_path: Path, browser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    paths = [str(run.path) for run in runs]
    assert entry_point(["report", *paths, "--html", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["runs"] == ["first", "second <b>", "unfinished"]
    assert result["recipe"] == [{"key": "tune.language.r", "first": "4", "second <b>": "8", "unfinished": "4"}]
    assert result["versions"] == [{"library": "peft", "first": "0.4", "second <b>": "0.8", "unfinished": "0.4"}]
    assert [row["tuned score"] for row in result["results"]] == ["50.0% exact_match", "75.0% exact_match", ""]
    assert [row["training loss"] for row in result["results"]] == ["1.333", "2.667", "1.333"]
    [compared] = result["answers"]
    [overall] = compared["tasks"]
    assert (overall["difference"], overall["better"], overall["worse"]) == (0.25, 6, 0) and overall["interval"]
    [note] = result["notes"]
    assert "unfinished against first" in note and "it is not finished" in note
    for text in ("Recipe differences", "tune.language.r", "+25.0 pp", f"page: {out}"):
        assert text in captured.err
    with opened_page(browser, out.as_uri(), NARROW) as (page, record):
        assert (record.errors, record.external, overflow(page), axe_violations(page)) == ([], [], 0, [])
        legend = page.locator(".plot .legend li").all_inner_texts()
        assert [text.strip() for text in legend] == ["first", "second <b>", "unfinished"]
        page.locator(".chart").focus()
        page.keyboard.press("Home")
        assert page.locator(".chart").get_attribute("aria-valuetext") == "step 1: first 4, second <b> 8, unfinished 4"
        assert page.locator(".sample").count() == 6 and "second <b> against first" in page.inner_text("main")


def test_what_is_no_run_is_named(runs: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(runs[0].path)
    (tmp_path / "empty").mkdir()
    runs[0].checkpoints.mkdir()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "folder" / "inside" / "recipe.yaml").touch()
    for arguments, message in (
        ([first, str(tmp_path / "nowhere")], "no such run"),
        ([first, str(tmp_path / "empty")], "is not a run: it has no recipe.yaml\n"),
        ([first, str(tmp_path)], "stopped before its first step"),
        ([first, str(tmp_path / "folder")], "no recipe.yaml; runs in it: inside"),
        ([str(runs[0].checkpoints)], f"no recipe.yaml; it is a part of the run {first}"),
        (["builtin:tiny-llava"], "builtin:tiny-llava is a built-in model; expected the path of a run"),
        ([first, first], "expected different runs"),
        ([first, "--html", "x.html"], "belongs to several runs"),
    ):
        assert entry_point(["report", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_page_of_an_unfinished_run_is_written_again(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs[2]
    assert entry_point(["report", str(run.path), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["step"] == 3
    assert "has no checkpoint" in captured.err and "last log: step 3, loss 1.3333" in captured.err
    page = run.report.read_text()
    assert 'data-kind="stopped"' in page and "This run is not finished and has no checkpoint" in page
    assert page.count('class="chart"') == 1


def test_the_page_is_written_again_where_the_data_has_moved(
    runs: list[RunDirectory], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[0]
    run.recipe.write_text(run.recipe.read_text().replace("rows.json", "moved.json"))
    answers = [replace(answer, images=("moved.png",)) for answer in read_answers(run.answers("after"))]
    write_answers(answers, run.answers("after"))
    assert entry_point(["report", str(run.path)]) == 0
    assert "exact_match" in capsys.readouterr().out
    page = run.report.read_text()
    assert page.count("the images cannot be read: ") == 24 and "moved.json" in page and 'data-kind="finished"' in page
