"""trackio: a folder of this machine that its dashboard reads, or a Space."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TrackioCallback

from mmtune.training.trackers.tracker import STEP, Row, TrackedAnswer, TrackedRun, Tracker


class OpenTrackioCallback(TrackioCallback):
    """transformers' callback, whose run stays open after training: the results follow."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `close` ends the run."""

    def close(self, trainer: Trainer) -> None:
        """What transformers' callback does after training: end the run, and freeze its Space."""
        super().on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


class TrackioTracker(Tracker):
    """The run of trackio into which transformers' callback logs too; a run is continued by its name."""

    name = "trackio"

    def __init__(self, callback: TrackioCallback, tracked: TrackedRun) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        trainer = tracked.trainer
        self._trackio, self._trainer = trackio, trainer
        trainer.remove_callback(callback)
        self._callback = OpenTrackioCallback()
        trainer.add_callback(self._callback)
        arguments = copy.copy(trainer.args)
        arguments.run_name = tracked.earlier or arguments.run_name
        with redirect_stdout(io.StringIO()):  # instructions with terminal sequences
            self._callback.setup(arguments, trainer.state, trainer.model)
        started = trackio.context_vars.current_run.get()
        assert started is not None  # by `setup`
        self._run = started
        self.run_id = self._run.name
        server = trackio.context_vars.current_server.get()
        self.is_local = server is None
        self.started = f"{Path(TRACKIO_DIR)}; to view it: trackio show --project {trainer.args.project}"
        if server is not None:
            self.started = f"sent to {server}"
        self._run.config["recipe"] = tracked.recipe.model_dump(mode="json")  # is sent with the first log

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As a line of the history."""
        self._run.log({**values, STEP: step})

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """As a table."""
        self._run.log({name: self._table(rows), STEP: step})

    def log_answers(self, name: str, answers: Sequence[TrackedAnswer], step: int) -> None:
        """As a table with a column of images."""
        rows = [{**answer.texts(), "images": [self._trackio.Image(image) for image in answer.images]} for answer in answers]
        self._run.log({name: self._table(rows), STEP: step})

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return self._trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def set_summary(self, values: Mapping[str, float | str], step: int) -> None:
        """Under `summary/`: trackio has no final values."""
        self._run.log({**{f"summary/{name}": value for name, value in values.items()}, STEP: step})

    def finish(self, failed: bool) -> None:
        """End the run; a Space is frozen only after a training that did not fail."""
        # On this machine nothing is uploaded, but trackio says so.
        with redirect_stdout(io.StringIO()) if self.is_local else nullcontext():
            if failed:
                self._trackio.finish()
            else:
                self._callback.close(self._trainer)
