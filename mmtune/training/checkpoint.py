"""Checkpoints: finalizing them, choosing one to resume from, and checking that a run may resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from mmtune.console.library_output import rank_prefix
from mmtune.data.batching.sample_stream import SampleStream
from mmtune.data.data_report import DataReport
from mmtune.data.sources.row_cache import file_signatures
from mmtune.distributed.context import DistributedContext
from mmtune.recipe.pass_through.arguments import format_value
from mmtune.recipe.recipe import Recipe, Source, load_recipe
from mmtune.run_directory import SAVING, RunDirectory, check_output_dir, clear_leftover, step_of, wait_until_visible
from mmtune.utils.errors import UserError
from mmtune.utils.files import apply_umask, fsync, fsync_tree, read_record, resolve_link
from mmtune.utils.manifest import check_manifest, digests, file_names, write_manifest

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
"""Keys that may change when a run is resumed: no training step depends on them. Those of `evaluate` may not with
`train.eval_strategy`: the best step depends on them."""


def finalize_checkpoint(
    temporary: Path,
    checkpoints: Path,
    report: DataReport,
    dist: DistributedContext,
    files: dict[str, Any],
    hashed: Mapping[str, str],
) -> None:
    """Rename a completely written checkpoint to its final name.

    Before that it has a temporary name, so that every directory with the name of a checkpoint is complete.

    Args:
        temporary: the complete directory, on the file system of `checkpoints`.
        files: the signatures of the data files by name.
        hashed: from `hash_files`.
    """
    report.write(temporary / REPORT_FILE)
    (temporary / STRATEGY_FILE).write_text(json.dumps({"strategy": dist.strategy, "files": files}) + "\n", encoding="utf-8")
    apply_umask(temporary)
    write_manifest(temporary, hashed)
    fsync_tree(temporary)
    temporary.rename(checkpoints / temporary.name)
    fsync(checkpoints)  # before an older one is deleted


def hash_files(folder: Path, dist: DistributedContext) -> dict[str, str]:
    """The SHA-256 of every file that any process sees in a folder, by name: each process hashes its share of them.

    Raises:
        UserError: files that processes on other machines have written do not become visible.
    """
    names = sorted(set[str]().union(*dist.all_gather_object(file_names(folder))))
    own = names if dist.is_main_process else names[dist.rank :: dist.size]
    wait_for_files(folder, set(own), dist.rank)
    shares = dist.all_gather_object(digests(folder, names[dist.rank :: dist.size]))
    return {name: digest for share in shares for name, digest in share.items()}


def wait_for_files(folder: Path, names: set[str], rank: int) -> None:
    """Wait for files that processes on other machines have written; arguments and errors as `hash_files`."""
    if not wait_until_visible(lambda: names <= file_names(folder)):
        missing = ", ".join(sorted(names - file_names(folder)))
        raise UserError(
            f"{folder}: process {rank} does not see files of other processes: {missing}; expected a shared file system"
        )


def last_checkpoint(run: RunDirectory) -> Path | None:
    """The newest checkpoint of a run that matches its manifest. Damaged ones are printed and skipped. None if there is none yet.

    Raises:
        UserError: all are damaged, or there are none and training is finished.
    """
    if (last := run.last_good_checkpoint()) is not None:
        return last
    if run.checkpoints_by_step():
        raise UserError(f"resume: all checkpoints of {run.path} are damaged; --overwrite trains it again")
    if run.adapter.exists() or run.model.exists():
        raise UserError(
            f"resume: {run.path} finished training but stopped before its report, and has no checkpoint; `mmtune eval "
            f"{run.path}` evaluates it, --overwrite trains it again"
        )
    return None


def named_checkpoint(run: RunDirectory, checkpoint: Path) -> Path:
    """Check that a path is a valid checkpoint of a run, and return it.

    Raises:
        UserError: it is not a checkpoint of the run.
        CheckFailed: it is damaged.
    """
    if checkpoint.resolve().parent != run.checkpoints.resolve():
        raise UserError(f"resume: expected a checkpoint of {run.path} (in {run.checkpoints}), got {checkpoint}")
    check_manifest(checkpoint)
    return checkpoint


def checkpoint_to_resume(run: RunDirectory, resume: bool | Path) -> Path | None:
    """The checkpoint that a run resumes from: none, its last valid one, or the given one.

    Raises:
        UserError, CheckFailed: as `last_checkpoint` and `named_checkpoint`.
    """
    if resume is False:
        return None
    checkpoint = last_checkpoint(run) if resume is True else named_checkpoint(run, Path(resume))
    if checkpoint is None:
        print(f"resume: {run.path} has no checkpoint yet: it starts from the beginning; set train.save_strategy and save_steps")
    return checkpoint


def choose_start(recipe: Recipe, overwrite: bool, resume: bool | Path) -> tuple[Path | None, bool]:
    """The checkpoint that training resumes from, None for a new run; and whether an earlier run at `output_dir` is replaced.

    Raises:
        UserError, CheckFailed: as `checkpoint_to_resume`, or for a new run as `check_output_dir`.
    """
    run = RunDirectory(Path(recipe.output_dir))
    if not (rank_prefix() or resume or overwrite):  # in the main process
        clear_leftover(RunDirectory(resolve_link(run.path)))
    checkpoint = checkpoint_to_resume(run, resume)
    if checkpoint is None:
        overwrite = overwrite or bool(resume)  # leftovers of a run that never reached its first checkpoint
        check_output_dir(recipe, overwrite)
    return checkpoint, overwrite


def finished_summary(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the recipe's run if it is finished, otherwise None.

    Raises:
        UserError: the finished run is of another recipe.
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
    """Restore the position in the data, the data report and the metrics of a checkpoint."""
    step = step_of(checkpoint)
    print(f"resume: from {checkpoint}, after {step} steps")
    report.load(checkpoint / REPORT_FILE)
    if arguments.process_index == 0:
        truncate_to_step(run, step)
    if isinstance(rows, SampleStream):
        rows.start_at(step * arguments.gradient_accumulation_steps)
        arguments.ignore_data_skip = True  # the stream skips rows itself, without parsing them
    arguments.eval_on_start = False


def check_resumable(recipe: Recipe, run: RunDirectory, checkpoint: Path, dist: DistributedContext) -> None:
    """Check that a run may resume from a checkpoint with this recipe and launch.

    Raises:
        UserError: the run is finished, or the recipe, the parallelism strategy or the data files differ.
    """
    if run.summary.is_file():
        raise UserError(f"resume: {run.path} is finished; --overwrite trains it again")
    check_same_recipe(recipe, run)
    saved = read_record(checkpoint / STRATEGY_FILE, strategy=str, files=dict)
    if saved["strategy"] != dist.strategy:
        raise UserError(f"resume: expected {saved['strategy']} as for {checkpoint}, got {dist.strategy}; launch as before")
    if recipe.train.get("load_best_model_at_end"):
        best = read_record(checkpoint / TRAINER_STATE_NAME).get("best_model_checkpoint")
        if best is not None and not Path(best).is_dir():
            raise UserError(f"resume: {best} is missing, the best checkpoint until {checkpoint}; restore it, or use --overwrite")
    files = file_signatures(fixed_sources(recipe))
    changed = [name for name in sorted({*files, *saved["files"]}) if files.get(name) != saved["files"].get(name)]
    if changed:
        raise UserError(
            f"resume: {', '.join(changed)} changed since {checkpoint} was written; restore them, or start again with --overwrite"
        )


def fixed_sources(recipe: Recipe) -> tuple[Source, ...]:
    """The sources whose files must not change when a run is resumed."""
    held_out = recipe.evaluate.sources if recipe.evaluate and recipe.evaluates_while_training else ()
    return (*recipe.data.train, *held_out)


def check_same_recipe(recipe: Recipe, run: RunDirectory) -> None:
    """Print the keys that differ from the recipe of a run.

    Raises:
        UserError: a key differs that must not change when a run is resumed.
    """
    before, now = (flatten(each.model_dump(mode="json")) for each in (load_recipe(run.recipe), recipe))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    for key in changed:
        print(f"resume: {key} changed from {format_value(before.get(key))} to {format_value(now.get(key))}")
    may_change = tuple(key for key in MAY_CHANGE if not (key == "evaluate." and recipe.evaluates_while_training))
    fixed = [key for key in changed if not key.startswith((*may_change, "evaluate.samples", "evaluate.track_answers"))]
    if fixed:
        raise UserError(
            f"resume: expected the values of {run.recipe} for {', '.join(fixed)}; restore them, give a new output_dir, or start "
            "again with --overwrite"
        )


def truncate_to_step(run: RunDirectory, step: int) -> None:
    """Remove from a run what is unfinished or after a step: checkpoints and lines of `metrics.jsonl`. They are written again."""
    for unfinished in (run.checkpoints / SAVING, *run.path.glob(".*.partial")):
        shutil.rmtree(unfinished, ignore_errors=True)
    for later in run.checkpoints_by_step():
        if step_of(later) > step:
            shutil.rmtree(later)
    metrics = run.metrics
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n") and _logged_step(line) <= step]
    truncated = run.checkpoints / metrics.name
    truncated.write_text("".join(complete), encoding="utf-8")
    truncated.replace(metrics)  # atomically: a kill must not lose lines before the step


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:  # after a crash of the machine
        print(f"resume: removed a damaged line of metrics.jsonl: {line[:40]!r}")
        return math.inf


def flatten(values: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one mapping by dotted keys."""
    if isinstance(values, Mapping):
        return {
            name: value
            for part, inner in values.items()
            for name, value in flatten(inner, f"{key}.{part}" if key else part).items()
        }
    return {key: values}
