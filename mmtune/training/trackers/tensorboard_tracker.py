"""TensorBoard: event files in the run directory."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from transformers.integrations import TensorBoardCallback

from mmtune.training.trackers.tracker import Row, TrackedAnswer, TrackedRun, Tracker

_ENTITIES = str.maketrans({character: f"&#{ord(character)};" for character in string.punctuation} | {"\n": "<br>"})


class TensorBoardTracker(Tracker):
    """The writer of transformers' callback, which it shares. The callback closes it after training; it then opens another file.

    When training resumes from a checkpoint, the events of later steps are hidden.
    """

    name = "tensorboard"

    def __init__(self, callback: TensorBoardCallback, tracked: TrackedRun) -> None:
        library = import_module("torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX")
        folder = callback.logging_dir or str(tracked.directory.tensorboard)
        self.is_local = "://" not in folder  # such as s3://
        self.started = f"{folder}; to view it: tensorboard --logdir {folder}"
        purged = tracked.first_step + 1 if tracked.first_step else None
        self._writer = callback.tb_writer = library.SummaryWriter(folder, purge_step=purged)
        self._writer.add_text("recipe", _code(tracked.recipe.to_yaml()), tracked.first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_table(self, name: str, rows: Sequence[Row], step: int) -> None:
        """As text."""
        self._writer.add_text(name, markdown_table(rows), step)

    def log_answers(self, name: str, answers: Sequence[TrackedAnswer], step: int) -> None:
        """The texts as a table, and each image by its row."""
        self.log_table(name, [answer.texts() for answer in answers], step)
        for answer in answers:
            for number, image in enumerate(answer.images):
                tag = f"{name}/{answer.row}" + (f" {number + 1}" if len(answer.images) > 1 else "")
                self._writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        self._writer.flush()

    def set_summary(self, values: Mapping[str, float | str], step: int) -> None:
        """As text: TensorBoard has no final values."""
        self.log_table("summary", [{"name": name, "value": f"{value}"} for name, value in values.items()], step)

    def finish(self, failed: bool) -> None:
        """Close the files."""
        self._writer.close()


def markdown_table(rows: Sequence[Row]) -> str:
    """A table in Markdown. Every punctuation mark of the texts is an HTML entity.

    A model's answer could otherwise be Markdown that loads an image from another machine when someone looks at it.
    """
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = [[cell.translate(_ENTITIES) for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _code(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())
