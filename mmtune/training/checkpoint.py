"""Checkpoints: writing them, the last good one of a run, and whether a run may resume from it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from mmtune.data.batching.sample_stream import SampleStream
from mmtune.data.data_report import DataReport
from mmtune.distributed.context import DistributedContext
from mmtune.planning.plan_cache import file_signatures
from mmtune.recipe.pass_through.arguments import format_value
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.run_directory import SAVING, RunDirectory, step_of, wait_until_visible
from mmtune.utils.errors import UserError
from mmtune.utils.files import apply_umask, fsync, fsync_tree, read_record
from mmtune.utils.manifest import check_manifest, file_names, write_manifest

REPORT_FILE = "data_report.json"
STRATEGY_FILE = "strategy.json"
MAY_CHANGE = (
    "evaluate.",
    "train.logging_",
    "train.save_",
    "train.dataloader_num_workers",
    "train.dataloader_pin_memory",
    "train.dataloader_prefetch_factor",
    "train.dataloader_persistent_workers",
    "train.report_to",
    "train.disable_tqdm",
    "data.max_bad_fraction",
    "data.max_nonfinite_steps",
    "data.check_rows",
)
"""Keys that may change when a run resumes: no step depends on them."""


def finalize_checkpoint(
    partial: Path, checkpoints: Path, report: DataReport, dist: DistributedContext, files: dict[str, Any], limit: int | None
) -> None:
    """Give a checkpoint that is written in full its name, and delete older ones past the limit.

    Until then it lies under another name, so that whatever is called a checkpoint is a whole one.

    Args:
        made: the finished directory, on the file system of `checkpoints`.
        files: by name, what the data files are known by.
        limit: how many to keep; None keeps all.
    """
    report.write(partial / REPORT_FILE)
    (partial / STRATEGY_FILE).write_text(json.dumps({"strategy": dist.strategy, "files": files}) + "\n", encoding="utf-8")
    apply_umask(partial)
    write_manifest(partial)
    fsync_tree(partial)
    partial.rename(checkpoints / partial.name)
    fsync(checkpoints)  # before an older one goes
    for old in RunDirectory(checkpoints.parent).checkpoints_by_step()[:-limit] if limit else ():
        shutil.rmtree(old)


def wait_for_files(folder: Path, names: set[str]) -> None:
    """Wait for files that processes of other machines have written.

    Raises:
        UserError: they do not come.
    """
    if not wait_until_visible(lambda: names <= file_names(folder)):
        missing = ", ".join(sorted(names - file_names(folder)))
        raise UserError(f"{folder}: process 0 does not see {missing}, which others have written")


def last_checkpoint(run: RunDirectory) -> Path | None:
    """The newest checkpoint of a run that is as it was written; damaged ones are named and passed over. None before the first.

    Raises:
        UserError: all are damaged, or there are none and the training has been done.
    """
    if (last := run.last_good_checkpoint()) is not None:
        return last
    if run.checkpoints_by_step():
        raise UserError(f"resume: no checkpoint of {run.path} is as it was written; --overwrite trains it again")
    if run.adapter.exists() or run.model.exists():
        raise UserError(
            f"resume: {run.path} has been trained, ended before its report, and has no checkpoint; `mmtune eval {run.path}` "
            "evaluates what it has left, --overwrite trains it again"
        )
    return None


def named_checkpoint(run: RunDirectory, checkpoint: Path) -> Path:
    """A checkpoint of a run that somebody has named.

    Raises:
        UserError: it is not the run's.
        CheckFailed: it is damaged.
    """
    if checkpoint.resolve().parent != run.checkpoints.resolve():
        raise UserError(f"resume: {checkpoint} is no checkpoint of {run.path}; those are in {run.checkpoints}")
    check_manifest(checkpoint)
    return checkpoint


def checkpoint_to_resume(run: RunDirectory, resume: bool | Path) -> Path | None:
    """The checkpoint that a run resumes from: none, its last good one, or the one at a path.

    Raises:
        UserError, CheckFailed: as `last_checkpoint` and `named_checkpoint`.
    """
    if resume is False:
        return None
    checkpoint = last_checkpoint(run) if resume is True else named_checkpoint(run, Path(resume))
    if checkpoint is None:
        print(f"resume: {run.path} has no checkpoint yet, so it begins; train.save_strategy and save_steps write them")
    return checkpoint


def finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the recipe's run, if that has finished.

    Raises:
        UserError: the finished run is another recipe's.
    """
    run = RunDirectory(Path(recipe.output_dir))
    if not run.summary.is_file():
        return None
    check_same_recipe(recipe, run)
    print(f"resume: {run.path} is finished; --overwrite trains it again")
    return run.read_summary()


def restore_training_state(
    checkpoint: Path, run: RunDirectory, report: DataReport, rows: Any, arguments: TrainingArguments
) -> None:
    """Put the data, the report and the metrics where the checkpoint left them."""
    step = step_of(checkpoint)
    print(f"resume: from {checkpoint}, after {step} steps")
    report.load(checkpoint / REPORT_FILE)
    if arguments.process_index == 0:
        truncate_to_step(run, step)
    if isinstance(rows, SampleStream):
        rows.start_at(step * arguments.gradient_accumulation_steps)
        arguments.ignore_data_skip = True  # the stream skips them without parsing


def check_resumable(recipe: Recipe, run: RunDirectory, checkpoint: Path, dist: DistributedContext) -> None:
    """
    Raises:
        UserError: the run is finished, or another recipe's, in a way that would make it another run, or of another layout.
    """
    if run.summary.is_file():
        raise UserError(f"resume: {run.path} is finished; --overwrite trains it again")
    check_same_recipe(recipe, run)
    then = read_record(checkpoint / STRATEGY_FILE, strategy=str, files=dict)
    if then["strategy"] != dist.strategy:
        raise UserError(f"resume: {checkpoint} was written by {then['strategy']}, and this is {dist.strategy}; launch as before")
    files = file_signatures(recipe.data.train)
    changed = [name for name in sorted({*files, *then["files"]}) if files.get(name) != then["files"].get(name)]
    if changed:
        raise UserError(f"resume: {', '.join(changed)} changed since {checkpoint} was written; the rows would be others")


def check_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Print what differs from the recipe of a run.

    Raises:
        UserError: it would make it another run.
    """
    before, now = (flatten(each.model_dump(mode="json")) for each in (load_recipe(run.recipe), recipe))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    for key in changed:
        print(f"resume: {key} was {format_value(before.get(key))}, and is {format_value(now.get(key))}")
    wrong = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if wrong:
        raise UserError(
            f"resume: {', '.join(wrong)} differ from {run.recipe}, and the run would become another; give it a new output_dir, "
            "or begin again with --overwrite"
        )


def truncate_to_step(run: RunDirectory, step: int) -> None:
    """Take out of a run what came after a step or is unfinished: checkpoints, lines of `metrics.jsonl`. It all comes again."""
    for unfinished in (run.checkpoints / SAVING, *run.path.glob(".*.partial")):
        shutil.rmtree(unfinished, ignore_errors=True)
    for later in run.checkpoints_by_step():
        if step_of(later) > step:
            shutil.rmtree(later)
    metrics = run.metrics
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n") and _logged_step(line) <= step]
    shorter = run.checkpoints / metrics.name
    shorter.write_text("".join(whole), encoding="utf-8")
    shorter.replace(metrics)  # at once: a kill in between would take lines that do not come again


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:  # where a machine went down
        print(f"resume: a line of metrics.jsonl is left out that is none: {line[:40]!r}")
        return math.inf


def flatten(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key."""
    if isinstance(values, Mapping):
        return {
            name: value
            for part, inner in values.items()
            for name, value in flatten(inner, f"{key}.{part}" if key else part).items()
        }
    return {key: values}
