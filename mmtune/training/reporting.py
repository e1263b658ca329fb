"""Who is told how a run gets on, besides its own directory: nobody, unless the recipe names them."""

from __future__ import annotations

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from mmtune.errors import UserError
from mmtune.run_directory import RunDirectory


def reporters(asked: str | list[str]) -> list[str]:
    """The names that a recipe's `report_to` stands for. transformers adds Kubeflow to them unasked, and this does not.

    Raises:
        UserError: one that is not installed.
    """
    names = [name for name in ([asked] if isinstance(asked, str) else asked) if name != "none"]
    if not names:
        return []
    there: list[str] = get_available_reporting_integrations()
    if "all" in names:
        return there
    for name in names:
        if name not in there:
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (ImportError, RuntimeError) as error:
                advice = f"not installed: pip install {name}" if name in ("tensorboard", "wandb", "trackio") else error
                raise UserError(f"train.report_to: {name}: {advice}") from error
    return names


def write_beside(trainer: Trainer, run: RunDirectory) -> None:
    """TensorBoard's files into the run, where its own environment variable names no other place."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(run.tensorboard)
