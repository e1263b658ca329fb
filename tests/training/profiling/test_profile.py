"""`mmtune train --profile`: the parts add up to the measured step, the trace can be read, and training is the same."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import launch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from mmtune.cli.main import entry_point
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.callbacks import StopOnSignal
from mmtune.training.profiling.profiled_trainer import ProfiledTrainer
from mmtune.training.profiling.step_parts import PARTS
from mmtune.training.profiling.step_profiler import TRACED_STEPS, WARMUP
from mmtune.utils.errors import Stopped, UserError

MakeRecipe = Callable[..., Recipe]
STEPS = WARMUP + 2 + 1 + TRACED_STEPS
"""Steps of a run in which two are timed."""


def read(run: RunDirectory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The profile, and the complete events of the trace."""
    trace = json.loads(gzip.decompress(run.trace.read_bytes()))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert all(event.keys() >= {"name", "pid", "tid", "ts", "dur"} and event["dur"] >= 0 for event in events)
    return json.loads(run.profile.read_text()), events


def check_sum(profile: dict[str, Any]) -> None:
    """The parts add up to the time from the first to the last moment of a step."""
    parts = profile["parts"].values()
    assert sum(part["seconds"] for part in parts) == pytest.approx(profile["step_seconds"], rel=1e-9)
    assert sum(part["share"] for part in parts) == pytest.approx(1, rel=1e-9)
    assert all(len(part["processes"]) == profile["processes"] for part in parts)


def results(run: RunDirectory) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    weights = load_file(run.adapter / "adapter_model.safetensors")
    return {name: weight.tolist() for name, weight in weights.items()}, [(line["loss"], line["grad_norm"]) for line in lines]


def test_a_profiled_run_has_the_losses_and_weights_of_a_plain_one(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[tuple[ProfiledTrainer, int]] = []
    instrument = ProfiledTrainer._instrument

    def hooks(trainer: ProfiledTrainer) -> int:
        modules = trainer.model.modules()
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    def remember(self: ProfiledTrainer) -> Any:
        trainers.append((self, hooks(self)))
        return instrument(self)

    monkeypatch.setattr(ProfiledTrainer, "_instrument", remember)
    overrides = [
        f"train.max_steps={STEPS + 1}",
        "train.gradient_accumulation_steps=2",
        "train.per_device_train_batch_size=2",
        "train.gradient_checkpointing=true",
        "tune.language.lora_dropout=0.1",
    ]
    runs = {}
    for name, profile in (("plain", 0), ("profiled", 2)):
        recipe = make_recipe(*overrides, f"output_dir={tmp_path / name}")
        train(recipe, ["test"], profile=profile)
        runs[name] = RunDirectory(Path(recipe.output_dir))
    assert results(runs["plain"]) == results(runs["profiled"])
    assert not runs["plain"].profile.exists() and not runs["plain"].trace.exists()

    profile, events = read(runs["profiled"])
    check_sum(profile)
    assert profile["steps"] == [WARMUP + 1, WARMUP + 2] and profile["processes"] == 1 and profile["workers"] is None
    assert profile["parts"].keys() == PARTS.keys() - {"compiled", "frozen", "communication", "processes"}
    assert all(part["seconds"] > 0 for part in profile["parts"].values())
    lanes = [event for event in events if event.get("cat") == "mmtune"]
    for step in range(STEPS - TRACED_STEPS + 1, STEPS + 1):
        [mark] = [event for event in events if event["name"] == f"mmtune step {step}" and event["cat"] == "user_annotation"]
        inside = [lane for lane in lanes if mark["ts"] - 1 <= lane["ts"] + lane["dur"] / 2 <= mark["ts"] + mark["dur"] + 1]
        assert sum(lane["dur"] for lane in inside) < mark["dur"]  # torch.profiler's span is around the measured step
        # A step has two batches. Its forward passes are in the lane once; checkpointing's second ones are in the backward pass.
        assert sum(lane["name"] == "vision tower" for lane in inside) == 2
    assert profile["traced_steps"] == TRACED_STEPS == sum(event["name"].startswith("mmtune step") for event in events)
    printed = capsys.readouterr().out
    assert f"Profile of 2 steps, {WARMUP + 1} to {WARMUP + 2}" in printed and "vision tower" in printed
    assert "Profile of 2 steps" in runs["profiled"].report.read_text() and "Profile" not in runs["plain"].report.read_text()

    [(trainer, before)] = trainers
    assert hooks(trainer) == before
    assert not {"backward", "clip_grad_norm_"} & vars(trainer.accelerator).keys(), "nothing stays after the profile"


def test_workers_prepare_the_rows_beside_the_step(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(f"train.max_steps={STEPS}", "train.dataloader_num_workers=2")
    train(recipe, ["test"], profile=2)
    profile, events = read(RunDirectory(Path(recipe.output_dir)))
    check_sum(profile)
    assert profile["parts"]["decode"]["seconds"] == profile["parts"]["preprocess"]["seconds"] == 0
    workers = profile["workers"]
    assert workers["workers"] == 2 and min(workers["decode"], workers["preprocess"], workers["busy"]) > 0
    spans = [event for event in events if event.get("cat") == "mmtune" and event["name"] == "decode images"]
    assert {span["tid"] for span in spans} == {0, 1} and len(spans) == TRACED_STEPS * 4, "a span for every row of a traced batch"


def test_the_steps_of_the_run_must_be_enough(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = make_recipe("train.max_steps=10")
    message = rf"--profile 4: expected at most 3: 10 steps are left, and a profile takes {WARMUP} before its own and 4 after"
    with pytest.raises(UserError, match=message):
        train(recipe, ["test"], profile=4)
    assert not Path(recipe.output_dir).exists()
    with pytest.raises(UserError, match="the run is too short: 3 steps are left"):
        train(make_recipe(), ["test"], profile=1)
    file = str(tmp_path / "recipe.yaml")
    for arguments, expected in (
        (["--profile", "0"], "--profile: expected at least 1 step, got 0"),
        (["--profile", "3", "--rehearse"], "--profile and --rehearse exclude each other"),
    ):
        assert entry_point(["train", file, *arguments]) == 2
        assert expected in capsys.readouterr().err


class StopAt(StopOnSignal):
    """The process gets SIGTERM in a step."""

    step = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_writes_what_it_has_and_a_resumed_one_warms_up_again(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.training.fit.StopOnSignal", StopAt)
    recipe = make_recipe("train.max_steps=14", "train.save_strategy=steps", "train.save_steps=100")
    run = RunDirectory(Path(recipe.output_dir))
    monkeypatch.setattr(StopAt, "step", 2)
    with pytest.raises(Stopped):
        train(recipe, ["test"], profile=3)
    assert "profile: none, the run ended after 2 steps" in capsys.readouterr().out and not run.profile.exists()
    monkeypatch.setattr(StopAt, "step", 2 + WARMUP + 2)
    with pytest.raises(Stopped):
        train(recipe, ["test"], resume=True, profile=3)
    assert f"the run ended after 2 of 3 timed steps, and 0 of {TRACED_STEPS} traced ones" in capsys.readouterr().out
    profile = json.loads(run.profile.read_text())
    check_sum(profile)
    assert profile["steps"] == [2 + WARMUP + 1, 2 + WARMUP + 2] and not profile["traced_steps"] and not run.trace.exists()
    with pytest.raises(UserError, match="the run is too short: 7 steps are left"):
        train(recipe, ["test"], resume=True, profile=1)


def test_a_run_that_fails_stops_the_profiler(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(f"train.max_steps={STEPS}")
    compute = ProfiledTrainer.compute_loss

    def fail(self: ProfiledTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == STEPS - 1:
            raise RuntimeError("out of memory")
        return compute(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(ProfiledTrainer, "compute_loss", fail)
        train(recipe, ["test"], profile=2)
    train(recipe, ["test"], overwrite=True, profile=2)  # torch.profiler starts once at a time
    check_sum(read(RunDirectory(Path(recipe.output_dir)))[0])


def test_a_run_without_room_for_the_trace_continues(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.profiler leaves no file on a full disk, and reports no error."""
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", lambda self, path: None)
    recipe = make_recipe(f"train.max_steps={STEPS}")
    train(recipe, ["test"], profile=2)
    run = RunDirectory(Path(recipe.output_dir))
    assert "profile: no trace" in capsys.readouterr().out and not run.trace.exists() and run.summary.is_file()
    profile = json.loads(run.profile.read_text())
    check_sum(profile)
    assert "torch.profiler recorded no work of a device" in profile["notes"][0]


@pytest.mark.slow
def test_several_processes_measure_the_same_step(shallow: Path, rows: Path, tmp_path: Path) -> None:
    """DDP and FSDP2 average gradients in the backward pass; ZeRO-3 and FSDP2 gather weights in the forward pass."""
    recipes: list[tuple[Path, str] | tuple[Path, str, str]] = []
    strategies = {"plain": "ddp", "ddp": "ddp", "zero3": "zero3", "fsdp2": "fsdp2"}
    for name, strategy in strategies.items():
        document = {
            "model": {"base": str(shallow)},
            "tune": {"language": {"method": "lora", "r": 4}},
            "data": {"train": [{"path": str(rows), "template": "llava"}]},
            "train": {
                "max_steps": STEPS,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 2,
                "logging_steps": 1,
                "save_strategy": "no",
            },
            "output_dir": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        recipes.append((path, strategy) if name == "plain" else (path, strategy, "profile"))
    assert launch(recipes, tmp_path) == [True] * len(recipes)
    runs = {name: RunDirectory(tmp_path / name) for name in strategies}
    assert results(runs["plain"]) == results(runs["ddp"])
    for name in ("ddp", "zero3", "fsdp2"):
        profile, events = read(runs[name])
        check_sum(profile)
        assert profile["processes"] == 2 and not profile["notes"]
        parts = ("vision", "language", "loss", "backward", "optimizer", "communication")
        assert all(profile["parts"][part]["seconds"] > 0 for part in parts), name
        assert {event["tid"] for event in events if event.get("cat") == "mmtune"} == {0, 1}
