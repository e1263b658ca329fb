"""Trained weights on disk: a run's adapter or model, or, of a stopped run, its last good checkpoint."""

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
from mmtune.utils.manifest import NAME as MANIFEST
from mmtune.utils.manifest import check_manifest

ADAPTER_CONFIG = "adapter_config.json"
CONFIG_NAME = "config.json"
TRAINER_STATE_NAME = "trainer_state.json"
INITIAL_LORA = "initial.safetensors"
"""In a checkpoint: LoRA's matrices before training, where their initialization took them out of the base."""


@dataclass(frozen=True)
class TrainedWeights:
    """The weights that a path stands for.

    Attributes:
        path: an adapter's or a model's directory, or a hub id.
        run: the run that they are of; a directory without a recipe where they are of none.
        step, steps: of a checkpoint, the optimizer steps that it has behind it, and those of the whole run.
    """

    path: Path
    run: RunDirectory
    step: int | None = None
    steps: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether they are an adapter's, and not a whole model's."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether training may go on from them."""
        return self.step is not None


def find_trained_weights(path: Path) -> TrainedWeights:
    """The weights of a run or of one of its checkpoints; any other path is taken as it is.

    Of a run that has not finished the last good checkpoint is taken, which is printed.

    Raises:
        UserError: a directory that holds none of these, or a checkpoint that was not finished.
        CheckFailed: a checkpoint that is damaged.
    """
    run = RunDirectory(path)
    for part in (run.adapter, run.model):
        if _holds_weights(part):
            return TrainedWeights(part, run)
    owner = run_of_checkpoint(path)
    if owner is not None or all((path / name).is_file() for name in (TRAINER_STATE_NAME, MANIFEST)):  # or a copy of one
        check_manifest(path)
        return _checkpoint(path, owner or run)
    if _holds_weights(path) or not path.is_dir():
        return TrainedWeights(path, run)
    if run.checkpoints_by_step() and run.recipe.is_file():
        trained = _last_checkpoint(run)
        last = trained.path
        print(
            f"{path} has not finished: {last.name} is taken, after {trained.step} of {trained.steps} steps; `mmtune train RECIPE "
            "--resume` goes on from there"
        )
        return trained
    if run.recipe.is_file():
        raise UserError(f"{path} {run.unfinished()}")
    raise UserError(f"{path}: neither a finished run (no adapter/ or model/), nor a checkpoint, nor a model (no {CONFIG_NAME})")


def locate_trained_weights(path: Path) -> TrainedWeights:
    """The weights that a path or a name stands for: see `find_trained_weights`.

    Raises:
        UserError: nothing is there, or the hub cannot be reached.
        CheckFailed: a damaged checkpoint.
    """
    trained = find_trained_weights(BUILTIN.get(str(path), path))
    with report_removed_checkpoint(trained):
        if not trained.path.is_dir():
            locate_checkpoint(str(path), "run or model")  # a hub that cannot be reached is found before libraries are imported
    return trained


@contextmanager
def report_removed_checkpoint(trained: TrainedWeights) -> Iterator[None]:
    """For code that reads trained weights: an error says so where the reason is that training has removed the checkpoint.

    Raises:
        UserError: it has. Any other error is left as it is.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if trained.is_checkpoint and not (trained.path / TRAINER_STATE_NAME).is_file():
            raise UserError(
                f"{trained.path}: training removed this checkpoint before it was read; try again with {trained.run.path}, of "
                "which the newest checkpoint is taken"
            ) from error
        raise


def _last_checkpoint(run: RunDirectory) -> TrainedWeights:
    """The newest good checkpoint; a run that goes on may remove one while it is read, and has a newer one then."""
    while (last := run.last_good_checkpoint()) is not None:
        try:
            return _checkpoint(last, run)
        except FileNotFoundError:
            if last.is_dir():
                raise
    raise UserError(f"{run.path}: the run has not finished, and none of its checkpoints is as it was written")


def _holds_weights(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or (path / CONFIG_NAME).is_file()


def _checkpoint(path: Path, run: RunDirectory) -> TrainedWeights:
    state = read_json_object(path / TRAINER_STATE_NAME)
    steps = state.get("global_step"), state.get("max_steps")
    if not all(isinstance(step, int) for step in steps):
        raise UserError(f"{path / TRAINER_STATE_NAME}: expected the whole numbers `global_step` and `max_steps`, got {steps}")
    return TrainedWeights(path, run, *steps)


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    try:
        return read_json_object(adapter / ADAPTER_CONFIG)
    except (OSError, UserError) as error:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: not a readable adapter configuration: {error}") from error


def read_adapter_base(adapter: Path) -> str:
    """The base that an adapter directory names; the one beside it when that path is gone, as after moving a run.

    Raises:
        UserError: a directory without a readable `adapter_config.json`.
    """
    config = read_adapter_config(adapter)
    if not isinstance(base := config.get("base_model_name_or_path"), str):
        raise UserError(f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path: expected a name or a path, got {base!r}")
    if base == "base" or not Path(base).is_dir():
        for folder in (adapter.parent, adapter.parent.parent):  # of a checkpoint, the run is one further up
            if (folder / "base" / "config.json").is_file():
                return str(folder / "base")
    return base


def locate_adapter_base(adapter: Path) -> str:
    """As `read_adapter_base`; of a hub id, the cached copy where the hub cannot be reached.

    Raises:
        UserError: as `read_adapter_base`, or the base is not there.
    """
    base = read_adapter_base(adapter)
    try:
        return locate_checkpoint(base)
    except UserError as error:
        raise UserError(f"{adapter}: its base {base}: {error}") from error
