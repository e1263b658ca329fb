"""int8 and nf4: which layers are quantized, and what keeps their weights readable."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from mmtune.models.components import component_of, find_components

QUANTIZED = ("int8", "nf4")


def quantization_config(checkpoint: str, precision: str, trust_remote_code: bool = False) -> BitsAndBytesConfig:
    """How a checkpoint is quantized: the language model's linear layers, and nothing else.

    The vision tower, the projector and the head stay in bf16: they hold few of the weights, and what trains in full must be
    whole. Where they are is read from the model's structure, without its weights.

    Args:
        checkpoint: a directory or hub id.
        precision: `int8` (LLM.int8, arXiv 2208.07339) or `nf4` with double quantization_config (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: a family whose components are not known.
    """
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    components = find_components(model)
    whole = [components.vision_tower, components.projector, *components.projector_extras, components.lm_head]
    skip = [path for path in whole if path is not None]
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )


def prepare_quantized(model: nn.Module) -> None:
    """Check what was quantized, and keep 4-bit weights as they were stored.

    On CPUs with AVX512-BF16 a forward pass without gradients packs 4-bit weights again in place, after which every later
    dequantization gives garbage without an error.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    components = find_components(model)
    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            owner = component_of(name, components)
            assert owner == "language", f"{name} of the {owner} component was quantized"
        if isinstance(module, Linear4bit):
            packs: Any = module
            packs.support_avx512bf16_for_cpu = False
