"""The directory that a run leaves behind: what went in, what happened, what came out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune import __version__
from mmtune.recipe.recipe import Recipe, needed_paths
from mmtune.utils.errors import CheckFailed, RecipeValueError, UserError
from mmtune.utils.files import check_replaceable, linked_directory, read_record, replace_text, writing
from mmtune.utils.hub import missing
from mmtune.utils.locks import locked
from mmtune.utils.manifest import check_manifest
from mmtune.utils.threads import usable_cores
from mmtune.utils.torchvision_support import prepare_torchvision

if TYPE_CHECKING:
    from mmtune.distributed.context import DistributedContext

SAVING = ".saving"
"""Where a checkpoint lies until it is whole."""
GIT_S = 10.0
SEEN_WITHIN_S = 60.0
"""A network file system may remember for half a minute that a directory was not there."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "pillow", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: every default filled in, every override applied."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions, git commit, seed and command."""
        return self.path / "environment.json"

    @property
    def data_report(self) -> Path:
        """Rows that were checked, dropped and quarantined."""
        return self.path / "data_report.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for every logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, with `train.report_to: tensorboard`."""
        return self.path / "tensorboard"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        """The PEFT adapter and its processor, for runs with a PEFT method."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, for runs without a PEFT method."""
        return self.path / "model"

    @property
    def base(self) -> Path:
        """The base that was assembled from parts, which the adapter needs."""
        return self.path / "base"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints_by_step(self) -> list[Path]:
        """The checkpoints that have their names, the oldest first."""
        return sorted(
            (path for path in self.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()), key=step_of
        )

    def last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint that is as it was written; damaged ones are printed and passed over.

        Training that goes on may remove those that were listed here first. It has a newer one then: they are listed again.
        """
        damaged: set[Path] = set()
        while checkpoints := [path for path in self.checkpoints_by_step() if path not in damaged]:
            path = checkpoints[-1]
            try:
                check_manifest(path)
            except FileNotFoundError:  # it is being removed
                continue
            except (CheckFailed, UserError) as error:
                if path.is_dir():
                    print(f"passed over: {error}")
                    damaged.add(path)
            else:
                return path
        return None

    @property
    def summary(self) -> Path:
        """The run's figures, for machines."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The run's figures and sample answers, for people."""
        return self.path / "report.html"

    def answers(self, when: str) -> Path:
        """Held-out answers `before` or `after` tuning."""
        return self.path / f"answers_{when}.jsonl"

    def read_summary(self) -> dict[str, Any]:
        """
        Raises:
            UserError: for a directory that is no finished run.
        """
        if not self.path.is_dir():
            raise UserError(missing(str(self.path), "run"))
        if not self.summary.is_file():
            state = self.unfinished() if self.recipe.is_file() else "is not a run: it has no recipe.yaml"
            raise UserError(f"{self.path} {state}")
        return read_record(self.summary)

    def unfinished(self) -> str:
        """How far a run without a `summary.json` has come, and which command goes on with it; follows the run's path."""
        if self.is_leftover():
            return "was started and has not finished a step: the next `mmtune train` of its recipe replaces it"
        if checkpoints := self.checkpoints_by_step():
            return (
                f"has not finished: its last checkpoint is {checkpoints[-1].name}; `mmtune train RECIPE --resume` goes on from "
                "there, --overwrite begins again"
            )
        if self.adapter.exists() or self.model.exists():
            return (
                f"has been trained and ended before its report: `mmtune eval {self.path}` evaluates what it has left, `mmtune "
                "train RECIPE --overwrite` trains it again"
            )
        return (
            "has not finished, and stopped before its first checkpoint (train.save_strategy and save_steps write them): `mmtune "
            "train RECIPE --overwrite` begins again"
        )

    def is_leftover(self) -> bool:
        """Whether this is what a start left that did not finish a step, as of a killed process: nothing in it is of use."""
        if not self.path.is_dir() or not (self.recipe.is_file() or not any(self.path.iterdir())):
            return False
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        outcome = (self.summary, self.adapter, self.model)
        return not logged and not self.checkpoints_by_step() and not any(path.exists() for path in outcome)

    def update_summary(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Add figures to `summary.json`, which is never half written."""
        summary = {**(self.read_summary() if self.summary.is_file() else {}), **figures}
        replace_text(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        return summary


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.rpartition("-")[2])


def run_of_checkpoint(path: Path) -> RunDirectory | None:
    """The run whose checkpoint a directory is, one that is not finished as well; None for any other path."""
    folder = path.resolve().parent
    run = RunDirectory(folder.parent.parent if folder.name == SAVING else folder.parent)
    is_inside = folder in (run.checkpoints.resolve(), run.checkpoints.resolve() / SAVING)
    return run if path.is_dir() and is_inside and run.recipe.is_file() else None


def check_output_dir(recipe: Recipe, overwrite: bool) -> None:
    """
    Raises:
        UserError: the recipe's `output_dir` exists and `overwrite` is not given, it is no earlier run, or it holds what the
            recipe needs. What a start has left that did not finish a step may be replaced without `overwrite`.
    """
    run = RunDirectory(Path(recipe.output_dir))
    leftover = run.is_leftover()
    if run.recipe.is_file() and not overwrite and not leftover:
        state = "is a finished run: --overwrite replaces it" if run.summary.is_file() else run.unfinished()
        raise RecipeValueError("output_dir", f"{run.path} {state}; another output_dir keeps it")
    try:
        check_replaceable(run.path, overwrite or leftover, run.recipe.name, needed_paths(recipe))
    except UserError as error:
        raise RecipeValueError("output_dir", f"{error}") from error


@contextlib.contextmanager
def locked_run(recipe: Recipe) -> Iterator[None]:
    """Inside, no other process trains into the recipe's `output_dir`.

    Raises:
        UserError: one does; it is named.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(linked_directory(Path(recipe.output_dir))))
        except UserError as error:
            raise RecipeValueError("output_dir", f"{error}") from error
        yield


@contextlib.contextmanager
def new_run(recipe: Recipe, command: Sequence[str], overwrite: bool, dist: DistributedContext) -> Iterator[RunDirectory]:
    """Make the run's directory and write what went in; the block prepares what will train.

    Of several processes the first does, and the others wait until it is there.

    An earlier run goes when the block ends well. If the block fails, the earlier run is back, or nothing is there.

    Raises:
        UserError: as `check_output_dir`, or the directory cannot be made.
    """
    run = RunDirectory(linked_directory(Path(recipe.output_dir)))
    if not dist.is_main_process:
        _check_shared(run, dist)
        yield run
        return
    check_output_dir(recipe, overwrite)
    earlier = set_aside(run)
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        if earlier.exists() and run.path.exists():  # a process was killed here
            shutil.rmtree(run.path if _is_given_back(run) else earlier)
        if run.path.exists():
            run.path.rename(earlier)
        run.path.mkdir()
    except OSError as error:
        raise RecipeValueError("output_dir", f"cannot make {run.path}: {error.strerror}") from error
    try:
        with writing(run.path), dist.unwinding():
            _write_inputs(run, recipe, command)
            _check_shared(run, dist)
            yield run
    except BaseException:
        shutil.rmtree(run.path)
        if earlier.exists():
            earlier.rename(run.path)
        raise
    if earlier.exists():
        RunDirectory(earlier).recipe.unlink(missing_ok=True)  # first, so that what a kill leaves of it is not given back
        shutil.rmtree(earlier)


def set_aside(run: RunDirectory) -> Path:
    """Where the earlier run is while a new one with the same path is prepared."""
    return run.path.with_name(f".{run.path.name}.earlier")


def clear_leftover(run: RunDirectory) -> None:
    """Make up for a process that was killed before its first step: give back the run that it was to replace, and say so.

    What such a process has left where there was no run is only named: the new run takes its place.
    """
    if _is_given_back(run):
        if run.path.exists():
            shutil.rmtree(run.path)
        set_aside(run).rename(run.path)
        print(f"output_dir: {run.path} is the earlier run again: a start that was to replace it ended before its first step")
    elif run.recipe.is_file() and run.is_leftover():
        print(f"output_dir: {run.path} is replaced: it is left of a start that ended before its first step")


def _is_given_back(run: RunDirectory) -> bool:
    """Whether an earlier run was set aside whole for one that did not finish a step."""
    return RunDirectory(set_aside(run)).recipe.is_file() and (run.is_leftover() or not run.path.exists())


def becomes_seen(is_seen: Callable[[], bool]) -> bool:
    """Wait for what another process has written, `SEEN_WITHIN_S` at most; whether it has come."""
    patience = time.monotonic() + SEEN_WITHIN_S
    while not (seen := is_seen()) and time.monotonic() <= patience:
        time.sleep(1)
    return seen


def _check_shared(run: RunDirectory, dist: DistributedContext) -> None:
    """Wait for what the first process has written, and for every other to see it."""
    written = dist.broadcast_object(run.environment.read_text(encoding="utf-8") if dist.is_main_process else None)
    seen = becomes_seen(lambda: run.environment.is_file() and run.environment.read_text(encoding="utf-8") == written)
    blind = [str(rank) for rank, sees in enumerate(dist.all_gather_object(seen)) if not sees]
    if blind:
        raise RecipeValueError(
            "output_dir",
            f"process {', '.join(blind)} does not see what process 0 wrote to {run.path.absolute()}; a directory on "
            "a file system that all machines share is right",
        )


def _write_inputs(run: RunDirectory, recipe: Recipe, command: Sequence[str]) -> None:
    run.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    torchvision = prepare_torchvision()
    environment = {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(),
        "seed": recipe.train.get("seed", 42),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "usable_cores": usable_cores(),
        "git_commit": git_commit(),
        "image_backend": "torchvision" if torchvision.usable else "pil",
        "torchvision": torchvision.detail,
        "versions": versions(),
    }
    run.environment.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Of mmtune and what it stands on."""
    names = (*LIBRARIES, "deepspeed") if find_spec("deepspeed") else LIBRARIES
    return {"mmtune": __version__} | {name: metadata.version(name) for name in names}


def git_commit() -> str | None:
    """The commit of the working directory's repository; None outside one.

    `+changes` is added when its files differ, and `+unchecked` when that took longer than `GIT_S` seconds. No program that the
    repository's own configuration names is run: whoever wrote it need not be who trains here.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    try:
        # A filter that the user's own configuration sets up, as git-lfs does, stays.
        listed = _git("config", "--show-scope", "--null", "--name-only", "--get-regexp", r"^filter\.").split("\0")
        scopes = zip(listed[::2], listed[1::2], strict=False)
        foreign = {key for scope, key in scopes if scope not in ("system", "global", "command")}
    except subprocess.CalledProcessError:  # there is none
        foreign = set()
    try:
        changes = _git("status", "--porcelain", "--ignore-submodules=all", settings=dict.fromkeys(foreign, ""))
    except (OSError, subprocess.SubprocessError):
        return f"{commit}+unchecked"
    return commit + ("+changes" if changes.strip() else "")


def _git(*arguments: str, settings: Mapping[str, str] | None = None) -> str:
    settings = {"core.fsmonitor": "false"} | dict(settings or {})
    given = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(given) if given.isdecimal() else 0  # the settings that the user has given so stay
    count = str(first + len(settings))
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_CONFIG_COUNT": count}
    for number, (key, value) in enumerate(settings.items(), first):
        environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    done = subprocess.run(
        ["git", *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=GIT_S,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    return done.stdout


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
