"""Sharded parameters (ZeRO-3, FSDP2): gather, run, save.

At ZeRO-3 each process holds a shard of every weight from construction on; under FSDP2 while the model trains. A model whose
weights are full stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mmtune.distributed.context import DistributedContext
from mmtune.distributed.deepspeed_private import (
    disable_sharded_construction,
    is_sharded_parameter,
    resume_sharded_construction,
    shard_to_float32,
)
from mmtune.utils.transformers_private import layer_class_names, without_zero3_init


@contextlib.contextmanager
def meta_init() -> Iterator[None]:
    """Inside, models are built on the meta device, without weights, and no random number is drawn.

    transformers would shard such a model at ZeRO-3.
    """
    with torch.device("meta"), without_zero3_init(), torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def unsharded_loading(dist: DistributedContext) -> Iterator[None]:
    """Inside, transformers loads models in full at ZeRO-3 too, in every process."""
    if dist.construction is None:
        yield
        return
    disable_sharded_construction()
    try:
        yield
    finally:
        resume_sharded_construction(dist.construction)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a shard of the model (ZeRO-3)."""
    return any(is_sharded_parameter(parameter) for parameter in model.parameters())


def to_float32(parameter: nn.Parameter) -> None:
    """Convert a parameter to fp32, and its shard in this process too."""
    parameter.data = parameter.data.to(torch.float32)
    shard_to_float32(parameter)


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Inside, parameters are full in every process; all processes enter together.

    Args:
        changed: keep the changes that the main process makes to them.
    """
    sharded = [parameter for parameter in parameters if is_sharded_parameter(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if changed else None):
        yield


@contextlib.contextmanager
def gathered_forward(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a sharded model can run before the Trainer has wrapped it; all processes run it together.

    Parameters outside the layers are full; a layer's are full during its forward pass.
    """
    if not is_sharded(model):
        yield
        return
    class_names = layer_class_names(model)
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # outer modules first
        if type(module).__name__ in class_names and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = module
    in_layers = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    running: dict[int, contextlib.AbstractContextManager[None]] = {}

    def gather(layer: nn.Module, *_: Any) -> None:
        running[id(layer)] = gathered(list(layer.parameters()))
        with torch.inference_mode(False):  # tensors created in inference mode cannot train later
            running[id(layer)].__enter__()

    def release(layer: nn.Module, *_: Any) -> None:
        with torch.inference_mode(False):
            running.pop(id(layer)).__exit__(None, None, None)

    hooks = [layer.register_forward_pre_hook(gather) for layer in layers.values()]
    hooks += [layer.register_forward_hook(release, always_call=True) for layer in layers.values()]
    try:
        with gathered([parameter for parameter in model.parameters() if id(parameter) not in in_layers]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def full_state_dict(model: nn.Module, is_main_process: bool) -> Iterator[dict[str, torch.Tensor] | None]:
    """Inside, the weights to save are full; all processes enter together.

    Yields:
        None for a PEFT model: its adapter is full in every process, as its own way of saving needs. Otherwise the model's
        `state_dict`, gathered one weight at a time onto the CPU of the main process; empty in other processes.
    """
    if isinstance(model, PeftModel):
        with gathered([parameter for parameter in model.parameters() if parameter.requires_grad]), _unsharded(model):
            yield None
        return
    state: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # by id, so that tied weights are copied once
    for name, tensor in model.state_dict(keep_vars=True).items():
        sharded = is_sharded_parameter(tensor) or isinstance(tensor, DTensor)
        with gathered([tensor]):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if is_main_process and id(tensor) not in copies:
                copies[id(tensor)] = full.detach().cpu().clone() if sharded else tensor.detach()
        if is_main_process:
            state[name] = copies[id(tensor)]
    yield state


@contextlib.contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, trainable parameters that FSDP2 has sharded are full in every process."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the outermost parameters full, and `state_dict` would shard them again
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    for module, name, parameter in sharded:
        module.register_parameter(name, nn.Parameter(parameter.full_tensor()))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module.register_parameter(name, parameter)
