"""Checkpoints and stopped runs can be merged, evaluated and chatted with like finished runs, and state their step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmtune import run_directory
from mmtune.cli.main import entry_point
from mmtune.models.checkpoints.trained_weights import find_trained_weights, locate_trained_weights
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import UserError
from mmtune.utils.manifest import check_manifest, write_manifest

Make = Callable[..., Recipe]
SAVES = ("train.save_strategy=steps", "train.save_steps=1")


@pytest.fixture(scope="module")
def trained(make_recipe_in: Make, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each step, and an evaluation."""
    section = f"evaluate={{data: [{{path: {rows}, template: llava}}], leakage: warn, max_new_tokens: 2}}"
    recipe = make_recipe_in(tmp_path_factory.mktemp("trained"), *SAVES, section)
    train(recipe, ["test"])
    return Path(recipe.output_dir)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def make_unfinished(run: Path) -> None:
    """Delete the files that a run stopped in its last step does not have."""
    shutil.rmtree(run / "adapter")
    for name in ("summary.json", "report.html", "answers_after.jsonl"):
        (run / name).unlink()


def listed_checkpoint(run: Path, step: int) -> Path:
    (run / "recipe.yaml").touch()
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 3}))
    write_manifest(folder)
    return folder


def logits(path: Path) -> torch.Tensor:
    model, processor = load_trained(path)
    with torch.no_grad():
        output: torch.Tensor = model(**processor.tokenizer("which digit is it", return_tensors="pt")).logits
    return output


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_release_of_a_checkpoint_has_its_own_step_and_row_counts(run: Path, base: Path, tmp_path: Path) -> None:
    checkpoint, out = run / "checkpoints" / "checkpoint-2", tmp_path / "out"
    before = (run / "summary.json").read_bytes()
    assert json.loads(before)["steps"] == 3
    assert entry_point(["merge", str(checkpoint), str(out), "--samples", "2"]) == 0
    assert (run / "summary.json").read_bytes() == before  # it belongs to the finished run
    check_manifest(out)
    assert {key: json.loads((out / "manifest.json").read_text())[key] for key in ("step", "steps")} == {"step": 2, "steps": 3}
    assert "Trained for 2 of 3 optimizer steps (a checkpoint, not the end of the run)." in card(out)
    assert "## Evaluation" not in card(out) and "12 rows; 0 quarantined" in card(out)

    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), str(checkpoint)).merge_and_unload()
    expected, released = plain.state_dict(), AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
    torch.testing.assert_close({name: released[name] for name in expected}, expected, atol=1e-6, rtol=0)

    assert entry_point(["merge", str(run), str(tmp_path / "last"), "--samples", "2"]) == 0
    assert "Trained for 3 of 3 optimizer steps." in card(tmp_path / "last") and "## Evaluation" in card(tmp_path / "last")
    adapter_release = tmp_path / "adapter_release"
    assert entry_point(["merge", str(checkpoint), str(adapter_release), "--samples", "2", "--keep-adapter"]) == 0
    assert "Trained for 2 of 3 optimizer steps (a checkpoint" in card(adapter_release) and "## Evaluation" not in card(
        adapter_release
    )
    assert not {"optimizer.pt", "trainer_state.json"} & {file.name for file in (adapter_release / "adapter").iterdir()}
    assert torch.equal(logits(adapter_release / "adapter"), logits(checkpoint))
    both = ["--adapter", f"{checkpoint}:0.5", "--adapter", f"{run}:0.5"]
    assert entry_point(["merge", *both, str(tmp_path / "sum"), "--samples", "2"]) == 0
    assert f"0.5 x {checkpoint}; 0.5 x {run}" in card(tmp_path / "sum")


@pytest.mark.slow
def test_the_last_valid_checkpoint_of_a_stopped_run_is_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = logits(run / "checkpoints" / "checkpoint-2")
    make_unfinished(run)
    with (run / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    capsys.readouterr()
    for command in (
        ["merge", str(run), str(tmp_path / "out"), "--samples", "2"],
        ["eval", str(run)],
        ["chat", str(run), "--prompt", "hi"],
    ):
        assert entry_point(command) == 0
        output = capsys.readouterr().out
        assert output.count("the run has not finished; using checkpoint-2, step 2 of 3") == 1
        assert output.count("checkpoint-3 does not match its manifest.json: changed: adapter_model.safetensors") == 1
    assert "Trained for 2 of 3 optimizer steps" in card(tmp_path / "out") and not (run / "summary.json").exists()
    assert entry_point(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    moved = run.rename(tmp_path / "moved")
    assert torch.equal(logits(moved), expected)


def test_a_damaged_checkpoint_is_an_error_with_its_path(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = run / "checkpoints"
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoints / "checkpoint-2", copy)
    (copy / "tokenizer.json").write_text("{}")
    unfinished = checkpoints / ".saving" / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-2", unfinished)
    (unfinished / "manifest.json").unlink()
    (checkpoints / "checkpoint-1" / "adapter_model.safetensors").unlink()
    for damaged, code, fault in (
        (checkpoints / "checkpoint-1", 1, "missing: adapter_model.safetensors"),
        (copy, 1, "changed: tokenizer.json"),
        (unfinished, 2, "without a valid manifest.json"),
    ):
        for verb in (
            ["merge", str(damaged), str(tmp_path / "out")],
            ["eval", str(damaged)],
            ["chat", str(damaged), "--prompt", "hi"],
        ):
            capsys.readouterr()
            assert entry_point(verb) == code
            errors = capsys.readouterr().err
            assert str(damaged) in errors and fault in errors
    assert not (tmp_path / "out").exists()
    make_unfinished(run)
    for number in (2, 3):
        (checkpoints / f"checkpoint-{number}" / "manifest.json").unlink()
    assert entry_point(["merge", str(run), str(tmp_path / "out")]) == 2
    assert "run: the run has not finished and has no undamaged checkpoint" in capsys.readouterr().err


def test_a_checkpoint_that_the_run_removes_meanwhile_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        listed_checkpoint(tmp_path, step)
    read = Path.read_text

    def removed(path: Path, *arguments: Any, **settings: Any) -> str:
        if path == tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json":
            shutil.rmtree(path.parent)
        return read(path, *arguments, **settings)

    monkeypatch.setattr(Path, "read_text", removed)
    assert find_trained_weights(tmp_path).step == 1


def test_a_checkpoint_that_the_run_replaces_during_verification_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = listed_checkpoint(tmp_path, 1)
    check_manifest = run_directory.check_manifest

    def check_after_replacement(path: Path) -> None:
        if path == first:
            listed_checkpoint(tmp_path, 2)
            shutil.rmtree(first)
        check_manifest(path)

    monkeypatch.setattr(run_directory, "check_manifest", check_after_replacement)
    assert find_trained_weights(tmp_path).step == 2
    assert "skipped" not in capsys.readouterr().out


def test_a_checkpoint_that_the_run_removes_before_loading_is_named(tmp_path: Path) -> None:
    removed = listed_checkpoint(tmp_path, 1)
    trained = find_trained_weights(tmp_path)
    shutil.rmtree(removed)
    message = f"{removed}: training removed this checkpoint before it was read; run the command again with {tmp_path}"
    with pytest.raises(UserError, match=re.escape(message)):
        load_trained(trained)


def test_merging_a_path_that_is_not_in_a_run_is_an_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "checkpoints" / "checkpoint-2", tmp_path / "copy")
    assert locate_trained_weights(tmp_path / "copy").step == 2
    for path in (tmp_path / "copy", run / "adapter"):
        assert entry_point(["merge", str(path), str(tmp_path / "out")]) == 2
        assert f"{path}: expected a run or a checkpoint in its checkpoints/" in capsys.readouterr().err
    assert entry_point(["merge", str(run / "checkpoints"), str(tmp_path / "out")]) == 2
    assert "expected a finished run (adapter/ or model/), a checkpoint or a model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_checkpoints_with_an_initialization_that_changes_the_base(make_recipe: Make, init: str) -> None:
    """The last checkpoint on the original base equals the trained model."""
    recipe = make_recipe(*SAVES, f"tune.language={{method: lora, r: 4, init_lora_weights: {init}}}")
    train(recipe, ["test"])
    run = RunDirectory(Path(recipe.output_dir))
    assert (run.checkpoints / "checkpoint-3" / "initial.safetensors").is_file()
    torch.testing.assert_close(logits(run.checkpoints / "checkpoint-3"), logits(run.path), atol=1e-6, rtol=0)
    assert (logits(run.checkpoints / "checkpoint-1") - logits(run.path)).abs().max() > 1e-3


@pytest.mark.slow
def test_checkpoints_of_a_fully_tuned_model_are_released(make_recipe: Make, tmp_path: Path) -> None:
    recipe: Any = make_recipe(*SAVES, "tune.language=full", "tune.vision=full", "train.learning_rate=1e-3")
    train(recipe, ["test"])
    checkpoint = Path(recipe.output_dir) / "checkpoints" / "checkpoint-2"
    assert entry_point(["merge", str(checkpoint), str(tmp_path / "out"), "--samples", "2", "--dtype", "fp32"]) == 0
    trained, released = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "out"))
    assert trained.keys() == released.keys() and all(torch.equal(trained[name], released[name]) for name in trained)
    assert "Trained for 2 of 3 optimizer steps" in card(tmp_path / "out")
    assert "optimizer.pt" not in {file.name for file in (tmp_path / "out").iterdir()}
