"""Trained weights on disk: the adapter or model of a run, or the last valid checkpoint of an unfinished run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.models.checkpoints.locate_base import BUILTIN
from mmtune.run_directory import RunDirectory, run_of_checkpoint
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object
from mmtune.utils.hub import locate_checkpoint
from mmtune.utils.manifest import MANIFEST, check_manifest

ADAPTER_CONFIG = "adapter_config.json"
CONFIG_NAME = "config.json"
TRAINER_STATE_NAME = "trainer_state.json"
INITIAL_FACTORS = "initial.safetensors"
"""In a checkpoint: the adapter's tensors before training, if its initialization changed the base's weights."""


@dataclass(frozen=True)
class TrainedWeights:
    """The location of trained weights.

    Attributes:
        path: the directory of an adapter or model, or a hub id.
        run: the run directory of the weights; one without a recipe if they do not belong to a run.
        step: the optimizer step of a checkpoint, or None.
        steps: the number of optimizer steps of a checkpoint's run, or None.
    """

    path: Path
    run: RunDirectory
    step: int | None = None
    steps: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter, not a full model."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are a checkpoint, from which training can resume."""
        return self.step is not None


def find_trained_weights(path: Path) -> TrainedWeights:
    """The weights of a run, of a checkpoint, or of an adapter or model directory; other paths are returned as hub ids.

    For an unfinished run, the last valid checkpoint is used, and its name is printed.

    Raises:
        UserError: a directory without weights, or a checkpoint that is incomplete.
        CheckFailed: a damaged checkpoint.
    """
    run = RunDirectory(path)
    for folder in (run.adapter, run.model):
        if _has_weights(folder):
            return TrainedWeights(folder, run)
    checkpoint_run = run_of_checkpoint(path)
    is_copy = all((path / name).is_file() for name in (TRAINER_STATE_NAME, MANIFEST))  # a checkpoint outside its run
    if checkpoint_run is not None or is_copy:
        check_manifest(path)
        return _checkpoint(path, checkpoint_run or run)
    if _has_weights(path) or not path.is_dir():
        return TrainedWeights(path, run)
    if run.checkpoints_by_step() and run.recipe.is_file():
        trained = _last_checkpoint(run)
        print(
            f"{path}: the run has not finished; using {trained.path.name}, step {trained.step} of {trained.steps}; resume with "
            "`mmtune train RECIPE --resume`"
        )
        return trained
    if run.recipe.is_file():
        raise UserError(f"{path} {run.unfinished_state()}")
    raise UserError(f"{path}: expected a finished run (adapter/ or model/), a checkpoint or a model ({CONFIG_NAME}), found none")


def locate_trained_weights(path: Path) -> TrainedWeights:
    """The weights of a path, a hub id or a built-in name; see `find_trained_weights`.

    Raises:
        UserError: the path or repository does not exist, or the hub cannot be reached.
        CheckFailed: a damaged checkpoint.
    """
    trained = find_trained_weights(BUILTIN.get(str(path), path))
    with report_removed_checkpoint(trained):
        if not trained.path.is_dir():
            locate_checkpoint(str(path), "run or model")  # an unreachable hub is reported before libraries are imported
    return trained


@contextmanager
def report_removed_checkpoint(trained: TrainedWeights) -> Iterator[None]:
    """Report an error while reading a checkpoint as its removal by a running training, if that is the cause.

    Raises:
        UserError: training removed the checkpoint. Other errors are not changed.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if trained.is_checkpoint and not (trained.path / TRAINER_STATE_NAME).is_file():
            raise UserError(
                f"{trained.path}: training removed this checkpoint before it was read; run the command again with "
                f"{trained.run.path} to use its newest checkpoint"
            ) from error
        raise


def _last_checkpoint(run: RunDirectory) -> TrainedWeights:
    """The newest valid checkpoint. A running training may remove a checkpoint while it is read; it then has a newer one."""
    while (last := run.last_good_checkpoint()) is not None:
        try:
            return _checkpoint(last, run)
        except FileNotFoundError:
            if last.is_dir():
                raise
    raise UserError(f"{run.path}: the run has not finished and has no undamaged checkpoint")


def _has_weights(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or (path / CONFIG_NAME).is_file()


def _checkpoint(path: Path, run: RunDirectory) -> TrainedWeights:
    state = read_json_object(path / TRAINER_STATE_NAME)
    steps = state.get("global_step"), state.get("max_steps")
    if not all(isinstance(step, int) for step in steps):
        raise UserError(f"{path / TRAINER_STATE_NAME}: global_step, max_steps: expected two integers, got {steps}")
    return TrainedWeights(path, run, *steps)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The content of an adapter's `adapter_config.json`.

    Raises:
        UserError: a missing or invalid file.
    """
    try:
        return read_json_object(adapter / ADAPTER_CONFIG)
    except (OSError, UserError) as error:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: cannot read the adapter configuration: {error}") from error


def read_adapter_base(adapter: Path) -> str:
    """The base that an adapter's configuration names, or the `base/` of its run if that path does not exist (a moved run).

    Raises:
        UserError: a missing or invalid `adapter_config.json`.
    """
    config = read_adapter_config(adapter)
    if not isinstance(base := config.get("base_model_name_or_path"), str):
        raise UserError(f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path: expected a hub id or a path, got {base!r}")
    if base == "base" or not Path(base).is_dir():
        for folder in (adapter.parent, adapter.parent.parent):  # the run of an adapter/, and the run of a checkpoint
            if (folder / "base" / "config.json").is_file():
                return str(folder / "base")
    return base


def locate_adapter_base(adapter: Path) -> str:
    """The base of an adapter, as a path or hub id that transformers loads; a cached copy if the hub cannot be reached.

    Raises:
        UserError: as `read_adapter_base`, or the base cannot be located.
    """
    base = read_adapter_base(adapter)
    try:
        return locate_checkpoint(base)
    except UserError as error:
        raise UserError(f"{adapter}: its base {base}: {error}") from error
