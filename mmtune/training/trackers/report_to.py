"""The trackers that `train.report_to` names, checked before weights are loaded. None by default."""

from __future__ import annotations

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

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
