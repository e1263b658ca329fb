"""Private members of transformers' Trainer that mmtune overrides or reads, behind public methods.

No other module touches a private member of the Trainer. A test compares each with the installed version.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer


class HookedTrainer(Trainer):
    """transformers' Trainer whose private steps call public methods, for a subclass to override."""

    def checkpoint_parent(self) -> Path:
        """The folder in which checkpoints are written."""
        return Path(self.args.output_dir)

    def save_checkpoint(self, write: Callable[[], None]) -> None:
        """Save a checkpoint; `write` is the Trainer's own way, into `checkpoint_parent()`."""
        write()

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load the model's weights from a checkpoint; the Trainer itself loads the optimizer, the schedule and its state."""
        super()._load_from_checkpoint(str(checkpoint))

    def save_weights(self, out: str | None, save: Callable[[], None]) -> None:
        """Save the model's weights; `save` is the Trainer's own way."""
        save()

    def load_best_model(self, load: Callable[[], None]) -> None:
        """Load the weights of `state.best_model_checkpoint` after training; `load` is the Trainer's own way."""
        load()

    def prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device of this process, as in a training step."""
        inputs: dict[str, Any] = self._prepare_inputs(batch)
        return inputs

    def grad_norm(self, model: nn.Module, compute: Callable[[], Any]) -> Any:
        """Norm of the gradients, before the optimizer uses them; `compute` is the Trainer's own way."""
        return compute()

    def write_weights(self, out: str | None, state: dict[str, torch.Tensor] | None) -> None:
        """Write weights, the processor and the arguments to a folder, from a full state dictionary."""
        self._save(out, state)

    @property
    def accumulated_loss(self) -> torch.Tensor:
        """The sum of losses since the last log, a scalar, which the log divides by the steps since then."""
        loss: torch.Tensor = self._tr_loss
        return loss

    def leave_step_out_of_log(self, accumulated_loss: torch.Tensor) -> None:
        """Have the present step not count in the logged loss.

        Args:
            accumulated_loss: a copy of `accumulated_loss` from before the step.
        """
        self._tr_loss.copy_(accumulated_loss)
        self._globalstep_last_logged += 1

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's `save_model`, through `save_weights`."""
        self.save_weights(output_dir, partial(super().save_model, output_dir, _internal_call))

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)
        else:  # resumed from the last step, where the Trainer would take one more; a stream's epochs have no end
            self.control.should_training_stop = True

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best:
            self.state.best_global_step = self.state.global_step  # the Trainer sets it only where `save_strategy` saves
            if self.args.load_best_model_at_end:  # also between two steps of `save_steps`
                self.control.should_save = True
        return is_best or self.control.should_save  # `save_strategy: best` saves if this is true; a signal has asked for it too

    def _load_best_model(self) -> None:
        self.load_best_model(super()._load_best_model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self.grad_norm(model, partial(super()._get_grad_norm, model, grad_norm))

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoint_parent())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.save_checkpoint(partial(super()._save_checkpoint, model, trial))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_checkpoint(Path(resume_from_checkpoint))
