"""Losses since the last log, by name and by data source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext


class LossRecord:
    """Sums losses over the batches of all processes between two logs.

    Args:
        source_names: the data sources whose losses are reported separately; empty reports none.
        dist: the processes that train together.
    """

    def __init__(self, source_names: Sequence[str] = (), dist: DistributedContext = SINGLE_PROCESS) -> None:
        self._names = list(source_names)
        self._dist = dist
        self._steps = 0
        self._parts: dict[str, torch.Tensor] = {}
        self._sources = torch.zeros(len(self._names), 2, dtype=torch.float64)  # summed loss, number of supervised tokens
        self._before = self._state()

    def begin_step(self) -> None:
        """Start an optimizer step."""
        self._before = self._state()
        self._steps += 1

    def drop_step(self) -> None:
        """Forget the losses of the present step."""
        self._steps, self._parts, self._sources = self._before

    def add_parts(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Add losses of one batch by name, each divided by the denominator of its step."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().double()

    def add_by_source(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add losses of tokens, shape (supervised,), fp64, with the number of each token's source, int64 of the same shape."""
        sources = sources.cpu()
        self._sources[:, 0].index_add_(0, sources, losses)
        self._sources[:, 1].index_add_(0, sources, torch.ones_like(losses))

    def take(self) -> dict[str, float]:
        """The record over all processes, which is then empty; all processes call it.

        Returns:
            `loss_NAME` for each part of the loss, the mean of the steps, and `loss/SOURCE` for each source, the mean of its
            supervised tokens.
        """
        own_parts = {name: float(value) for name, value in self._parts.items()}
        everyone = self._dist.all_gather_object((own_parts, self._sources))
        parts = {name for process_parts, _ in everyone for name in process_parts}
        record = {f"loss_{name}": sum(process_parts.get(name, 0.0) for process_parts, _ in everyone) for name in sorted(parts)}
        record = {name: value / max(self._steps, 1) for name, value in record.items()}
        for name, (loss, tokens) in zip(self._names, sum(sources for _, sources in everyone).tolist(), strict=True):
            if tokens:
                record[f"loss/{name}"] = loss / tokens
        self._steps, self._parts = 0, {}
        self._sources = torch.zeros_like(self._sources)
        return record

    def _state(self) -> tuple[int, dict[str, torch.Tensor], torch.Tensor]:
        return self._steps, dict(self._parts), self._sources.clone()
