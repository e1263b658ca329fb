"""The exact mean loss of held-out rows.

transformers' evaluation loop averages the means of batches. Here sums over supervised tokens are added up over all batches and
processes, so that the loss depends neither on the batches nor on the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from mmtune.data.data_report import MediaChanged
from mmtune.data.dataset import TrainingSet
from mmtune.data.encoding.feature_store import FeatureStore
from mmtune.distributed.context import DistributedContext
from mmtune.objectives.sft import SupervisedTuning
from mmtune.training.held_out.held_out_rows import HeldOutRows
from mmtune.utils.errors import CheckFailed, UserError

Sums = Callable[[dict[str, Any]], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""From a batch to its losses by name, summed over its supervised tokens, and the number of these."""


class HeldOutLoss:
    """The mean loss of the held-out rows over their supervised tokens, over all processes.

    Args:
        rows: the held-out rows.
        objective: encodes and collates them.
        size: rows per batch, where the recipe does not limit their tokens.
        features: where the features of images are looked up, if the recipe keeps them.
    """

    def __init__(
        self,
        rows: HeldOutRows,
        objective: SupervisedTuning,
        processor: ProcessorMixin,
        dist: DistributedContext,
        size: int,
        features: FeatureStore | None = None,
    ) -> None:
        self._names = rows.samples.names
        self._dist = dist
        self._batches = rows.batches(size, dist)
        self._collator = objective.collator(processor, rows.section.packing, always_images=dist.size > 1)
        self._dummy_batch = objective.dummy_batch(processor)
        encoder = objective.encoder(processor, rows.section)
        encoder.features = features
        self.data = TrainingSet(rows.samples, encoder)
        self.rows = len(rows.chosen)

    def means(self, loader_settings: Mapping[str, Any], sums: Sums) -> dict[str, float]:
        """`eval_loss`, and with several sources `eval_loss_SOURCE`, and `eval_loss_PART` for each part of the objective's loss.

        All processes call it and get the same values.

        Args:
            loader_settings: of the data loader, such as `num_workers`.
            sums: computes a batch, without gradients.

        Raises:
            UserError: rows that cannot be read or encoded.
            CheckFailed: the loss is not finite.
        """
        start = time.perf_counter()
        batches: Any = [rows for _, rows in self._batches]
        loader = DataLoader(self.data, batch_sampler=batches, collate_fn=self._collator, **loader_settings)
        by_source: dict[int, dict[str, float]] = {}
        faults: list[UserError] = []
        for (source, _), batch in zip(self._batches, loader, strict=True):
            faults += [fault for fault in batch.pop("faults") if not isinstance(fault, MediaChanged)]
            tensors = {name: value for name, value in batch.items() if name not in ("rows", "sizes", "source_ids")}
            losses, tokens = sums(tensors or dict(self._dummy_batch))
            totals = by_source.setdefault(source, {})
            for name, value in {**losses, "tokens": tokens}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        everyone = self._dist.all_gather_object((by_source, [str(fault) for fault in faults]))
        if failed := [fault for _, reasons in everyone for fault in reasons]:
            raise UserError(f"{len(failed)} held-out rows cannot be evaluated, the first: {failed[0]}")
        overall: dict[str, float] = {}
        metrics: dict[str, float] = {}
        for source, name in enumerate(self._names):
            totals = _added(process[source] for process, _ in everyone if source in process)
            overall = _added((overall, totals))
            if totals and len(self._names) > 1:
                metrics[f"eval_loss_{name}"] = totals["loss"] / totals["tokens"]
        count = overall.pop("tokens")
        means = {f"eval_{name}": value / count for name, value in overall.items()}
        if not math.isfinite(means["eval_loss"]):
            raise CheckFailed(f"the held-out loss is {means['eval_loss']}; lower the learning rate or look at the data")
        seconds = time.perf_counter() - start
        speed = {"eval_runtime": round(seconds, 3), "eval_samples_per_second": round(self.rows / max(seconds, 1e-9), 3)}
        return {**means, **metrics, **speed}


def _added(each: Iterator[dict[str, float]] | tuple[dict[str, float], ...]) -> dict[str, float]:
    added: dict[str, float] = {}
    for totals in each:
        for name, value in totals.items():
            added[name] = added.get(name, 0.0) + value
    return added
