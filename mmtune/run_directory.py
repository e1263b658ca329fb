"""Run directory: the paths and records of one training run."""

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
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune import __version__
from mmtune.recipe.recipe import Recipe, needed_paths
from mmtune.utils.errors import CheckFailed, RecipeValueError, UserError
from mmtune.utils.files import check_replaceable, read_record, replace_bytes, report_disk_errors, resolve_link
from mmtune.utils.hub import missing_path_message
from mmtune.utils.locks import lock_holder, locked
from mmtune.utils.manifest import check_manifest
from mmtune.utils.threads import usable_cores
from mmtune.utils.torchvision_support import prepare_torchvision

if TYPE_CHECKING:
    from mmtune.distributed.context import DistributedContext

SAVING = ".saving"
"""The folder of a checkpoint until it is complete."""
GIT_TIMEOUT_S = 10.0
VISIBLE_TIMEOUT_S = 60.0
"""How long to wait for files of other processes: network file systems cache missing directories for up to half a minute."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "pillow", "numpy")


class RunDirectory:
    """Paths inside one run.

    Attributes:
        recipe: the resolved recipe, with all defaults and overrides.
        environment: versions, git commit, seed and command.
        data_report: rows that were checked, dropped and quarantined.
        metrics: one JSON object per logged step.
        tensorboard: TensorBoard's files, with `train.report_to: tensorboard`.
        trackers: by tracker, the id with which a resumed run continues the run in that tracker.
        modules: the adapted modules and the parameters by component.
        first_batch: the first batch of the run, as tokens, with its images.
        adapter: the PEFT adapter and its processor, for runs with a PEFT method.
        model: the full model, for runs without a PEFT method.
        base: the assembled base model, which the adapter needs.
        checkpoints: the folder of the checkpoints.
        summary: the metrics of the run, as JSON.
        serving: the last results of `mmtune serve --check`.
        report: what the run is, does and did, as HTML; written again while it trains.
        explanations: what some of the sample answers rest on, with `evaluate.explain`, as JSON: `explanations` is a list with the
            `id` of the row and the values of `mmtune explain --json`.
        profile: the time of a step by part, with `--profile`.
        trace: what ran in the profiled steps, for ui.perfetto.dev.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.data_report = path / "data_report.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.trackers = path / "trackers.json"
        self.modules = path / "modules.json"
        self.first_batch = path / "first_batch.json"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.base = path / "base"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.serving = path / "serving.json"
        self.report = path / "report.html"
        self.explanations = path / "explanations.json"
        self.profile = path / "profile.json"
        self.trace = path / "trace.json.gz"

    def answers(self, when: str) -> Path:
        """Held-out answers `before` or `after` tuning."""
        return self.path / f"answers_{when}.jsonl"

    def checkpoints_by_step(self) -> list[Path]:
        """The complete checkpoints, the oldest first."""
        return sorted(
            (path for path in self.checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()), key=step_of
        )

    def last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint that matches its manifest. Damaged checkpoints are printed and skipped.

        If training is running, it may remove listed checkpoints after writing a newer one, so they are listed again.
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
                    print(f"skipped: {error}")
                    damaged.add(path)
            else:
                return path
        return None

    def delete_checkpoints(self, limit: int | None, keep: Path | None = None) -> None:
        """Delete the oldest checkpoints beyond a limit, but not the newest one.

        Args:
            limit: how many to keep; None keeps all.
            keep: is not deleted, and counts.
        """
        checkpoints = self.checkpoints_by_step()
        protected = {checkpoints[-1], keep} & set(checkpoints) if checkpoints else set()
        spare = [path for path in checkpoints if path not in protected]
        for path in spare[: max(0, len(checkpoints) - max(limit, len(protected)))] if limit else ():
            shutil.rmtree(path)

    def read_summary(self) -> dict[str, Any]:
        """Read `summary.json`.

        Raises:
            UserError: the directory is not a finished run.
        """
        if not self.path.is_dir():
            raise UserError(missing_path_message(str(self.path), "run"))
        if not self.summary.is_file():
            raise UserError(f"{self.path} {self.unfinished_state() if self.recipe.is_file() else self._other_state()}")
        return read_record(self.summary)

    def unfinished_state(self) -> str:
        """The state of a run without a `summary.json`, and the command that continues it. Follows the run's path in a message."""
        if holder := lock_holder(resolve_link(self.path)):
            return f"is not finished: {holder} works on it; wait until it ends, or for a checkpoint"
        if self.is_leftover():
            return "stopped before its first step: the next `mmtune train` of its recipe replaces it"
        if checkpoints := self.checkpoints_by_step():
            return (
                f"is not finished: its last checkpoint is {checkpoints[-1].name}; `mmtune train RECIPE --resume` continues from "
                "it, --overwrite starts again"
            )
        if self.adapter.exists() or self.model.exists():
            return (
                f"finished training but stopped before its report: `mmtune eval {self.path}` evaluates it, `mmtune train RECIPE "
                "--overwrite` trains it again"
            )
        return (
            "is not finished and has no checkpoint (set train.save_strategy and save_steps to write them): `mmtune train RECIPE "
            "--overwrite` starts again"
        )

    def _other_state(self) -> str:
        """What a directory is that is not a run, with the runs above or in it. Follows its path in a message."""
        inside = sorted(path.parent.name for path in self.path.glob("*/recipe.yaml"))
        hint = f"; runs in it: {', '.join(inside[:10])}{', ...' if len(inside) > 10 else ''}" if inside else ""
        if RunDirectory(self.path.parent).environment.is_file():
            hint = f"; it is a part of the run {self.path.parent}"
        return f"is not a run: it has no recipe.yaml{hint}"

    def is_leftover(self) -> bool:
        """Whether the run stopped before its first step, as after a kill, so that nothing in it is useful."""
        if not self.path.is_dir() or not (self.recipe.is_file() or not any(self.path.iterdir())):
            return False
        logged = self.metrics.is_file() and self.metrics.stat().st_size > 0
        outcome = (self.summary, self.adapter, self.model)
        return not logged and not self.checkpoints_by_step() and not any(path.exists() for path in outcome)

    def update_summary(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Add metrics to `summary.json`, which is replaced atomically."""
        summary = {**(self.read_summary() if self.summary.is_file() else {}), **metrics}
        # The name of a task with lone surrogates is valid JSON as escapes \udcXX.
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        replace_bytes(self.summary, text.encode("utf-8", "backslashreplace"))
        return summary


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def run_of_checkpoint(path: Path) -> RunDirectory | None:
    """The run that a checkpoint directory belongs to, finished or not; None for any other path."""
    folder = path.resolve().parent
    run = RunDirectory(folder.parent.parent if folder.name == SAVING else folder.parent)
    is_inside = folder in (run.checkpoints.resolve(), run.checkpoints.resolve() / SAVING)
    return run if path.is_dir() and is_inside and run.recipe.is_file() else None


def check_output_dir(recipe: Recipe, overwrite: bool) -> None:
    """Check that the recipe's `output_dir` may be written. A run that stopped before its first step may always be replaced.

    Raises:
        UserError: it exists and `overwrite` is not given, it is not an earlier run, or it contains files that the recipe needs.
    """
    run = RunDirectory(Path(recipe.output_dir))
    leftover = run.is_leftover()
    if run.recipe.is_file() and not overwrite and not leftover:
        state = "is a finished run: --overwrite replaces it" if run.summary.is_file() else run.unfinished_state()
        raise RecipeValueError("output_dir", f"{run.path} {state}; give another output_dir to keep it")
    try:
        check_replaceable(run.path, overwrite or leftover, run.recipe.name, needed_paths(recipe))
    except UserError as error:
        raise RecipeValueError("output_dir", str(error)) from error


@contextlib.contextmanager
def locked_run(recipe: Recipe) -> Iterator[None]:
    """Lock the recipe's `output_dir` against other processes.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(resolve_link(Path(recipe.output_dir))))
        except UserError as error:
            raise RecipeValueError("output_dir", str(error)) from error
        yield


@contextlib.contextmanager
def new_run(recipe: Recipe, command: Sequence[str], overwrite: bool, dist: DistributedContext) -> Iterator[RunDirectory]:
    """Create the run directory with recipe and environment; the block then prepares the training.

    Only the main process creates it, the others wait for it. An earlier run is deleted when the block succeeds. If the block
    fails, the new directory is removed and the earlier run restored.

    Raises:
        UserError: as `check_output_dir`, or the directory cannot be created.
    """
    run = RunDirectory(resolve_link(Path(recipe.output_dir)))
    if not dist.is_main_process:
        _check_shared(run, dist)
        yield run
        return
    check_output_dir(recipe, overwrite)
    earlier = earlier_run_path(run)
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        if earlier.exists() and run.path.exists():  # an earlier process was killed at this point
            shutil.rmtree(run.path if _is_given_back(run) else earlier)
        if run.path.exists():
            run.path.rename(earlier)
        run.path.mkdir()
    except OSError as error:
        raise RecipeValueError("output_dir", f"cannot create {run.path}: {error.strerror}") from error
    try:
        with report_disk_errors(run.path), dist.unwinding():
            _write_inputs(run, recipe, command)
            _check_shared(run, dist)
            yield run
    except BaseException:
        shutil.rmtree(run.path)
        if earlier.exists():
            earlier.rename(run.path)
        raise
    if earlier.exists():
        RunDirectory(earlier).recipe.unlink(missing_ok=True)  # first, so that it is not restored after a kill
        shutil.rmtree(earlier)


def earlier_run_path(run: RunDirectory) -> Path:
    """The path of the earlier run while a new run at the same path is prepared."""
    return run.path.with_name(f".{run.path.name}.earlier")


def clear_leftover(run: RunDirectory) -> None:
    """Clean up after a process that was killed before its first step: restore the run that it was replacing.

    If there was no earlier run, the leftover is only reported; the new run replaces it.
    """
    if _is_given_back(run):
        if run.path.exists():
            shutil.rmtree(run.path)
        earlier_run_path(run).rename(run.path)
        print(f"output_dir: {run.path}: restored the earlier run: the run that was replacing it stopped before its first step")
    elif run.recipe.is_file() and run.is_leftover():
        print(f"output_dir: {run.path} is replaced: that run stopped before its first step")


def _is_given_back(run: RunDirectory) -> bool:
    """Whether the earlier run is complete and the run that was replacing it stopped before its first step."""
    return RunDirectory(earlier_run_path(run)).recipe.is_file() and (run.is_leftover() or not run.path.exists())


def wait_until_visible(is_visible: Callable[[], bool]) -> bool:
    """Wait at most `VISIBLE_TIMEOUT_S` for files that another process has written, and return whether they are visible."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while not (visible := is_visible()) and time.monotonic() <= deadline:
        time.sleep(1)
    return visible


def _check_shared(run: RunDirectory, dist: DistributedContext) -> None:
    """Check that every process sees the files of the main process in the run directory."""
    text = dist.broadcast_object(run.environment.read_text(encoding="utf-8") if dist.is_main_process else None)
    visible = wait_until_visible(lambda: run.environment.is_file() and run.environment.read_text(encoding="utf-8") == text)
    ranks = [str(rank) for rank, sees in enumerate(dist.all_gather_object(visible)) if not sees]
    if ranks:
        raise RecipeValueError(
            "output_dir",
            f"process {', '.join(ranks)} does not see the files of process 0 in {run.path.absolute()}; expected a directory on a "
            "file system that all machines share",
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
    """Versions of mmtune and its libraries."""
    names = (*LIBRARIES, "deepspeed") if find_spec("deepspeed") else LIBRARIES
    return {"mmtune": __version__} | {name: metadata.version(name) for name in names}


def git_commit() -> str | None:
    """The commit of the working directory's repository; None outside one.

    `+changes` is added if files differ from it, and `+unchecked` if that check took longer than `GIT_TIMEOUT_S` seconds.
    Programs that the repository's configuration names are not run, because its author may not be trusted.
    """
    try:
        commit = _git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    try:
        # Filters of the user's own configuration, such as git-lfs, are kept.
        listed = _git("config", "--show-scope", "--null", "--name-only", "--get-regexp", r"^filter\.").split("\0")
        scopes = zip(listed[::2], listed[1::2], strict=False)
        foreign = {key for scope, key in scopes if scope not in ("system", "global", "command")}
    except subprocess.CalledProcessError:  # no filter
        foreign = set()
    try:
        changes = _git("status", "--porcelain", "--ignore-submodules=all", settings=dict.fromkeys(foreign, ""))
    except (OSError, subprocess.SubprocessError):
        return f"{commit}+unchecked"
    return commit + ("+changes" if changes.strip() else "")


def _git(*arguments: str, settings: Mapping[str, str] | None = None) -> str:
    settings = {"core.fsmonitor": "false"} | dict(settings or {})
    user_count = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(user_count) if user_count.isdecimal() else 0  # keep the user's own settings
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
        timeout=GIT_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    return done.stdout


def peak_memory_mb() -> float:
    """The largest resident memory of this process so far, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
