"""Faults around a run end it with one message, in bounded time, and leave a checkpoint that `--resume` continues from."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from killed import draw_moments, kill_and_finish, prepare, run_unbroken

import mmtune.train
from mmtune.data.dataset import SampleEncoder
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory, new_run
from mmtune.train import train
from mmtune.training.callbacks import RecordMetrics
from mmtune.training.trainer import TuningTrainer
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.manifest import check_manifest

Make = Callable[..., Recipe]
SAVES = ("train.save_strategy=steps", "train.save_steps=2", "train.max_steps=6", "tune.language.lora_dropout=0.2")
TIMEOUT_S = 150.0


def outcome(run: RunDirectory) -> tuple[bytes, list[tuple[int, float]]]:
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return (run.adapter / "adapter_model.safetensors").read_bytes(), [(r["step"], r["loss"]) for r in records]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    unbroken = {stream: run_unbroken(tmp_path, stream) for stream in (False, True)}
    assert "missing.png" in unbroken[False].outcome[2]
    for number, moment in enumerate(draw_moments(4, seed=0)):
        hits, differs = kill_and_finish(moment, unbroken[moment.stream], tmp_path, f"killed-{number}")
        assert not differs, (moment, hits)


@pytest.mark.parametrize("left", ["nothing", "an empty directory", "a start", "a start over an earlier run"])
def test_resume_without_a_checkpoint_starts_the_run(
    make_recipe: Make, left: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("train.max_steps=1")
    run = RunDirectory(Path(recipe.output_dir))
    earlier = run.path.with_name(".run.earlier")
    if left == "a start over an earlier run":
        earlier.mkdir()
        for name in ("mark", "recipe.yaml"):
            (earlier / name).touch()
    if left != "nothing":
        run.path.mkdir()
    if left.startswith("a start"):
        run.recipe.write_text("model:")  # cut short
        run.metrics.touch()
    if earlier.exists():  # a start that fails gives back the run that was there before the killed one
        with pytest.raises(ZeroDivisionError), new_run(recipe, ["test"], overwrite=True, dist=SINGLE_PROCESS):
            raise ZeroDivisionError
        assert (run.path / "mark").exists() and not earlier.exists()
    summary = train(recipe, ["test"], resume=True)
    assert "has no checkpoint yet: it starts from the beginning" in capsys.readouterr().out
    assert outcome(run)[1][0][0] == 1 and not earlier.exists()
    monkeypatch.setattr(mmtune.train, "load_base", None)
    assert train(recipe, ["test"], resume=True) == summary
    assert "is finished" in capsys.readouterr().out


def make_unfinished(run: RunDirectory, state: str) -> None:
    """What a killed process leaves."""
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("model:")  # cut short
    run.metrics.write_text('{"step": 1}\n' if state == "steps" else "")
    if state == "checkpoint":
        (run.checkpoints / "checkpoint-2").mkdir()
    if state == "trained":
        run.adapter.mkdir()
    if state == "finished":
        run.summary.write_text("{}")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("steps", "is not finished and has no checkpoint"),
        ("checkpoint", "is not finished: its last checkpoint is checkpoint-2; `mmtune train RECIPE --resume` continues"),
        ("trained", "finished training but stopped before its report: `mmtune eval "),
        ("finished", "is a finished run: --overwrite replaces it"),
    ],
)
def test_a_second_start_names_the_existing_run_and_how_to_resume(make_recipe: Make, state: str, message: str) -> None:
    recipe = make_recipe()
    run = RunDirectory(Path(recipe.output_dir))
    make_unfinished(run, state)
    with pytest.raises(UserError, match=f"output_dir: {run.path} {message}") as error:
        train(recipe, ["test"])
    assert "--overwrite" in str(error.value)
    if state != "finished":
        with pytest.raises(UserError, match=f"{run.path} {message}"):
            run.read_summary()


@pytest.mark.parametrize("left", ["a start", "a start over an earlier run"])
def test_leftovers_of_a_killed_start_do_not_block_the_next(
    make_recipe: Make, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("train.max_steps=1")
    run = RunDirectory(Path(recipe.output_dir))
    make_unfinished(run, "killed before its first step")
    if left == "a start":
        train(recipe, ["test"])
        assert capsys.readouterr().out.count("is replaced: that run stopped before its first step") == 1
        return
    earlier = RunDirectory(run.path.with_name(".run.earlier"))
    make_unfinished(earlier, "finished")
    with pytest.raises(UserError, match="is a finished run: --overwrite replaces it"):
        train(recipe, ["test"])
    assert "restored the earlier run" in capsys.readouterr().out
    assert run.summary.is_file() and not earlier.path.exists()


def test_a_run_with_only_damaged_checkpoints_is_not_restarted(make_recipe: Make) -> None:
    recipe = make_recipe(*SAVES)
    (Path(recipe.output_dir) / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged"):
        train(recipe, ["test"], resume=True)


def limited(function: Callable[..., Any], size: int, when: Callable[..., bool]) -> Callable[..., Any]:
    """A function in which no file grows past a size, as on a full disk; Python ignores the signal and gets an error."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if when(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return inner


@pytest.fixture(scope="module")
def uninterrupted(make_recipe_in: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[tuple[int, float]]]:
    recipe = make_recipe_in(tmp_path_factory.mktemp("uninterrupted"), *SAVES)
    train(recipe, ["test"])
    return outcome(RunDirectory(Path(recipe.output_dir)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "where"),
    [(300_000, "checkpoint-4"), (500_000, "checkpoint-4"), (200, "metrics.jsonl"), (300_000, "adapter")],
    ids=["weights", "optimizer", "metrics", "adapter"],
)
def test_a_full_disk_leaves_existing_files_unchanged(
    make_recipe: Make, uninterrupted: Any, size: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*SAVES)
    run = RunDirectory(Path(recipe.output_dir))
    with monkeypatch.context() as patch:
        at_four = lambda trainer, *args: trainer.state.global_step == 4  # noqa: E731
        if where == "checkpoint-4":  # of 340 KB, with an optimizer of 720 KB
            patch.setattr(TuningTrainer, "save_model", limited(TuningTrainer.save_model, size, at_four))
            optimizer = limited(TuningTrainer._save_optimizer_and_scheduler, size, at_four)
            patch.setattr(TuningTrainer, "_save_optimizer_and_scheduler", optimizer)
        elif where == "adapter":
            patch.setattr(mmtune.train, "save_tuned", limited(mmtune.train.save_tuned, size, lambda *args: True))
        else:
            record = limited(RecordMetrics.on_log, size, lambda recorder, args, state, *rest, **more: state.global_step == 4)
            patch.setattr(RecordMetrics, "on_log", record)
        with pytest.raises(UserError, match=f"cannot write {run.path}/.*{where}: .*(too large|could not be written completely)"):
            train(recipe, ["test"], overwrite=True)
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert [name for name in names if name != ".saving"] == [
        f"checkpoint-{n}" for n in ((2, 4, 6) if where == "adapter" else (2,))
    ]
    assert where != "checkpoint-4" or ".saving" not in names
    assert not run.adapter.exists() and not list(run.path.glob(".*"))
    check_manifest(run.checkpoints / "checkpoint-2")
    train(recipe, ["test"], resume=True)
    assert outcome(run) == uninterrupted


def test_an_unwritable_output_dir_is_rejected_before_weights_load(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmtune.train, "load_base", None)
    with pytest.raises(UserError, match="output_dir: cannot write in /proc"):  # not even by root
        train(make_recipe("output_dir=/proc/runs/run"), ["test"])


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_killed_worker_is_reported_and_the_run_continues(
    make_recipe: Make, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(*SAVES, "train.dataloader_num_workers=1", "train.save_steps=1", f"data.stream={stream}")
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    expected = outcome(run)
    encode, step, now = SampleEncoder.__call__, TuningTrainer.training_step, tmp_path / "now"

    def killed(self: SampleEncoder, *args: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None and now.exists():
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return encode(self, *args)

    def training_step(self: TuningTrainer, *args: Any) -> Any:
        if self.state.global_step == 2:
            now.touch()
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SampleEncoder, "__call__", killed)
        patch.setattr(TuningTrainer, "training_step", training_step)
        with pytest.raises(
            UserError, match=r"DataLoader worker .*(killed|exited unexpectedly).*: .*lower train\.dataloader_num_workers"
        ):
            train(recipe, ["test"], overwrite=True)
    check_manifest(run.checkpoints / "checkpoint-2")
    train(recipe, ["test"], resume=True)
    assert outcome(run) == expected


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of steps, by number, NaN."""
    real = TuningTrainer.compute_loss

    def spoil(*steps: int) -> None:
        def compute_loss(self: TuningTrainer, *args: Any, **kwargs: Any) -> Any:
            return real(self, *args, **kwargs) * (float("nan") if self.state.global_step + 1 in steps else 1)

        monkeypatch.setattr(TuningTrainer, "compute_loss", compute_loss)

    return spoil


@pytest.mark.parametrize(
    "how",
    [
        (),
        pytest.param(
            ("model.precision=bf16", "train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fp32", "bf16, accumulated"],
)
def test_a_step_that_is_not_finite_is_skipped(
    make_recipe: Make, how: tuple[str, ...], not_finite: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(*SAVES, "train.save_steps=1", "data.max_nonfinite_steps=1", "train.weight_decay=0.1", *how)
    run = RunDirectory(Path(recipe.output_dir))
    not_finite(3)
    assert train(recipe, ["test"])["skipped_steps"] == 1
    output = capsys.readouterr().out
    [skipped] = json.loads(run.data_report.read_text())["skipped_steps"]
    assert skipped["step"] == 3 and len(set(skipped["rows"])) == 4
    assert f"step 3 is skipped, its gradients are not finite; its rows: {', '.join(skipped['rows'])}" in output
    before, after = (run.checkpoints / f"checkpoint-{step}" for step in (2, 3))
    assert (before / "adapter_model.safetensors").read_bytes() == (after / "adapter_model.safetensors").read_bytes()
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (before, after)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    losses = dict(outcome(run)[1])
    assert sorted(losses) == [1, 2, 4, 5, 6]

    # The bound holds over a resumed run, too, and the mean over several steps is that of those that were taken.
    not_finite(5)
    run.summary.unlink()
    with pytest.raises(CheckFailed, match="the gradients of step 5 are not finite, after 1 that were skipped"):
        train(recipe, ["test"], resume=run.checkpoints / "checkpoint-4")
    not_finite(3)
    train(
        make_recipe(*SAVES, "data.max_nonfinite_steps=1", "train.weight_decay=0.1", "train.logging_steps=2", *how), ["test"], True
    )
    means = dict(outcome(run)[1])
    assert means == pytest.approx({2: (losses[1] + losses[2]) / 2, 4: losses[4], 6: (losses[5] + losses[6]) / 2})


def cut_images(rows: Path, folder: Path, bad: Sequence[int]) -> Path:
    """`rows` with images that no header shows to be damaged."""
    row_list = json.loads(rows.read_text())
    for number, row in enumerate(row_list):
        whole = (rows.parent / row["image"]).read_bytes()
        row["image"] = str(folder / f"{number}.png")
        middle = len(whole) // 2
        Path(row["image"]).write_bytes(whole[:middle] + bytes(40) + whole[middle + 40 :] if number in bad else whole)
    path = folder / "rows.json"
    path.write_text(json.dumps(row_list))
    return path


@pytest.mark.parametrize(
    "how",
    [
        (),
        pytest.param(("train.gradient_accumulation_steps=2",), marks=pytest.mark.slow),
        pytest.param(("data.stream=true", "data.shuffle_window=1"), marks=pytest.mark.slow),
        pytest.param(("tune.language=full", "tune.vision=full"), marks=pytest.mark.slow),
        pytest.param(
            ("tune.language={method: adalora, tinit: 1, tfinal: 3, deltaT: 1, init_r: 6, target_r: 4}",), marks=pytest.mark.slow
        ),
    ],
    ids=["adapter", "accumulated", "streamed", "full", "adalora"],
)
def test_a_step_without_samples_changes_nothing(
    make_recipe: Make, how: tuple[str, ...], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 4 and 5 are the third step's, row 6 is half of the fourth's."""
    path = cut_images(rows, tmp_path, (4, 5, 6))
    size = 1 if "train.gradient_accumulation_steps=2" in how else 2
    recipe = make_recipe(
        *SAVES,
        "train.save_steps=1",
        "train.train_sampling_strategy=sequential",
        f"train.per_device_train_batch_size={size}",
        "train.weight_decay=0.1",
        f"data.train.0.path={path}",
        "data.train.0.media_root=/",
        "data.max_bad_fraction=0.5",
        *how,
    )
    run = RunDirectory(Path(recipe.output_dir))
    summary = train(recipe, ["test"])
    assert (summary["skipped_steps"], summary["steps_without_samples"], summary["quarantined"]) == (1, 1, 3)
    assert "step 3 is skipped, none of its rows can train; its rows: rows.json[4], rows.json[5]" in capsys.readouterr().out
    [skipped] = json.loads(run.data_report.read_text())["skipped_steps"]
    assert skipped == {"step": 3, "rows": ["rows.json[4]", "rows.json[5]"], "reason": "none of its rows can train"}
    before, after = (run.checkpoints / f"checkpoint-{step}" for step in (2, 3))
    names = ("adapter_state.safetensors", "model.safetensors", "adapter_model.safetensors")
    weights = next(name for name in names if (after / name).exists())
    assert (before / weights).read_bytes() == (after / weights).read_bytes()
    states = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in (before, after)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(r["step"], r["learning_rate"]) for r in records] == [(s, pytest.approx(5e-3 * (7 - s) / 6)) for s in (1, 2, 4, 5, 6)]

    trained = next(iter([*run.adapter.glob("*.safetensors"), *run.model.glob("*.safetensors")]))
    unbroken = trained.read_bytes()
    for start in (2, 3):
        run.summary.unlink()
        train(recipe, ["test"], resume=run.checkpoints / f"checkpoint-{start}")
        assert trained.read_bytes() == unbroken
        again = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert [(r["step"], r["loss"]) for r in again] == [(r["step"], r["loss"]) for r in records]


def test_adalora_cannot_skip(make_recipe: Make) -> None:
    adalora = ("tune.language={method: adalora}", "data.max_nonfinite_steps=1", "train.max_steps=40")
    with pytest.raises(UserError, match=r"data\.max_nonfinite_steps=1: not supported with adalora"):
        train(make_recipe(*adalora), ["test"])


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_data_file_that_changes_during_a_run_stops_it(
    make_recipe: Make, rows: Path, tmp_path: Path, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.json"
    shutil.copy(rows, data)
    recipe = make_recipe(
        "train.max_steps=12", f"data.train.0.path={data}", f"data.train.0.media_root={rows.parent}", f"data.stream={stream}"
    )
    real = TuningTrainer.training_step

    def training_step(self: TuningTrainer, *args: Any) -> Any:
        if self.state.global_step == 1:
            data.write_text(json.dumps(json.loads(rows.read_text())[::-1]))
        return real(self, *args)

    monkeypatch.setattr(TuningTrainer, "training_step", training_step)
    with pytest.raises(UserError, match=f"{data}: changed since it was opened"):
        train(recipe, ["test"])


FAILING = """
import os, signal, sys
from mmtune.console.library_output import configure_console
configure_console()
import mmtune.train
from mmtune.training.trainer import TuningTrainer

how, *arguments = sys.argv[1:]

def fail(*args, **kwargs):
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("the reason why")

if os.environ["RANK"] == "1":
    if how == "at the start":
        mmtune.train.load_base = fail
    else:
        TuningTrainer.training_step = fail
from mmtune.cli.main import entry_point
sys.exit(entry_point(["train", *arguments]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["at the start", "killed"])
def test_a_failed_process_stops_all_processes(make_recipe: Make, tmp_path: Path, how: str) -> None:
    """The second process fails while the main process waits for it: the main process ends, without a traceback of its own.

    tests/distributed/test_launch_errors.py has the messages.
    """
    recipe, script = tmp_path / "resolved.yaml", tmp_path / "failing.py"
    recipe.write_text(make_recipe().to_yaml())
    script.write_text(FAILING)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(script), how, str(recipe)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        if process.poll() is None:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
    assert process.returncode != 0
    assert "[rank0]: Traceback" not in output
    assert "rank      : 1 (local_rank: 1)" in output.partition("Root Cause")[2]
    if how == "at the start":
        assert "ValueError: the reason why" in output
        assert not (tmp_path / "run").exists()
    else:
        assert "Signal 9 (SIGKILL)" in output
