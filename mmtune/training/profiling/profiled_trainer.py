"""Trainer of a run with `--profile`: tells the profiler which part of a step it is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from mmtune.training.profiling.module_hooks import hook_compiled, hook_components
from mmtune.training.profiling.step_profiler import ProfileSettings, StepProfiler
from mmtune.training.trainer import TuningTrainer


class ProfiledTrainer(TuningTrainer):
    """Trains as `TuningTrainer`, with the same result, and profiles some steps.

    Args:
        profile: which steps, and where the profile is written.
    """

    def __init__(self, *args: Any, profile: ProfileSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._profiler = StepProfiler(profile, self._dist, self.args.device, self._instrument, self._progress.pause)
        self.add_callback(self._profiler)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `TuningTrainer.train`; the profiler stops however training ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._profiler.close()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """As `TuningTrainer.get_batch_samples`; the step begins here."""
        self._profiler.begin_step(self.state.global_step + 1, starts_epoch=(self.state.epoch or 0) % 1 == 0)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def fetch_batches(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """The next batches of the loader."""
        with self._profiler.part("loader"):
            batches = super().fetch_batches(epoch_iterator, num_batches)
        for batch in batches:
            if isinstance(batch, dict):  # not the error of a row that stops the run
                positions = sum(batch[key].numel() for key in ("input_ids", "decoder_input_ids") if key in batch)
                self._profiler.add_batch(sum(row.tokens for row in batch["sizes"]), positions, batch.pop("spans", None))
        return batches

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As `TuningTrainer.compute_loss`."""
        with self._profiler.forward():
            return super().compute_loss(*args, **kwargs)

    def grad_norm(self, model: nn.Module, compute: Callable[[], Any]) -> Any:
        """As `TuningTrainer.grad_norm`."""
        with self._profiler.part("optimizer"):
            return super().grad_norm(model, compute)

    def _instrument(self) -> ExitStack:
        """Hooks of the model's components, and timers of what the Trainer calls; the context's end removes them."""
        if self.args.torch_compile:
            installed = hook_compiled(self.model_wrapped, lambda: self._profiler.timeline)
        else:
            installed = hook_components(self.model, self._objective.frozen_models, lambda: self._profiler.timeline)
        installed.enter_context(self._timed(self.accelerator, "backward", "backward"))
        installed.enter_context(self._timed(self.accelerator, "clip_grad_norm_", "optimizer"))
        if self.is_deepspeed_enabled:  # its optimizer steps inside of accelerate's backward
            installed.enter_context(self._timed(self.model_wrapped, "step", "optimizer"))
        return installed

    @contextmanager
    def _timed(self, owner: Any, method: str, part: str) -> Iterator[None]:
        """Count the calls of an object's method as a part of the step."""
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._profiler.part(part):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        yield
        delattr(owner, method)  # of the object; that of its class is back
