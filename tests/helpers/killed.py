"""Runs that are killed (SIGKILL) at random moments and restarted with the same command until one completes.

A scheduler's requeue loop, then: `mmtune train RECIPE --resume`, from the very first start on. Processes are forked from one
that has imported everything, so that a start takes seconds; what is killed is the run, from its first line to its last file.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from forked import command_line, forking

from mmtune.run_directory import RunDirectory

STEPS = 6
TIMEOUT_S = 120.0
RECIPE = """\
model: {{base: {folder}/model}}
tune:
  projector: {{method: full, learning_rate: 1e-3}}
  language: {{method: lora, r: 4, lora_alpha: 8, lora_dropout: 0.2}}
data:
  train: [{{path: {folder}/rows.json, template: llava}}]
  stream: {stream}
  shuffle_window: {window}
  max_bad_fraction: 0.5
  check_rows: 0
train:
  max_steps: {steps}
  learning_rate: 5e-3
  per_device_train_batch_size: 2
  dataloader_num_workers: {workers}
  logging_steps: 1
  save_strategy: steps
  save_steps: 1
  save_total_limit: 2
  use_cpu: true
  seed: 0
output_dir: {out}
"""


@dataclass(frozen=True)
class Moment:
    """When a run is killed.

    Attributes:
        stream: whether the run's rows are streamed, by a data-loader worker.
        phases: of each start that is killed, the phase and how far into it, from 0 to 1.
    """

    stream: bool
    phases: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Unbroken:
    """What a run comes to that nobody kills, and how long it takes to its first logged step, to its last, for a checkpoint, and
    after the last, in seconds."""

    outcome: tuple[bytes, str, str]
    start_s: float
    steps_s: float
    saving_s: float
    end_s: float


def draw_moments(count: int, seed: int) -> list[Moment]:
    """Two in five while a checkpoint is being written; the second of every five is killed twice."""
    generator = random.Random(seed)
    moments = []
    for number in range(count):
        phases = [("start-up", "saving", "steps", "end", "saving")[number % 5]]
        if number % 5 == 1:
            phases.append(generator.choice(["start-up", "steps", "saving"]))
        moments.append(Moment(number % 2 == 1, tuple((phase, generator.random()) for phase in phases)))
    return moments


def prepare(folder: Path) -> None:
    """Twelve rows, one more whose image is missing, and an untrained model."""
    from mmtune.builtin.digits import TUNE_TASKS, Split, write_split
    from mmtune.builtin.tiny_checkpoint import build_untrained
    from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

    rows = write_split("rows", Split(scenes=12, held_out=False, tasks=TUNE_TASKS, questions=1, seed=0), folder)
    rows.insert(5, {**rows[0], "image": "missing.png"})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    save_checkpoint(*build_untrained(seed=0), folder / "model")
    first = forking.Process(target=int)  # what all others are forked from imports now
    first.start()
    first.join()


def run_unbroken(folder: Path, stream: bool) -> Unbroken:
    """Train once, looking on."""
    run, recipe = _recipe(folder, f"unbroken-{stream}", stream)
    begun = time.monotonic()
    process, log = _start(recipe)
    try:
        first = _wait(process, lambda: _logged(log) > 0)
        saved, saving = 0.0, []
        for step in range(1, STEPS + 1):
            began = _wait(process, lambda step=step: _saving(run, step) or _checkpoint(run, step).exists())
            saved = _wait(process, _checkpoint(run, step).exists)
            saving.append(saved - began)
        process.join(TIMEOUT_S)
    finally:
        process.kill()
    assert process.exitcode == 0, log.read_text()
    return Unbroken(outcome(run), first - begun, saved - first, sorted(saving)[STEPS // 2], time.monotonic() - saved)


def kill_and_finish(moment: Moment, unbroken: Unbroken, folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Train, killed at a moment, and start again until the run ends.

    Returns:
        What each kill hit, and what differs from the unbroken run; nothing, if all is well.
    """
    run, recipe = _recipe(folder, name, moment.stream)
    hits = []
    for phase, share in moment.phases:
        process, log = _start(recipe)
        _sleep_into(phase, share, process, run, log, unbroken)
        process.kill()
        process.join()
        if process.exitcode == 0:  # a machine that is faster now than it was for the unbroken run
            shutil.rmtree(run.path)
            sooner = Moment(moment.stream, tuple((phase, share / 2) for phase, share in moment.phases))
            return kill_and_finish(sooner, unbroken, folder, name)
        hits.append(_hit(run, log))
        if process.exitcode != -9:
            return hits, [f"exit code {process.exitcode}: {log.read_text()[-500:]}"]
    process, log = _start(recipe)
    process.join(TIMEOUT_S)
    if process.exitcode != 0:
        process.kill()
        return hits, [f"started again, exit code {process.exitcode}: {log.read_text()[-500:]}"]
    names = ("the adapter", "the losses", "the data report")
    differs = [name for name, one, other in zip(names, outcome(run), unbroken.outcome, strict=True) if one != other]
    left = [path for path in (*run.path.rglob(".*"), *run.path.parent.glob(f".{run.path.name}.*")) if any(_inside(path))]
    return hits, differs + [f"left behind: {path.relative_to(folder)}" for path in left]


def outcome(run: RunDirectory) -> tuple[bytes, str, str]:
    """The adapter's weights, every step with its loss and gradient norm, and the data report."""
    records = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    losses = "\n".join(f"{each['step']} {each['loss']!r} {each['grad_norm']!r}" for each in records)
    return (run.adapter / "adapter_model.safetensors").read_bytes(), losses, run.data_report.read_text(encoding="utf-8")


def _recipe(folder: Path, name: str, stream: bool) -> tuple[RunDirectory, Path]:
    path, out = folder / f"{name}.yaml", folder / name
    settings = {"stream": str(stream).lower(), "workers": int(stream), "window": 5 if stream else 10_000}
    path.write_text(RECIPE.format(folder=folder, out=out, steps=STEPS, **settings), encoding="utf-8")
    return RunDirectory(out), path


def _start(recipe: Path) -> tuple[ForkServerProcess, Path]:
    log = recipe.with_suffix(".log")
    return command_line(["train", str(recipe), "--resume"], log), log


def _sleep_into(phase: str, share: float, process: ForkServerProcess, run: RunDirectory, log: Path, unbroken: Unbroken) -> None:
    """Events first and clocks after them, so that a machine that is faster or slower now is hit in the same phase."""
    if phase == "start-up":
        there = (lambda: True, run.path.exists, run.metrics.exists)[int(share * 3)]
        _wait(process, there)
        return process.join(share * 3 % 1 * unbroken.start_s / 6)
    last = max((step for step in range(1, STEPS + 1) if _checkpoint(run, step).exists()), default=0)
    steps = range(min(last + 1, STEPS), STEPS + 1)
    step = steps[int(share * len(steps))]
    share_of_step = share * len(steps) % 1
    if phase == "steps":
        _wait(process, lambda: step == steps[0] or _checkpoint(run, step - 1).exists())
        _wait(process, lambda: step > steps[0] or _logged(log) > 0)
        return process.join(share_of_step * unbroken.steps_s / STEPS)
    if phase == "saving":
        _wait(process, lambda: (_logged(log) > 0 and _saving(run, step)) or _checkpoint(run, step).exists())
        return process.join(share_of_step * unbroken.saving_s / 2)
    _wait(process, _checkpoint(run, STEPS).exists)
    return process.join(share * unbroken.end_s / 2)


def _wait(process: ForkServerProcess, there: Callable[[], bool]) -> float:
    """Until something is there or the process has ended; returns when."""
    end = time.monotonic() + TIMEOUT_S
    while not there() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    return time.monotonic()


def _hit(run: RunDirectory, log: Path) -> str:
    """What the process that wrote the log was doing when it was killed, as far as what it left shows."""
    if _logged(log) == 0:
        return "start-up" + ("" if run.path.exists() else ", nothing written")
    steps = [step for step in range(1, STEPS + 1) if _saving(run, step)]
    if steps:
        return f"saving checkpoint-{steps[0]}, {len(list(_inside(run.checkpoints / '.saving')))} files there"
    if not _checkpoint(run, STEPS).exists():
        return f"step {max(step for step in range(STEPS + 1) if step == 0 or _checkpoint(run, step).exists()) + 1}"
    return "finished" if run.summary.exists() else "final writing" + (", adapter there" if run.adapter.exists() else "")


def _logged(log: Path) -> int:
    return sum(line.startswith("step ") for line in log.read_text(encoding="utf-8").splitlines())


def _saving(run: RunDirectory, step: int) -> bool:
    return (run.checkpoints / ".saving" / f"checkpoint-{step}").exists()


def _checkpoint(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"checkpoint-{step}"


def _inside(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
