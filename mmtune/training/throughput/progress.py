"""Throughput of a training run: tokens per second, wait for data and CPU, memory, MFU, and the remaining time."""

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
from mmtune.training.throughput.flops import ModelFlops, peak_flops

RECENT = 10
"""The remaining time is estimated from this many last logs."""


class TrainingProgress(TrainerCallback):
    """Counts tokens, samples, waits and FLOPs in every process between two logs, and combines them in a log.

    Args:
        models: the models that run on every batch: the trained one, without the wrappers of a distributed run, and frozen ones.
    """

    def __init__(self, models: Sequence[nn.Module], arguments: TrainingArguments, dist: DistributedContext) -> None:
        self._arguments = arguments
        self._dist = dist
        self._peak = peak_flops(arguments.device)
        # The hooks of ModelFlops do not run in a compiled forward pass.
        supported = self._peak is not None and not arguments.torch_compile and all(map(ModelFlops.supports, models))
        self._flops = [ModelFlops(model) for model in models] if supported else []
        self._samples = self._tokens = 0
        self._wait_seconds = self._paused_seconds = 0.0
        self._cpu = CpuWait()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start = time.perf_counter()
        self._cpu.take()  # discards the time before training
        self._tokens_before = state.num_input_tokens_seen
        self._logs = deque([(self._start, state.global_step)], maxlen=RECENT)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out of the throughput; it counts in the remaining time."""
        start = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - start

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time of the block as wait for data."""
        start = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - start

    def add(self, rows: Sequence[RowSize], images: bool) -> None:
        """Count the rows of a batch.

        Args:
            images: whether the batch has images, including those of a dummy sample.
        """
        self._samples += len(rows)
        self._tokens += sum(row.tokens for row in rows)
        for flops in self._flops:
            flops.add(rows, images)

    @contextlib.contextmanager
    def record_costs(self, inputs: dict[str, Any]) -> Iterator[None]:
        """See `ModelFlops.record_costs`."""
        with contextlib.ExitStack() as stack:
            for flops in self._flops:
                stack.enter_context(flops.record_costs(inputs))
            yield

    def count_tokens(self, state: TrainerState) -> None:
        """Update the state's number of tokens, over all processes. Every process must call it."""
        state.num_input_tokens_seen += sum(self._dist.all_gather_object(self._tokens))
        self._tokens = 0

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """The throughput since the last log, over all processes. Every process must call it and gets the same values.

        Returns:
            The metrics that docs/recipe.md lists: `tokens`, `tokens_per_second`, `samples_per_second`, `data_wait`, `cpu_wait`
            and `mfu` if they are known, `accelerator_memory_mb` or `resident_memory_mb`, `seconds` and `seconds_left`.
        """
        self.count_tokens(state)
        tokens = state.num_input_tokens_seen - self._tokens_before
        now = time.perf_counter()
        elapsed = max(now - self._logs[-1][0], 1e-9)
        seconds = max(elapsed - self._paused_seconds, 1e-9)
        kind, memory = memory_mb(self._arguments.device)
        operations = [flops.take() for flops in self._flops]
        flops = None if None in operations else sum(operations)  # type: ignore[arg-type]
        cpu = self._cpu.take()
        cpu_share = None if cpu is None else cpu / elapsed
        gathered = self._dist.all_gather_object((self._samples, self._wait_seconds / seconds, cpu_share, memory, flops))
        samples, data_waits, cpu_shares, memories, operations_by_rank = zip(*gathered, strict=True)
        first, step = self._logs[0]
        left = (now - first) / max(state.global_step - step, 1) * (state.max_steps - state.global_step)
        metrics_now = {
            "tokens": state.num_input_tokens_seen,
            "tokens_per_second": round(tokens / seconds, 1),
            "samples_per_second": round(sum(samples) / seconds, 3),
            "data_wait": round(max(data_waits), 4),
            kind: max(memories),
            "seconds": round(now - self._start, 3),
            "seconds_left": round(left, 1),
        }
        if shares := [share for share in cpu_shares if share is not None]:
            metrics_now["cpu_wait"] = round(min(max(shares), 1.0), 4)
        if self._flops and self._peak is not None and None not in operations_by_rank:
            available = self._peak.at(self._flops[0].dtype, bool(self._arguments.tf32)) * seconds * self._dist.size
            metrics_now["mfu"] = round(sum(operations_by_rank) / available, 4)
        self._logs.append((now, state.global_step))
        self._tokens_before, self._samples = state.num_input_tokens_seen, 0
        self._wait_seconds = self._paused_seconds = 0.0
        return metrics_now


def memory_mb(device: torch.device) -> tuple[str, float]:
    """The peak memory so far in MB (10^6 bytes), with its name: of the accelerator's tensors, or of this process on a CPU."""
    if device.type == "cpu":
        return "resident_memory_mb", peak_memory_mb()
    return "accelerator_memory_mb", round(torch.accelerator.max_memory_allocated(device) / 1e6, 1)


def format_duration(seconds: float) -> str:
    """A duration such as `42 s`; from one minute on `0:01:00`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
