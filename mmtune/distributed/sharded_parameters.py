"""Models that are no process' own: at ZeRO-3 each holds its part of every weight, from the moment that they are made, and under
FSDP2 while they train.

Nothing here does anything to a model whose weights are whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from mmtune.distributed.context import DistributedContext


@contextlib.contextmanager
def meta_init() -> Iterator[None]:
    """Inside, models are made without weights, which transformers at ZeRO-3 would divide, and no random number is drawn."""
    with torch.device("meta"), set_zero3_state(), torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def unsharded_loading(dist: DistributedContext) -> Iterator[None]:
    """Inside, transformers loads models in full at ZeRO-3 too, in every process."""
    if dist.construction is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(dist.construction)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only its part of the model."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def size_of(parameter: torch.Tensor) -> int:
    """How many numbers a parameter holds over all processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def to_float32(parameter: nn.Parameter) -> None:
    """Keep a parameter in fp32, its part in this process too."""
    parameter.data = parameter.data.to(torch.float32)
    if hasattr(parameter, "ds_tensor"):
        parameter.ds_tensor.data = parameter.ds_tensor.data.to(torch.float32)


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Inside, every process has the full parameters. All processes must enter together.

    Args:
        changed: keep the main process' changes to them.
    """
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changed else None):
        yield


@contextlib.contextmanager
def gathered_forward(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a sharded model can run before the trainer wraps it: parameters outside its layers are gathered, those of a layer
    while it runs. All processes must run it together.
    """
    if not is_sharded(model):
        yield
        return
    kinds = set(model._no_split_modules or ())
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # from the outside in
        if type(module).__name__ in kinds and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = module
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    at_work: dict[int, contextlib.AbstractContextManager[None]] = {}

    def gather(layer: nn.Module, *_: Any) -> None:
        at_work[id(layer)] = gathered(list(layer.parameters()))
        with torch.inference_mode(False):  # what is made of weights in it could not train later
            at_work[id(layer)].__enter__()

    def release(layer: nn.Module, *_: Any) -> None:
        with torch.inference_mode(False):
            at_work.pop(id(layer)).__exit__(None, None, None)

    hooks = [layer.register_forward_pre_hook(gather) for layer in layers.values()]
    hooks += [layer.register_forward_hook(release, always_call=True) for layer in layers.values()]
    try:
        with gathered([parameter for parameter in model.parameters() if id(parameter) not in inside]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def full_state_dict(model: nn.Module, first: bool) -> Iterator[dict[str, torch.Tensor] | None]:
    """The full state dict of a sharded model; with an adapter, gathers its parameters, which PEFT saves. All processes enter.

    Args:
        first: whether this is the process that saves.

    Yields:
        None with an adapter. Without one the model's `state_dict`, gathered a weight at a time onto the main process' CPU.
    """
    if isinstance(model, PeftModel):
        with gathered([parameter for parameter in model.parameters() if parameter.requires_grad]), _undivided(model):
            yield None
        return
    state: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}  # one of what is tied
    for name, tensor in model.state_dict(keep_vars=True).items():
        divided = hasattr(tensor, "ds_id") or isinstance(tensor, DTensor)
        with gathered([tensor]):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if first and id(tensor) not in copies:
                copies[id(tensor)] = whole.detach().cpu().clone() if divided else tensor.detach()
        if first:
            state[name] = copies[id(tensor)]
    yield state


@contextlib.contextmanager
def _undivided(model: nn.Module) -> Iterator[None]:
    """Inside, trainable parameters that FSDP2 sharded are full in every process."""
    parts = [
        (module, name, part)
        for module in model.modules()
        for name, part in module.named_parameters(recurse=False)
        if isinstance(part, DTensor) and part.requires_grad
    ]
    for module, name, part in parts:
        module.register_parameter(name, nn.Parameter(part.full_tensor()))
    try:
        yield
    finally:
        for module, name, part in parts:
            module.register_parameter(name, part)
