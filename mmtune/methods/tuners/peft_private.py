"""PEFT's registry, extended by the methods that mmtune adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method


def register(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> PeftType:
    """Make PEFT save, load, enable and disable a method by its name, as it does its own.

    Args:
        name: lower case. Parameters that belong to the method have `NAME_` in their names, by which PEFT knows what to save.
        config: the method's configuration.
        tuner: the method's model class.

    Returns:
        The method's type, for `config.peft_type`. Registering a name again changes nothing.
    """
    value = name.upper()
    if value in PeftType._value2member_map_:
        return PeftType(value)
    # An enumeration with members cannot be subclassed, and PEFT asks this one by name and by value.
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    PeftType._member_names_.append(value)
    type.__setattr__(PeftType, value, member)
    register_peft_method(name=name, config_cls=config, model_cls=tuner)
    return member


def names_read_as_experts(model_type: str) -> frozenset[str]:
    """Last names of LoRA's target modules that PEFT replaces by the stacked experts, at every injection and every load.

    Adapters from before transformers 5 name the experts of these model types so. The shared experts and the dense layers of the
    same model have layers of the same names, which PEFT then leaves out.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    if pattern not in conversion._MOE_FUSED_TARGETS:
        return frozenset()
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING[pattern])


@contextmanager
def adapter_keys_as_stored() -> Iterator[None]:
    """Inside, PEFT loads adapters by the names of their tensors.

    Otherwise it renames them as transformers does the weights of releases. A rule that also matches a name of today, as two of
    DeepSeek-OCR 2 do, then leaves the adapter out, with a warning only. All adapters here have the names of today.
    """
    from peft.utils import transformers_weight_conversion as conversion

    mapping = conversion.get_checkpoint_conversion_mapping
    conversion.get_checkpoint_conversion_mapping = lambda *_: None
    try:
        yield
    finally:
        conversion.get_checkpoint_conversion_mapping = mapping


def cast_layer_input(layer: BaseTunerLayer, x: torch.Tensor, dtype: Any) -> torch.Tensor:
    """The input of an adapter in the dtype of its weights, as PEFT's own layers cast it (`autocast_adapter_dtype`)."""
    cast: torch.Tensor = layer._cast_input_dtype(x, dtype)
    return cast


def adapts_stack(module: torch.nn.Module) -> bool:
    """Whether a module is PEFT's wrapper of a parameter that stacks the weights of experts."""
    return isinstance(module, ParamWrapper)


def stacked_factors(wrapper: torch.nn.Module) -> tuple[list[torch.nn.Parameter], int]:
    """The adapter's matrices of such a wrapper, each of all experts, and the number of experts."""
    assert isinstance(wrapper, ParamWrapper)
    return [*wrapper.lora_A.parameters(), *wrapper.lora_B.parameters()], int(wrapper.num_experts)
