"""Experiment trackers of `train.report_to`, such as TensorBoard and W&B. None by default."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import RecipeValueError


def tracker_names(report_to: str | list[str]) -> list[str]:
    """The trackers of `train.report_to`, by name. Unlike transformers, this does not add Kubeflow.

    Raises:
        UserError: a tracker cannot be imported, or W&B is online and not logged in.
    """
    names = [name for name in ([report_to] if isinstance(report_to, str) else report_to) if name != "none"]
    if not names:
        return []
    if "all" in names:
        there: list[str] = get_available_reporting_integrations()
        return there
    for name in names:
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise RecipeValueError("train.report_to", f"{name}: cannot be imported: {error}") from error
    if "wandb" in names:
        _check_wandb_login()
    return names


def _check_wandb_login() -> None:
    """Check the login of W&B before weights are loaded; W&B would ask for it later. Nothing is sent."""
    import wandb

    # Silent: W&B prints terminal sequences, from every process.
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if settings.mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
        raise RecipeValueError(
            "train.report_to", "wandb: no login on this machine: run `wandb login`, or set WANDB_MODE=offline to log into the run"
        )


def start_trackers(trainer: Trainer, run: RunDirectory) -> None:
    """Start a run in each tracker and print where. Files go into the run directory unless the tracker is configured otherwise.

    trackio keeps the runs of all projects in one folder, which its dashboard reads.

    Raises:
        UserError: W&B cannot start a run.
    """
    for callback in [*trainer.callback_handler.callbacks]:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.tensorboard)
        elif isinstance(callback, WandbCallback) and trainer.is_world_process_zero():
            _start_wandb(trainer, run.path)
        elif isinstance(callback, TrackioCallback) and trainer.is_world_process_zero():
            with redirect_stdout(io.StringIO()):  # instructions with terminal sequences
                callback.setup(trainer.args, trainer.state, trainer.model)
            print(f"trackio: {_trackio_folder()}; to view it: trackio show --project {trainer.args.project}")


def _start_wandb(trainer: Trainer, folder: Path) -> None:
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", trainer.args.project),
            name=trainer.args.run_name,
            dir=None if os.environ.get("WANDB_DIR") else folder,
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        raise RecipeValueError("train.report_to", f"wandb: {error}") from error
    where = f"{run.dir}; to upload it: wandb sync {Path(run.dir).parent}" if run.offline else run.url
    print(f"wandb: {'switched off by WANDB_MODE' if run.disabled else where}")
    trainer.add_callback(_FinishWandb())


class _FinishWandb(TrainerCallback):
    """Finishes the run of W&B after training, so that a second training in this process starts a new one."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        import wandb

        wandb.finish()


def _trackio_folder() -> Path:
    from trackio.utils import TRACKIO_DIR

    return Path(TRACKIO_DIR)
