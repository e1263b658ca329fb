"""Interface of an experiment tracker: what a run sends to it besides the Trainer's log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL.Image import Image
from transformers import Trainer

from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory

STEP = "train/global_step"
"""The optimizer step of a log, under the name that transformers' callbacks send: the x-axis of all charts."""

Row = Mapping[str, str]
"""A row of a table: text by column."""


@dataclass(frozen=True)
class TrackedAnswer:
    """A held-out question with its answers and images.

    Attributes:
        row: the row id.
        base: the answer of the base; None where it was not evaluated.
        right: whether the answer counts as right.
        score: of the answer, as text.
        images: thumbnails, on which regions of the reference and the answers are drawn.
    """

    row: str
    question: str
    reference: str
    base: str | None
    answer: str
    right: bool
    score: str
    images: tuple[Image, ...]

    def texts(self) -> dict[str, str]:
        """The text by column; without the images."""
        base = {} if self.base is None else {"base answer": self.base}
        verdict = "right" if self.right else "wrong"
        return {
            "row": self.row,
            "question": self.question,
            "reference": self.reference,
            **base,
            "answer": self.answer,
            "right or wrong": verdict,
            "score": self.score,
        }


@dataclass(frozen=True)
class TrackedRun:
    """A run that a tracker is started for.

    Attributes:
        trainer: the Trainer, whose callback logs to the tracker too.
        directory: the run directory.
        recipe: the recipe.
        earlier: the `run_id` of the tracker's run that is continued; None for a new one.
        first_step: the step of the checkpoint from which training resumes, otherwise 0.
    """

    trainer: Trainer
    directory: RunDirectory
    recipe: Recipe
    earlier: str | None
    first_step: int


class Tracker(ABC):
    """A run in one tracker, in the main process. It is made from transformers' callback for that tracker and a `TrackedRun`.

    Attributes:
        name: as in `train.report_to`.
        is_local: whether everything stays in files of this machine until someone copies them.
        started: where the run is and how to view it, to be printed.
        run_id: continues the run in the tracker when training is resumed; None where the run directory itself does.
    """

    name: str
    is_local: bool
    started: str
    run_id: str | None = None

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""

    @abstractmethod
    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """Send a table of text."""

    @abstractmethod
    def log_answers(self, name: str, answers: Sequence[TrackedAnswer], step: int) -> None:
        """Send sample answers with their images."""

    @abstractmethod
    def set_summary(self, values: Mapping[str, float | str], step: int) -> None:
        """Set the final values of the run."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Send the rest and end the run; `failed` if an error or a signal ended the training."""
