"""Explanations in the report of a run: what is written, what the page shows, and what stops or is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import axe_violations, opened_page

from mmtune.distributed.context import DistributedContext
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.models.checkpoints.trained_weights import find_trained_weights
from mmtune.models.load import load_trained
from mmtune.report.explanations.run_explanations import check_explained, write_explanations
from mmtune.report.run_report import rewrite_report
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import RecipeValueError


@pytest.fixture(scope="module")
def run(make_recipe_in: Callable[..., Any], rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunDirectory]:
    """A run of one step of the built-in model, whose answers have text, with two explanations."""
    evaluate = (
        f"evaluate={{data: [{{path: {rows}, template: llava}}], leakage: warn, max_new_tokens: 6, before: false, explain: 2}}"
    )
    recipe = make_recipe_in(
        tmp_path_factory.mktemp("explained"),
        evaluate,
        "model.base=builtin:tiny-llava",
        "train.max_steps=1",
        "train.learning_rate=1e-6",
    )
    train(recipe, ["test"])
    return recipe, RunDirectory(Path(recipe.output_dir))


def test_a_run_records_what_answers_of_its_report_rest_on(run: tuple[Any, RunDirectory]) -> None:
    explanations = json.loads(run[1].explanations.read_text(encoding="utf-8"))["explanations"]
    answers = {answer.id: answer.prediction for answer in read_answers(run[1].answers("after"))}
    assert len(explanations) == 2
    for each in explanations:
        assert each["answer"] == answers[each["id"]]
        assert len(each["images"][0]["scores"]) == len(each["tokens"])


def test_the_report_draws_them_beside_the_answers(browser: Any, run: tuple[Any, RunDirectory]) -> None:
    rewrite_report(run[1])  # from the records alone
    with opened_page(browser, run[1].report.as_uri()) as (page, record):
        details = page.locator("li.sample details")
        assert details.count() == 2
        details.first.locator("summary").click()
        details.first.locator("input[type=radio]").first.focus()
        page.keyboard.press("ArrowRight")
        assert details.first.locator(".overlay:visible").get_attribute("data-view") == "1"
        assert details.nth(1).locator(".overlay:not([hidden])").get_attribute("data-view") == "0"  # each has its own choice
        background = "element => getComputedStyle(element).backgroundColor"
        assert details.first.locator(".overlay:visible").evaluate(background) == "rgba(0, 0, 0, 0)"
        assert axe_violations(page) == []
    assert (record.errors, record.dialogs, record.external) == ([], [], [])


def test_an_answer_that_cannot_be_explained_is_named(run: tuple[Any, RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    recipe, directory = run
    model, processor = load_trained(find_trained_weights(directory.path))
    answers = [replace(answer, prediction="") for answer in read_answers(directory.answers("after"))][:2]
    other = RunDirectory(directory.path.parent)
    write_answers(answers, other.answers("after"))
    write_explanations(model, processor, recipe.evaluate, other, [], answers)
    assert capsys.readouterr().out.count("not explained: rows.json") == 2
    assert json.loads(other.explanations.read_text(encoding="utf-8")) == {"explanations": []}


def test_sharded_weights_are_an_error_before_training(run: tuple[Any, RunDirectory]) -> None:
    check_explained(run[0], DistributedContext(size=2))
    for dist in (DistributedContext(size=2, zero_stage=3), DistributedContext(size=2, fsdp=True)):
        with pytest.raises(RecipeValueError, match=r"evaluate\.explain: expected full weights in each process"):
            check_explained(run[0], dist)
