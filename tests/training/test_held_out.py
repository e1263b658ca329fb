"""Evaluation while training: the exact held-out loss, the best step, early stopping, and what training must not notice of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command_line
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import SftSection
from mmtune.recipe.recipe import Recipe
from mmtune.rehearse import rehearse
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.callbacks import evaluation_line
from mmtune.training.held_out.held_out_loss import HeldOutLoss
from mmtune.training.held_out.held_out_rows import HeldOutRows, plan_held_out
from mmtune.utils.errors import RecipeValueError, UserError

EVERY_STEP = ("train.eval_strategy=steps", "train.eval_steps=1")


def lines(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that have a metric."""
    records = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
    return [record for record in records if name in record]


def evaluation(rows: Path, **more: Any) -> str:
    section = {
        "data": [{"path": str(rows), "template": "llava"}],
        "leakage": "warn",
        "max_new_tokens": 1,
        "before": False,
        **more,
    }
    return f"evaluate={json.dumps(section)}"


def plain_loss(base: Path, adapter: Path, samples: IndexedSamples) -> float:
    """The mean loss over supervised tokens in plain transformers and PEFT, row by row, in fp64."""
    processor = AutoProcessor.from_pretrained(str(base))
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(str(base)), str(adapter)).eval()
    total = tokens = 0.0
    for sample in samples:
        row = encode_sample(sample, processor)
        count = int((row["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**row).loss) * count
        tokens += count
    return total / tokens


def test_the_held_out_metrics_are_those_of_plain_transformers_and_peft(
    make_recipe: Callable[..., Recipe], rows: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers differ in length and the last batch has fewer rows, so a mean of batch means is another number."""
    held_out = evaluation(rows, batch_size=5, metric="wer", max_new_tokens=4, while_training={"answers": True})
    recipe = make_recipe(*EVERY_STEP, "train.max_steps=2", "tune.language.lora_dropout=0.2", held_out)
    summary = train(recipe, ["test"])
    run = RunDirectory(Path(recipe.output_dir))
    evaluated = lines(run, "eval_loss")
    assert [record["step"] for record in evaluated] == [1, 2]
    expected = plain_loss(base, run.adapter, IndexedSamples(recipe.data.train))
    assert evaluated[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    best = min(evaluated, key=lambda record: record["eval_loss"])
    assert (summary["best_step"], summary["best_metric"]) == (best["step"], best["eval_loss"])
    assert summary["metric_for_best_model"] == "eval_loss"
    assert evaluated[-1]["eval_wer"] == summary["tuned_scores"][-1]["score"] > 0  # that of the answers after tuning
    assert f"step 2/2  {evaluation_line(evaluated[-1])}" in capsys.readouterr().out


def test_training_does_not_notice_the_evaluation(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path) -> None:
    """Dropout draws from the generators that an evaluation must leave alone, and the modes of the modules switch it."""
    runs = []
    for name, overrides in {"with": (*EVERY_STEP, "train.eval_on_start=true", evaluation(rows)), "without": ()}.items():
        recipe = make_recipe("tune.language.lora_dropout=0.2", f"output_dir={tmp_path / name}", *overrides)
        train(recipe, ["test"])
        runs.append(RunDirectory(Path(recipe.output_dir)))
    evaluated, plain = runs
    assert [record["step"] for record in lines(evaluated, "eval_loss")] == [0, 1, 2, 3]
    name = "adapter_model.safetensors"
    assert (evaluated.adapter / name).read_bytes() == (plain.adapter / name).read_bytes()
    for one, two in zip(lines(evaluated, "loss"), lines(plain, "loss"), strict=True):
        assert (one["loss"], one["grad_norm"], one["tokens"]) == (two["loss"], two["grad_norm"], two["tokens"])


OVERFITS = (
    "train.learning_rate=2e-2",
    "tune.projector.learning_rate=2e-2",
    "train.lr_scheduler_type=constant",
    "train.max_steps=12",
    "train.early_stopping_patience=2",
    "train.load_best_model_at_end=true",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.save_total_limit=3",
    "tune.language.lora_dropout=0.2",
)


def outcome(run: RunDirectory) -> tuple[bytes, list[Any], dict[str, Any]]:
    summary = run.read_summary()
    records = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
    values = [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records]
    best = {name: summary[name] for name in ("best_step", "best_metric", "steps")}
    return (run.adapter / "adapter_model.safetensors").read_bytes(), values, best


def stop_after(run: RunDirectory, step: int) -> None:
    """What a run leaves that was killed after the checkpoint of a step."""
    run.summary.unlink()
    shutil.rmtree(run.adapter)
    for path in run.checkpoints_by_step():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def test_the_best_step_is_kept_and_known_after_a_resume(make_recipe: Callable[..., Recipe], rows: Path, base: Path) -> None:
    held_out = evaluation(rows, data=[{"path": str(rows), "template": "llava", "limit": 5}])
    recipe = make_recipe(*EVERY_STEP, *OVERFITS, held_out)
    train(recipe, ["test"])
    run = RunDirectory(Path(recipe.output_dir))
    expected = outcome(run)
    adapter, _, summary = expected
    losses = [record["eval_loss"] for record in lines(run, "eval_loss")]
    best, last = summary["best_step"], summary["steps"]
    assert losses[best - 1] == min(losses) == summary["best_metric"]
    assert best < last < 12 and len(losses) == last  # stopped early, after two evaluations in a row that were not better
    assert best == last - 2
    assert adapter == (run.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    assert summary["best_metric"] == pytest.approx(
        plain_loss(base, run.adapter, plan_held_out(recipe, AutoProcessor.from_pretrained(str(base)), SINGLE_PROCESS).samples),
        abs=1e-5,
    )

    assert [path.name for path in run.checkpoints_by_step()] == [f"checkpoint-{step}" for step in (best, best + 1, last)]

    stop_after(run, best + 1)  # after one evaluation that was not better
    train(recipe, ["test"], resume=True)
    assert outcome(run) == expected
    stop_after(run, last)  # killed after its last step: no step follows
    train(recipe, ["test"], resume=True)
    assert outcome(run) == expected
    stop_after(run, last)
    shutil.rmtree(run.checkpoints / f"checkpoint-{best}")
    with pytest.raises(UserError, match=f"checkpoint-{best} is missing, the best checkpoint"):
        train(recipe, ["test"], resume=True)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, 1, [1, 2, 3, 4]),
        (1, None, [4]),
        (1, 1, [1, 4]),
        (1, 4, [4]),
        (3, 1, [1, 3, 4]),
        (3, 3, [2, 3, 4]),
        (9, 1, [1, 2, 3, 4]),
    ],
)
def test_the_best_checkpoint_counts_among_the_newest(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    """As transformers' rotate_checkpoints."""
    run = RunDirectory(tmp_path)
    for step in range(1, 5):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    run.delete_checkpoints(limit, keep=None if best is None else run.checkpoints / f"checkpoint-{best}")
    assert [path.name for path in run.checkpoints_by_step()] == [f"checkpoint-{step}" for step in left]


def mean_losses(model: Any, processor: Any, rows: HeldOutRows, size: int) -> dict[str, float]:
    objective = SupervisedTuning(SftSection())
    held_out = HeldOutLoss(rows, objective, processor, SINGLE_PROCESS, size)

    def sums(batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with torch.no_grad():
            losses = objective.compute_loss(model, objective.model_inputs(model, batch), 1)
        return objective.held_out_losses(losses), objective.denominator([batch])

    means = held_out.means({}, sums)
    return {name: value for name, value in means.items() if name.startswith("eval_loss")}


TWO_SOURCES = [{"template": "llava", "limit": 3}, {"template": "llava", "where": {"task": "count"}}]


def test_the_loss_does_not_depend_on_the_batches(make_recipe: Callable[..., Recipe], rows: Path, base: Path) -> None:
    """By the number of rows, by the number of tokens, and packed; of two sources whose rows have different answers."""
    model, processor = AutoModelForImageTextToText.from_pretrained(str(base)).eval(), AutoProcessor.from_pretrained(str(base))
    held_out = evaluation(rows, data=[{"path": str(rows), **source} for source in TWO_SOURCES])
    layouts: dict[str, tuple[str, ...]] = {
        "rows": (),
        "tokens": ("data.tokens_per_batch=400", "data.max_tokens=200"),
        "packed": ("data.packing=true", "data.max_tokens=300"),
    }
    results = []
    for layout in layouts.values():
        recipe = make_recipe("train={eval_strategy: steps}", held_out, *layout)
        planned = plan_held_out(recipe, processor, SINGLE_PROCESS)
        assert planned is not None
        results += [mean_losses(model, processor, planned, size) for size in (1, 16)]
        tokens = [
            sum(planned.lengths[planned.chosen == row].item() for row in batch)
            for _, batch in planned.batches(16, SINGLE_PROCESS)
        ]
        assert max(tokens) <= 400
    assert results[0].keys() == {"eval_loss", "eval_loss_rows.json", "eval_loss_rows.json (2)"}
    assert abs(results[0]["eval_loss_rows.json"] - results[0]["eval_loss_rows.json (2)"]) > 1e-3
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=2e-6)


@pytest.mark.parametrize("count", [None, 5, 1000])
def test_processes_share_the_sample_in_the_same_number_of_batches(
    make_recipe: Callable[..., Recipe], rows: Path, base: Path, count: int | None
) -> None:
    processor = AutoProcessor.from_pretrained(str(base))
    recipe = make_recipe(*EVERY_STEP, evaluation(rows, while_training={"rows": count, "seed": 3}))
    planned = [plan_held_out(recipe, processor, SINGLE_PROCESS) for _ in range(2)]
    assert planned[0] is not None and planned[1] is not None
    assert planned[0].chosen.tolist() == planned[1].chosen.tolist()
    assert len(planned[0].chosen) == min(count or 12, 12)
    shares = [planned[0].batches(2, DistributedContext(rank, 3)) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for _, batch in share for row in batch) == planned[0].chosen.tolist()


def test_rows_without_a_loss_stop_the_run_before_weights(make_recipe: Callable[..., Recipe], rows: Path, base: Path) -> None:
    processor = AutoProcessor.from_pretrained(str(base))
    limit = ("data.max_tokens=20", "data.over_length=drop_sample")
    with pytest.raises(RecipeValueError, match=r"evaluate: all 12 held-out rows are longer than data\.max_tokens: 20"):
        plan_held_out(make_recipe(*EVERY_STEP, *limit, evaluation(rows)), processor, SINGLE_PROCESS)
    with pytest.raises(RecipeValueError, match=r"evaluate: 12 held-out rows are too long, the first: rows\.json\[0\]"):
        plan_held_out(make_recipe(*EVERY_STEP, limit[0], evaluation(rows)), processor, SINGLE_PROCESS)
    silent = json.loads(rows.read_text(encoding="utf-8"))
    for row in silent:
        row["conversations"][1]["weight"] = 0
    path = rows.parent / "silent.json"
    path.write_text(json.dumps(silent), encoding="utf-8")
    with pytest.raises(RecipeValueError, match=r"12 of 12 rows have no held-out loss, the first: silent\.json\[0\].*weight 0"):
        plan_held_out(make_recipe(*EVERY_STEP, evaluation(path)), processor, SINGLE_PROCESS)


@pytest.mark.slow
def test_a_run_killed_in_an_evaluation_resumes(make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path) -> None:
    held_out = evaluation(rows, max_new_tokens=30, while_training={"answers": True})
    saves = ("train.save_strategy=steps", "train.save_steps=1", "train.load_best_model_at_end=true", "train.save_total_limit=1")
    recipe = make_recipe(*EVERY_STEP, *saves, "train.max_steps=5", "tune.language.lora_dropout=0.2", held_out)
    run = RunDirectory(Path(recipe.output_dir))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    process = command_line(["train", str(resolved)], tmp_path / "run.log")
    while not (run.metrics.exists() and run.metrics.read_text(encoding="utf-8").count('"loss"') >= 3):
        assert process.is_alive(), (tmp_path / "run.log").read_text()
        time.sleep(0.005)
    os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [record["step"] for record in lines(run, "eval_loss")] == [1, 2]  # it was in the third
    train(recipe, ["test"], resume=True)
    resumed = outcome(run)
    train(recipe, ["test"], overwrite=True)
    assert outcome(run) == resumed


@pytest.mark.slow
def test_a_rehearsal_evaluates_too(make_recipe: Callable[..., Recipe], rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sources have other names in it, so that the best loss of one cannot be asked for by its name."""
    held_out = evaluation(rows, data=[{"path": str(rows), **source} for source in TWO_SOURCES], while_training={"answers": True})
    best = ("train.load_best_model_at_end=true", "train.save_strategy=steps", "train.metric_for_best_model=loss_rows.json")
    summary = rehearse(make_recipe("train.eval_strategy=steps", "train.eval_steps=50", "train.save_steps=100", *best, held_out))
    assert summary["best_step"] == 1
    assert "eval_exact_match" in capsys.readouterr().out
