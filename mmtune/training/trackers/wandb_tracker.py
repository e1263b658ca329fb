"""Weights & Biases: online, or offline in the run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import WandbCallback

from mmtune.training.trackers.tracker import STEP, Row, TrackedAnswer, TrackedRun, Tracker
from mmtune.utils.errors import RecipeValueError

FINISH_TIMEOUT_S = 300.0
"""How long the end of a run waits for the upload, unless WANDB_FINISH_TIMEOUT says otherwise: W&B itself would wait for hours."""


class WandbTracker(Tracker):
    """The run of W&B into which transformers' callback logs too; a run is continued by its id.

    Raises:
        UserError: W&B cannot start a run.
    """

    name = "wandb"
    is_local = False  # `wandb sync` uploads an offline run

    def __init__(self, callback: WandbCallback, tracked: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        settings: dict[str, Any] = {"silent": True, "finish_timeout_raises": True}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings["finish_timeout"] = FINISH_TIMEOUT_S
        arguments: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", tracked.trainer.args.project),
            "name": tracked.trainer.args.run_name,
            "dir": None if os.environ.get("WANDB_DIR") else tracked.directory.path,
        }
        continued: dict[str, Any] = {} if tracked.earlier is None else {"id": tracked.earlier, "resume": "allow"}
        reason = ""
        try:
            try:
                self._run: Any = wandb.init(**arguments, **continued, settings=wandb.Settings(**settings))
            except wandb.errors.CommError as error:
                reason = f"the server does not answer ({str(error).splitlines()[0]}): the run is kept in "
                # New settings: W&B has written the id into the first ones.
                self._run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(**settings))
        except wandb.Error as error:
            raise RecipeValueError("train.report_to", f"wandb: {error}") from error
        self._folder = Path(self._run.dir).parent
        self.started = "switched off by WANDB_MODE" if self._run.disabled else self._run.url
        if self._run.offline:
            self.started = f"{reason}{self._run.dir}; {self._sync()}"
        elif not self._run.disabled:  # of two offline runs with one id, `wandb sync` would keep the last only
            self.run_id = self._run.id
        self._run.config.update({"recipe": tracked.recipe.model_dump(mode="json")}, allow_val_change=True)

    def _sync(self) -> str:
        return f"to upload it: wandb sync {self._folder}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As a line of the history."""
        self._run.log({**values, STEP: step})

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """As a table."""
        table = self._wandb.Table(columns=[*rows[0]], data=[list(row.values()) for row in rows])
        self._run.log({name: table, STEP: step})

    def log_answers(self, name: str, answers: Sequence[TrackedAnswer], step: int) -> None:
        """As a table with a column for each image."""
        most = max(len(answer.images) for answer in answers)
        columns: list[str | int] = [
            *answers[0].texts(),
            *("image" if most == 1 else f"image {number + 1}" for number in range(most)),
        ]
        data = []
        for answer in answers:
            images = [self._wandb.Image(image) for image in answer.images]
            data.append([*answer.texts().values(), *images, *[None] * (most - len(images))])
        self._run.log({name: self._wandb.Table(columns=columns, data=data), STEP: step})

    def set_summary(self, values: Mapping[str, float | str], step: int) -> None:
        """As the run's summary, by which runs are compared."""
        self._run.summary.update(dict(values))

    def finish(self, failed: bool) -> None:
        """Wait for the upload, but not for ever: the run is on disk too."""
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError:
            print(f"wandb: not everything is uploaded yet; the run is in {self._folder}; {self._sync()}")
