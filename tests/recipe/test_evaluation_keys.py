"""Keys of the evaluation while training: each combination that would do nothing or fail late is one error with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmtune.evaluation.metrics.metric_table import is_held_out_loss
from mmtune.preflight import check_recipe
from mmtune.recipe.recipe import load_recipe
from mmtune.utils.errors import UserError

RECIPE = """\
model: {{base: builtin:tiny-llava}}
data:
  train: [{{path: rows.json, template: llava}}]
  {data}
{evaluate}
train:
  {train}
output_dir: run
"""
ONE = "evaluate: {data: [{path: held.json, template: llava}]}"
TWO = "evaluate: {data: [{path: a.json, template: llava}, {path: b.json, template: llava}]}"
ANSWERED = "evaluate: {data: [{path: held.json, template: llava}], while_training: {answers: true}}"
SAMPLE = "evaluate: {data: [{path: held.json, template: llava}], while_training: {rows: 5}}"
BEST = "eval_strategy: steps\n  load_best_model_at_end: true"


@pytest.mark.parametrize(
    ("train", "evaluate", "error"),
    [
        ("eval_strategy: steps", "", "7: train.eval_strategy: needs held-out rows: give evaluate: "),
        ("eval_steps: 5", ONE, "7: train.eval_steps: needs an evaluation while training: give eval_strategy: steps or epoch"),
        ("load_best_model_at_end: true", ONE, "7: train.load_best_model_at_end: needs an evaluation while training"),
        ("early_stopping_patience: 3", ONE, "7: train.early_stopping_patience: needs an evaluation while training"),
        ("metric_for_best_model: loss", ONE, "7: train.metric_for_best_model: needs an evaluation while training"),
        ("save_strategy: best", ONE, "7: train.save_strategy: best needs an evaluation while training"),
        ("max_steps: 3", SAMPLE, "5: evaluate.while_training: needs an evaluation while training: give train.eval_strategy"),
        ("eval_strategy: epoch\n  eval_steps: 5", ONE, "8: train.eval_steps: needs eval_strategy: steps"),
        ("eval_strategy: steps\n  eval_steps: 1.5", ONE, "8: train.eval_steps: expected an integer, or a fraction"),
        (
            "eval_strategy: steps\n  early_stopping_threshold: 0.1",
            ONE,
            "8: train.early_stopping_threshold: needs early_stopping_patience",
        ),
        ("eval_strategy: steps\n  early_stopping_patience: 0", ONE, "8: train.early_stopping_patience: expected an integer >= 1"),
        (BEST, ONE, "8: train.load_best_model_at_end: expected save_strategy: steps, as eval_strategy, or best, got no"),
        (
            f"{BEST}\n  save_strategy: epoch",
            ONE,
            "8: train.load_best_model_at_end: expected save_strategy: steps, as eval_strategy, or best, got epoch",
        ),
        (
            f"{BEST}\n  save_strategy: steps\n  save_steps: 75\n  eval_steps: 50",
            ONE,
            "8: train.load_best_model_at_end: expected save_steps to be a multiple of eval_steps (50), got 75",
        ),
        (
            f"{BEST}\n  save_strategy: steps\n  save_steps: 0.5\n  eval_steps: 50",
            ONE,
            "8: train.load_best_model_at_end: expected save_steps to be a multiple of eval_steps (50), got 0.5",
        ),
    ],
)
def test_a_combination_that_does_not_work_is_named(tmp_path: Path, train: str, evaluate: str, error: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(train=train, evaluate=evaluate, data=""), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"x.yaml:{error}")) as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("train", "evaluate"),
    [
        ("eval_strategy: steps", ONE),
        ("eval_strategy: epoch\n  eval_delay: 1\n  eval_on_start: true", ONE),
        ("eval_strategy: steps\n  metric_for_best_model: eval_loss_a.json\n  greater_is_better: false", TWO),
        (f"{BEST}\n  save_strategy: steps\n  save_steps: 0.2\n  eval_steps: 0.1\n  early_stopping_patience: 2", ONE),
        (f"{BEST}\n  save_strategy: best", ONE),
        (f"{BEST}\n  save_strategy: steps", SAMPLE),  # every 500 and every 10 steps
        ("eval_strategy: 'no'\n  eval_delay: 0\n  load_best_model_at_end: false", ""),
    ],
)
def test_a_combination_that_works_is_a_recipe(tmp_path: Path, train: str, evaluate: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(train=train, evaluate=evaluate, data=""), encoding="utf-8")
    assert load_recipe(path).evaluates_while_training == ("'no'" not in train)


@pytest.mark.parametrize(
    ("name", "evaluate", "error"),
    [
        ("los", ONE, "unknown metric 'los'; did you mean 'loss'?"),
        ("eval_loss_c.json", TWO, "unknown metric 'eval_loss_c.json'; did you mean 'loss_b.json'?"),
        ("anls", ANSWERED, "unknown metric 'anls'; valid here: exact_match, loss"),
        ("exact_match", ONE, "exact_match needs answers while training: give evaluate.while_training: {answers: true}"),
        ("eval_exact_match", ANSWERED, None),
        ("eval_loss_a.json", TWO, None),
    ],
)
def test_the_best_metric_is_one_that_is_reported(tmp_path: Path, name: str, evaluate: str, error: str | None) -> None:
    path = tmp_path / "x.yaml"
    train = f"eval_strategy: steps\n  metric_for_best_model: {name}"
    path.write_text(RECIPE.format(train=train, evaluate=evaluate, data=""), encoding="utf-8")
    if error is None:
        check_recipe(load_recipe(path), files=False)
        return
    with pytest.raises(UserError, match=re.escape(f"x.yaml:8: train.metric_for_best_model: {error}")):
        check_recipe(load_recipe(path), files=False)


def test_a_function_is_no_held_out_loss() -> None:
    names = ("loss", "loss_a.json", "exact_match", "loss_metric.py:score", "loss:score", "losses.py:score")
    assert [is_held_out_loss(name) for name in names] == [True, True, False, False, False, False]


def test_a_stream_has_no_epochs(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(train="eval_strategy: epoch\n  max_steps: 5", evaluate=ONE, data="stream: true"), "utf-8")
    with pytest.raises(UserError, match=r"x\.yaml:7: train\.eval_strategy: epoch is not supported with data\.stream"):
        load_recipe(path)
