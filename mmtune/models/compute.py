"""Where and in what precision a model computes outside of training, the same as in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mmtune.methods.method_table import method_of


def to_best_device(model: nn.Module) -> nn.Module:
    """Move a model to the accelerator if there is one that it fits, with a fifth to spare for what it computes."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or getattr(model, "is_quantized", False):  # a quantized model is loaded where it stays
        return model
    needed = 1.2 * sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    free, _ = torch.accelerator.get_memory_info(accelerator)
    if needed > free:
        print(f"staying on the CPU: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on {accelerator}")
        return model
    return model.to(accelerator)


def move_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch on the model's device, its images in the dtype of the model's first layer."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    cast = {key: value.to(first.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return {key: value.to(first.device) for key, value in cast.items()}


def training_autocast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Autocast as in training when fp32 weights stand beside half-precision ones, which no layer would accept otherwise."""
    kinds = {(parameter.dtype, parameter.device.type) for parameter in model.parameters() if parameter.is_floating_point()}
    half = next(((dtype, device) for dtype, device in kinds if dtype in (torch.bfloat16, torch.float16)), None)
    if half is None or not any(dtype == torch.float32 for dtype, _ in kinds):
        return contextlib.nullcontext()
    return torch.autocast(half[1], dtype=half[0])


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and each module's own mode again behind: a frozen tower may be in eval mode alone."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count_virtual_tokens(model: nn.Module) -> int:
    """How many tokens a model's method puts before the input embeddings."""
    method = method_of(model)
    adapted: Any = model
    return 0 if method is None else method.virtual_tokens(adapted.active_peft_config)
