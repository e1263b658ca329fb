"""Device, dtype and mode of a model outside training: device placement, autocast, eval mode."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import slice_logits_to_keep

from mmtune.families.family_table import family_of
from mmtune.families.patch_embedding import use_patch_products
from mmtune.families.structure import output_head
from mmtune.methods.method_table import method_of


def prepare_computation(model: PreTrainedModel) -> None:
    """Change how a loaded model computes: what its family corrects, patches as products, and `logits_to_keep` for all."""
    _accept_logits_to_keep(model)
    family_of(str(model.config.model_type)).prepare_model(model)
    use_patch_products(model)


def _accept_logits_to_keep(model: PreTrainedModel) -> None:
    """Let a model take `logits_to_keep`; some classes of transformers ignore it and compute all logits."""
    forward = type(model).forward
    if "logits_to_keep" in inspect.signature(forward).parameters:
        return

    @functools.wraps(forward)
    def selective(self: Any, *args: Any, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
        def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return slice_logits_to_keep(inputs[0], logits_to_keep), *inputs[1:]

        head = output_head(self)
        assert head is not None  # a model without one has no components
        hook = head.register_forward_pre_hook(select)
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    model.forward = types.MethodType(selective, model)  # on the model: PEFT calls `forward` without the hooks of a module


def to_best_device(model: nn.Module) -> nn.Module:
    """Move a model to the accelerator if its free memory is at least 1.2 times the model's size; otherwise leave it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or getattr(model, "is_quantized", False):  # a quantized model is already on its device
        return model
    needed = 1.2 * sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    free, _ = torch.accelerator.get_memory_info(accelerator)
    if needed > free:
        print(f"the model stays on the CPU: it needs {needed / 1e9:.1f} GB, {accelerator} has {free / 1e9:.1f} GB free")
        return model
    return model.to(accelerator)


def move_batch(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device, with floating-point tensors in the dtype of the model's first parameter."""
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    cast = {key: value.to(first.dtype) if value.is_floating_point() else value for key, value in batch.items()}
    return {key: value.to(first.device) for key, value in cast.items()}


def training_autocast(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Autocast as in training if the model has both fp32 and half-precision weights; otherwise a null context."""
    weights = {(parameter.dtype, parameter.device.type) for parameter in model.parameters() if parameter.is_floating_point()}
    half = next(((dtype, device) for dtype, device in weights if dtype in (torch.bfloat16, torch.float16)), None)
    if half is None or not any(dtype == torch.float32 for dtype, _ in weights):
        return contextlib.nullcontext()
    dtype, device = half
    return torch.autocast(device, dtype=dtype)


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode, then restore the mode of each module: a frozen tower may be in eval mode while the rest trains."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def count_virtual_tokens(model: nn.Module) -> int:
    """The number of virtual tokens that a model's method puts before the input embeddings."""
    method = method_of(model)
    adapted: Any = model
    return 0 if method is None else method.virtual_tokens(adapted.active_peft_config)


@contextlib.contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """Run the base of an adapter, without the components that are tuned in full beside it.

    PEFT's `disable_adapter` leaves those on for methods of virtual tokens.
    """
    with model.disable_adapter():
        wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        tuned = [wrapper for wrapper in wrappers if not wrapper.disable_adapters]
        for wrapper in tuned:
            wrapper.enable_adapters(False)
        try:
            yield
        finally:
            for wrapper in tuned:
                wrapper.enable_adapters(True)


def computes_loss(model: nn.Module) -> bool:
    """Whether the model's class computes the loss: only where its method adds a term to it, and the class can.

    transformers' loss holds four arrays of the logits' size in fp32; the objective's holds parts of them.
    """
    method = method_of(model)
    adapted: Any = model
    return method is not None and method.adds_to_loss and family_of(str(adapted.config.model_type)).scores_labels
