"""A stopped run that is resumed gives the result of the uninterrupted run, bit for bit, and only from a complete checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from forked import command_line

from mmtune import run_directory
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training import callbacks
from mmtune.training.callbacks import StopOnSignal
from mmtune.training.checkpoint import check_resumable, hash_files, wait_for_files
from mmtune.utils.errors import UserError

SAVES = ("train.save_strategy=steps", "train.save_steps=2", "train.max_steps=6", "tune.language.lora_dropout=0.2")

AUGMENTED = "data.train.0.augment={crop: 0.5, flip: 0.5, brightness: 0.5}"


def stop_after(run: RunDirectory, step: int) -> None:
    """What a run leaves that was killed after a checkpoint: no figures, no adapter, and metrics past the checkpoint."""
    for path in (run.summary, run.report):
        path.unlink(missing_ok=True)
    shutil.rmtree(run.adapter if run.adapter.exists() else run.model)
    for path in run.checkpoints.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def outcome(run: RunDirectory) -> tuple[bytes, list[tuple[float, float]]]:
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    weights = run.adapter / "adapter_model.safetensors" if run.adapter.exists() else run.model / "model.safetensors"
    return weights.read_bytes(), [(r["loss"], r["grad_norm"]) for r in records]


@pytest.mark.parametrize(
    ("how", "starts"),
    [
        ((), (4, 6, 2)),
        # in the middle of an epoch
        pytest.param(
            ("train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=1", AUGMENTED),
            (2,),
            marks=pytest.mark.slow,
        ),
        pytest.param(("data.stream=true", "data.shuffle_window=5"), (4,), marks=pytest.mark.slow),
        pytest.param(
            ("data.stream=true", "train.gradient_accumulation_steps=2", "train.dataloader_num_workers=2", AUGMENTED),
            (4,),
            marks=pytest.mark.slow,
        ),
        # an adapter whose file lacks the ranks at the time of the checkpoint; tests/methods resumes every method
        pytest.param(
            ("tune.language={method: adalora, init_r: 4, target_r: 2, tinit: 1, tfinal: 2, deltaT: 1}",),
            (2,),
            marks=pytest.mark.slow,
        ),
        # LLaVA's weights have other names on disk
        pytest.param(("tune.language=full", "tune.vision=full", "train.learning_rate=1e-4"), (4, 6), marks=pytest.mark.slow),
    ],
    ids=["indexed", "accumulated", "stream", "stream with workers", "adalora", "full"],
)
def test_a_resumed_run_equals_the_uninterrupted_run(
    make_recipe: Callable[..., Recipe], how: tuple[str, ...], starts: tuple[int, ...]
) -> None:
    """From the newest checkpoint, also of the last step, which no other follows, and from an earlier one by its path."""
    recipe = make_recipe(*SAVES, *how)
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    expected = outcome(run)
    assert sorted(path.name for path in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for start in starts:
        stop_after(run, max(start, 4))
        train(recipe, ["test"], resume=True if start > 2 else run.checkpoints / "checkpoint-2")
        assert outcome(run) == expected


def test_a_damaged_checkpoint_is_skipped(make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(*SAVES)
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    expected = outcome(run)
    stop_after(run, 4)
    with run.metrics.open("a") as metrics:
        metrics.write("\0\0\n")  # as where a machine went down
    weights = run.checkpoints / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run.checkpoints / ".saving" / "checkpoint-5").mkdir(parents=True)  # killed while it was being written
    train(recipe, ["test"], resume=True)
    output = capsys.readouterr().out
    assert "skipped" in output and "checkpoint-4" in output and "checkpoint-2, after 2 steps" in output
    assert outcome(run) == expected


def test_the_newest_checkpoints_are_kept(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(*SAVES, "train.save_total_limit=1")
    train(recipe, ["test"])
    assert [path.name for path in RunDirectory(Path(recipe.output_dir)).checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]


def test_runs_that_cannot_resume_are_rejected(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(*SAVES)
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    with pytest.raises(UserError, match="is finished"):
        train(recipe, ["test"], resume=run.checkpoints / "checkpoint-4")
    with pytest.raises(UserError, match=r"expected the values of .*recipe\.yaml for train\.learning_rate;"):
        train(make_recipe(*SAVES, "train.learning_rate=1e-3"), ["test"], resume=True)
    stop_after(run, 4)
    with pytest.raises(UserError, match=r"expected the values of .*recipe\.yaml for train\.learning_rate, tune\.language\.r;"):
        train(make_recipe(*SAVES, "train.learning_rate=1e-3", "tune.language.r=2"), ["test"], resume=True)
    with pytest.raises(UserError, match="expected a checkpoint of"):
        train(recipe, ["test"], resume=tmp_path)
    with pytest.raises(UserError, match="expected a complete output of mmtune"):
        train(recipe, ["test"], resume=run.checkpoints / "checkpoint-77")
    with pytest.raises(UserError, match=r"expected one process as for .*, got 2 processes, DDP; launch as before"):
        check_resumable(recipe, run, run.checkpoints / "checkpoint-2", DistributedContext(size=2))
    data = Path(recipe.data.train[0].path)
    written = data.read_text()
    data.write_text(json.dumps(json.loads(written)[::-1]))
    with pytest.raises(UserError, match=r"rows\.json changed since"):
        train(recipe, ["test"], resume=True)
    data.write_text(written)
    free = ("train.logging_steps=2", "train.save_steps=1")  # nothing that a step depends on
    train(make_recipe(*SAVES, *free), ["test"], resume=True)
    run.summary.unlink()
    for path in run.checkpoints.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="finished training but stopped before its report, and has no checkpoint"):
        train(make_recipe(*SAVES, *free), ["test"], resume=True)
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_a_second_signal_stops_at_once_and_a_repeated_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    stop, nothing = StopOnSignal(SINGLE_PROCESS), cast(Any, None)
    stop.on_train_begin(nothing, nothing, nothing)
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM and not received
        monkeypatch.setattr(callbacks, "REPEAT_S", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        stop.restore()
        signal.signal(signal.SIGTERM, before)


def test_each_process_hashes_its_share_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {f"shard_{number}": bytes([number]) * 9 for number in range(5)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(DistributedContext, "all_gather_object", lambda self, value: [value])
    shares = [hash_files(tmp_path, DistributedContext(rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert shares[0] | shares[1] == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_files_of_other_machines_are_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rng_state_0.pth").touch()
    wait_for_files(tmp_path, {"rng_state_0.pth"}, 0)
    monkeypatch.setattr(run_directory, "VISIBLE_TIMEOUT_S", -1.0)
    with pytest.raises(UserError, match=r"does not see files of other processes: rng_state_1\.pth"):
        wait_for_files(tmp_path, {"rng_state_0.pth", "rng_state_1.pth"}, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stream", "saves"),
    [
        (signal.SIGKILL, "true", "train.save_steps=1"),
        (signal.SIGHUP, "false", "train.save_strategy=no"),
        # whose end is the step that the signal has saved, and which the uninterrupted run does not evaluate
        (signal.SIGTERM, "false", "train.save_strategy=epoch train.eval_strategy=epoch"),
    ],
    ids=["SIGKILL", "SIGHUP", "SIGTERM in an epoch"],
)
def test_a_run_stopped_by_a_signal_resumes(
    make_recipe: Callable[..., Recipe], rows: Path, number: int, stream: str, saves: str, tmp_path: Path
) -> None:
    """Sent once the third step is logged; the same rows in the same order give the same losses and the same adapter.

    As Ctrl-C and launchers do, to the process group, in which the data loader's workers are; and again, as a launcher whose
    scheduler has sent it to all.
    """
    more = ("train.max_steps=24", "train.dataloader_num_workers=1", *saves.split())
    held_out = (
        f"evaluate={{data: [{{path: {rows}, template: llava, limit: 2}}], before: false, max_new_tokens: 1, leakage: warn}}"
    )
    recipe = make_recipe(*SAVES, f"data.stream={stream}", *more, held_out)
    run = RunDirectory(Path(recipe.output_dir))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    command, log = ["train", str(resolved)], tmp_path / "said.log"

    def result() -> tuple[bytes, list[Any]]:
        records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        values = [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records]
        return (run.adapter / "adapter_model.safetensors").read_bytes(), values

    process = command_line(command, log)
    while not (run.metrics.exists() and run.metrics.read_text().count("\n") >= 3):
        assert process.is_alive(), "the run ended before it could be stopped"
        time.sleep(0.005)
    os.killpg(process.pid or 0, number)
    if number != signal.SIGKILL:
        os.kill(process.pid or 0, number)
    process.join()
    output = log.read_text()
    if number == signal.SIGKILL:
        assert process.exitcode == -number
    else:
        assert process.exitcode == 128 + number
        step = re.search(rf"stopped: by {signal.Signals(number).name} after step (\d+)", output)
        assert step and "Traceback" not in output
        assert (run.checkpoints / f"checkpoint-{step[1]}").is_dir()
        assert len(list(run.checkpoints.glob("checkpoint-*"))) == 1 or "epoch" in saves
    assert not run.summary.exists()
    process = command_line([*command, "--resume"], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    broken = result()
    train(recipe, ["test"], overwrite=True)
    assert result() == broken
