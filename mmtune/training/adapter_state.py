"""Adapters while they train: what AdaLoRA wants of every step, and what goes on from a checkpoint that is not in its adapter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.utils.errors import CheckFailed

LIVE = "live.safetensors"
"""In a checkpoint, of methods whose adapter cannot be trained on from its file."""
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""By which AdaLoRA chooses ranks."""


class AdaLoraStep(TrainerCallback):
    """AdaLoRA's step: ranks move by the importance of the gradients that the optimizer has just used.

    Args:
        is_skipped: whether the present step has no gradients. The ranks then stay as they are.
    """

    def __init__(self, is_skipped: Callable[[], bool]) -> None:
        self._is_skipped = is_skipped

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tuner = _adalora(kwargs["model"])
        if tuner is None or self._is_skipped():
            return
        config = tuner.peft_config["default"]
        last = config.total_step - config.tfinal
        if state.global_step > last and tuner.rankallocator.exp_avg_ipt:  # the step that settles the ranks was skipped
            tuner.update_and_allocate(last)
        tuner.update_and_allocate(state.global_step)


@contextlib.contextmanager
def shared_regularization(model: nn.Module, passes: int) -> Iterator[None]:
    """Inside, a forward pass adds its part of AdaLoRA's regularization, which PEFT adds to the loss of every pass in whole.

    Args:
        passes: how many forward passes an optimizer step sums over, those of all processes together.
    """
    tuner = _adalora(model)
    if tuner is None:
        yield
        return
    config = tuner.peft_config["default"]
    whole = config.orth_reg_weight
    config.orth_reg_weight = whole / passes
    try:
        yield
    finally:
        config.orth_reg_weight = whole


def save_adapter_state(model: nn.Module, checkpoint: Path) -> None:
    """Keep, in a checkpoint, the weights of an adapter whose file is not what trains, and AdaLoRA's averages beside them."""
    if not _is_more_than_its_file(model):
        return
    kept = {f"weight/{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    metadata, tuner = {}, _adalora(model)
    if tuner is not None:
        metadata["rank_pattern"] = json.dumps(tuner.peft_config["default"].rank_pattern)
        for average in AVERAGES:
            kept |= {f"{average}/{name}": tensor for name, tensor in getattr(tuner.rankallocator, average).items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}, checkpoint / LIVE, metadata)


def load_adapter_state(model: nn.Module, checkpoint: Path) -> bool:
    """Put back what `save_adapter_state` kept; false where the adapter's file is all there is."""
    if not _is_more_than_its_file(model):
        return False
    tuner = _adalora(model)
    with safe_open(checkpoint / LIVE, "pt") as kept, torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(kept.get_tensor(f"weight/{name}"))
        if tuner is not None:
            tuner.peft_config["default"].rank_pattern = json.loads(kept.metadata()["rank_pattern"])
            for name, weight in tuner.model.named_parameters():
                for average in (each for each in AVERAGES if f"{each}/{name}" in kept.keys()):  # noqa: SIM118  (no mapping)
                    getattr(tuner.rankallocator, average)[name] = kept.get_tensor(f"{average}/{name}").to(weight.device)
            tuner.rankallocator.ipt = dict.fromkeys(tuner.rankallocator.exp_avg_ipt)  # each step writes them again
    return True


def load_full_model(model: PreTrainedModel, checkpoint: Path) -> None:
    """Put a checkpoint's weights back into a model that trains in full.

    The Trainer looks for them by the names that they have in memory, and transformers writes some models with others.

    Raises:
        CheckFailed: a weight is missing, or there is one more.
    """
    loaded, found = type(model).from_pretrained(
        checkpoint, dtype=torch.float32, device_map={"": model.device}, output_loading_info=True
    )
    wrong = {name: sorted(map(str, keys)) for name, keys in found.items() if keys}
    if wrong:
        raise CheckFailed(f"{checkpoint}: not the weights of this model: {wrong}")
    model.load_state_dict(loaded.state_dict())


def _is_more_than_its_file(model: nn.Module) -> bool:
    """AdaLoRA's file lacks the ranks that are masked, a prompt encoder's has only what it comes to."""
    return _adalora(model) is not None or hasattr(model, "prompt_encoder")


def _adalora(model: nn.Module) -> AdaLoraModel | None:
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None
