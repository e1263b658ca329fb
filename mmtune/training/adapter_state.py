"""Adapter training state: the method's part of a step, and what a checkpoint holds of an adapter beside its file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.methods.method_table import method_of
from mmtune.utils.errors import CheckFailed

ADAPTER_STATE = "adapter_state.safetensors"
"""In a checkpoint, of methods that cannot train on from the adapter's file."""


class MethodStep(TrainerCallback):
    """The method's `after_step` hook.

    Args:
        is_skipped: whether the present step has no gradients; the hook is then not called.
    """

    def __init__(self, is_skipped: Callable[[], bool]) -> None:
        self._is_skipped = is_skipped

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        method = method_of(kwargs["model"])
        if method is not None and not self._is_skipped():
            method.after_step(kwargs["model"], state.global_step)


def shared_method_loss(model: nn.Module, passes: int) -> AbstractContextManager[None]:
    """Context of one forward pass in which a method adds its share of a loss term of its own.

    Args:
        passes: forward passes of one optimizer step, in all processes together.
    """
    method = method_of(model)
    return nullcontext() if method is None else method.shared_loss(model, passes)


def save_adapter_state(model: nn.Module, checkpoint: Path) -> None:
    """Write trained weights and the method's training state, where the adapter's file is not enough to train on."""
    method = method_of(model)
    if method is None or method.resumes_from_adapter:
        return
    state, metadata = method.training_state(model)
    state |= {f"weight/{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, checkpoint / ADAPTER_STATE, metadata)


def load_adapter_state(model: nn.Module, checkpoint: Path) -> bool:
    """Restore what `save_adapter_state` wrote; false where the adapter's file is enough."""
    method = method_of(model)
    if method is None or method.resumes_from_adapter:
        return False
    with safe_open(checkpoint / ADAPTER_STATE, "pt") as file, torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(file.get_tensor(f"weight/{name}"))
        own = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("weight/")}  # noqa: SIM118
        method.load_training_state(model, own, file.metadata() or {})
    return True


def load_full_model(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load a checkpoint's weights into a model that trains in full.

    The Trainer expects the names of the parameters in memory, and transformers writes some models under other names.

    Raises:
        CheckFailed: a weight is missing or unexpected.
    """
    loaded, info = type(model).from_pretrained(
        checkpoint, dtype=torch.float32, device_map={"": model.device}, output_loading_info=True
    )
    mismatches = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if mismatches:
        raise CheckFailed(f"{checkpoint}: expected the weights of this model, got {mismatches}")
    model.load_state_dict(loaded.state_dict())
