"""Save what was tuned as a directory that anything can load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel

from mmtune.distributed.sharded_parameters import full_state_dict
from mmtune.methods.method_table import MUTATING_INITS
from mmtune.models.checkpoints.adapter_export import to_plain_lora


def initial_factors(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor] | None:
    """LoRA's matrices before training, where their initialization took them out of the base; None for any other.

    PiSSA (arXiv 2404.02948), OLoRA (2406.01775) and LoRA-GA (2407.05000) start from a product that is not zero, and subtract it
    from the base's weights.
    """
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    init = getattr(config, "init_lora_weights", None)
    if not isinstance(init, str) or not init.startswith(MUTATING_INITS):
        return None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_A" in name or ".lora_B" in name}


def save_tuned(
    model: PreTrainedModel | PeftModel, out: Path, initial: dict[str, torch.Tensor] | None, first: bool = True
) -> None:
    """Write an adapter, or a whole model; all processes call it, and the first writes.

    Args:
        out: the directory.
        initial: from `initial_factors`. The adapter is then written as an ordinary LoRA: see `to_plain_lora`.
        first: whether this is the first process.
    """
    with full_state_dict(model, first) as state:
        if first:
            model.save_pretrained(out, state_dict=state)
    if initial is None or not first:
        return
    to_plain_lora(out, initial)
