"""How a run gets on: its rates, its waiting for data, its memory, how well it uses the device, and the time that is left."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.data.batching.collate import RowSize
from mmtune.distributed.context import DistributedContext
from mmtune.run_directory import peak_memory_mb
from mmtune.training.throughput.cpu_wait import CpuWait
from mmtune.training.throughput.flops import ModelFlops, peak_of

RECENT = 10
"""The time that is left follows from so many of the last logs."""


class TrainingProgress(TrainerCallback):
    """Counts what every process does between two logs; a log brings it together.

    Args:
        models: those that run on every batch: the one that trains, without the wrappers of a distributed run, and frozen ones.
    """

    def __init__(self, models: Sequence[nn.Module], arguments: TrainingArguments, dist: DistributedContext) -> None:
        self._arguments = arguments
        self._dist = dist
        self._peak = peak_of(arguments.device)
        # A compiled forward pass cannot be looked into.
        knows = self._peak is not None and not arguments.torch_compile and all(map(ModelFlops.knows, models))
        self._flops = [ModelFlops(model) for model in models] if knows else []
        self._samples = self._tokens = 0
        self._waited = 0.0
        self._cpu = CpuWait()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self._cpu.take()  # what was before training is not a step's
        self._tokens_before = state.num_input_tokens_seen
        self._logs = deque([(self._start, state.global_step)], maxlen=RECENT)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits for its next batches."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, rows: Sequence[RowSize], images: bool) -> None:
        """Count the rows of a batch.

        Args:
            images: whether the batch has any, those of dummy samples included.
        """
        self._samples += len(rows)
        self._tokens += sum(row.tokens for row in rows)
        for flops in self._flops:
            flops.add(rows, images)

    @contextlib.contextmanager
    def learning(self, inputs: dict[str, Any]) -> Iterator[None]:
        """See `ModelFlops.learning`."""
        with contextlib.ExitStack() as stack:
            for flops in self._flops:
                stack.enter_context(flops.learning(inputs))
            yield

    def count_tokens(self, state: TrainerState) -> None:
        """Bring the state's number of tokens up to date, over all processes; all of them call it."""
        state.num_input_tokens_seen += sum(self._dist.all_gather_object(self._tokens))
        self._tokens = 0

    def figures(self, state: TrainerState) -> dict[str, float]:
        """What was done since the last log, over all processes, in all of them.

        Returns:
            As docs/recipe.md lists them: `tokens`, `tokens_per_second`, `samples_per_second`, `data_wait`, `cpu_wait` and `mfu`
            where they can be known, `accelerator_memory_mb` or `resident_memory_mb`, `seconds` and `seconds_left`.
        """
        self.count_tokens(state)
        tokens = state.num_input_tokens_seen - self._tokens_before
        now = time.perf_counter()
        seconds = max(now - self._logs[-1][0], 1e-9)
        kind, memory = memory_mb(self._arguments.device)
        operations = [flops.take() for flops in self._flops]
        flops = None if None in operations else sum(operations)  # type: ignore[arg-type]
        cpu = self._cpu.take()
        lacked = None if cpu is None else cpu / seconds
        brought = self._dist.all_gather_object((self._samples, self._waited / seconds, lacked, memory, flops))
        samples, waits, lacks, memories, work = zip(*brought, strict=True)
        first, step = self._logs[0]
        left = (now - first) / max(state.global_step - step, 1) * (state.max_steps - state.global_step)
        metrics = {
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(sum(samples) / seconds, 3),
            "data_wait": round(max(waits), 4),
            kind: max(memories),
            "seconds": round(now - self._start, 3),
            "seconds_left": round(left, 1),
        }
        if known := [share for share in lacks if share is not None]:
            metrics["cpu_wait"] = round(min(max(known), 1.0), 4)
        if self._flops and self._peak is not None and None not in work:
            could = self._peak.at(self._flops[0].dtype, bool(self._arguments.tf32)) * seconds * self._dist.size
            metrics["mfu"] = round(sum(work) / could, 4)
        self._logs.append((now, state.global_step))
        self._tokens_before, self._samples, self._waited = state.num_input_tokens_seen, 0, 0.0
        return metrics


def memory_mb(device: torch.device) -> tuple[str, float]:
    """The most memory that was in use so far, by what it is of: the accelerator's tensors, or this process (MB: 10^6 bytes)."""
    if device.type == "cpu":
        return "resident_memory_mb", peak_memory_mb()
    return "accelerator_memory_mb", round(torch.accelerator.max_memory_allocated(device) / 1e6, 1)


def as_time(seconds: float) -> str:
    """`42 s`, from a minute on `0:01:00`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
