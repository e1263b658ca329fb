"""Inputs of a training run, validated before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import TrainingArguments

from mmtune.data.data_report import DataReport
from mmtune.data.dataset import IndexedSamples, StreamedSamples
from mmtune.distributed.context import DistributedContext
from mmtune.models.checkpoints.trained_weights import TrainedWeights
from mmtune.models.checkpoints.weights_hash import hash_base, hash_trained
from mmtune.models.load import ResolvedBase
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.training.held_out.held_out_rows import HeldOutRows
from mmtune.tuning.peft_config import keeps_adapter


@dataclass(frozen=True)
class RunInputs:
    """What was validated before any weight is loaded.

    Attributes:
        overwrite: whether an earlier run at the recipe's `output_dir` is replaced.
        checkpoint: where training resumes; None for a new run.
        lengths: tokens of every row, shape (rows,), 0 for a row that cannot train; None where rows are not counted beforehand.
        held_out: the rows of the evaluation while training; None without one.
        label_tokens: the tokens of a soft verbalizer's labels.
        profile: the number of steps to profile; 0: none.
    """

    recipe: Recipe
    overwrite: bool
    checkpoint: Path | None
    arguments: TrainingArguments
    dist: DistributedContext
    samples: IndexedSamples | StreamedSamples
    data_report: DataReport
    base: ResolvedBase
    objective: SupervisedTuning
    lengths: NDArray[np.int64] | None
    held_out: HeldOutRows | None
    label_tokens: list[int]
    profile: int = 0

    @property
    def run(self) -> RunDirectory:
        """The directory that the recipe names."""
        return RunDirectory(Path(self.recipe.output_dir))

    def hash_weights(self, run: RunDirectory | None = None) -> str | None:
        """The hash of the base's files, or of the weights that a run has written, for the cache of answers; None without a cache.

        All processes get that of the main one.
        """
        section, base = self.recipe.evaluate, self.base
        weights = None
        if section is not None and section.cache and self.dist.is_main_process:
            if run is None:
                weights = hash_base(base.section, base.location, self.arguments.seed)
            else:
                trained = run.adapter if keeps_adapter(self.recipe.tune) else run.model
                weights = hash_trained(TrainedWeights(trained, run))
        shared: str | None = self.dist.broadcast_object(weights)
        return shared
