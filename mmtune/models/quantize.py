"""Quantization of the base with bitsandbytes: int8 and nf4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from mmtune.families.structure import find_components
from mmtune.models.checkpoints.remote_code import auto_class
from mmtune.models.components import component_of
from mmtune.models.experts.expert_stacks import ExpertStack
from mmtune.utils.errors import UserError

QUANTIZED = ("int8", "nf4")


def quantization_config(config: PreTrainedConfig, precision: str, trust_remote_code: bool = False) -> BitsAndBytesConfig:
    """The quantization config of a checkpoint: only the linear layers of the language model are quantized.

    The vision tower, the projector and the head stay in bf16: they have few of the weights, and fully trained modules cannot be
    quantized. Their paths are found in the model's structure, without its weights.

    Args:
        config: the checkpoint's configuration.
        precision: `int8` (LLM.int8, arXiv 2208.07339) or `nf4` with double quantization (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: an unsupported family.
    """
    config = type(config).from_dict(config.to_dict())  # a model that is built from a config changes it
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    components = find_components(model)
    projectors = [components.projector, *components.projector_extras]
    unquantized = [*components.towers, *projectors, *components.others, components.lm_head]
    skip = [*(path for path in unquantized if path is not None), *components.bypassed]
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )


def describe_unquantized_experts(stacks: Iterable[ExpertStack], precision: str) -> str | None:
    """What stays in bf16 in a mixture of experts, as one line; None where nothing is quantized or nothing is stacked.

    Args:
        precision: `model.precision`.
    """
    size = sum(stack.stored for stack in stacks)
    if precision not in QUANTIZED or not size:
        return None
    return (
        f"model.precision: {precision}: {size:,} weights of stacked experts stay in bf16, {2 * size / 1e9:.2f} GB: bitsandbytes "
        "quantizes linear layers only"
    )


def prepare_quantized(model: nn.Module) -> None:
    """Check that only the language model is quantized, and disable the repacking of 4-bit weights on CPUs.

    On CPUs with AVX512-BF16, a forward pass without gradients repacks 4-bit weights in place; every later dequantization then
    gives wrong values without an error.

    Raises:
        UserError: another component is quantized.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    components = find_components(model)
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            component = component_of(name, components)
            if component != "language":  # as in a checkpoint that another tool has quantized
                raise UserError(
                    f"expected only the language model quantized, got {name} of the {component} component; use an "
                    "unquantized checkpoint"
                )
        if isinstance(module, Linear4bit):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
