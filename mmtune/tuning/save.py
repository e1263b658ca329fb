"""Save what was tuned as a directory that anything can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mmtune.methods.table import MUTATING_INITS
from mmtune.model.sharded import to_save


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
        initial: from `initial_factors`. The adapter is then written as ordinary LoRA of twice the rank on the base as it was:
            B A - B0 A0 = [B, -B0] [A; A0]. PEFT's own conversion leaves the modules that trained in full out.
        first: whether this is the first process.
    """
    with to_save(model, first) as state:
        if first:
            model.save_pretrained(out, state_dict=state)
    if initial is None or not first:
        return
    file, settings = out / "adapter_model.safetensors", out / "adapter_config.json"
    tensors = load_file(file)
    for name, before in initial.items():
        now = tensors[name]
        tensors[name] = torch.cat([now, before], dim=0) if ".lora_A" in name else torch.cat([now, -before], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    config: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    # The update is scaled by alpha / r, or by alpha / sqrt(r) with rsLoRA: the scale stays.
    grown = 2**0.5 if config["use_rslora"] else 2
    config |= {
        "init_lora_weights": True,
        "lora_ga_config": None,
        "r": 2 * config["r"],
        "lora_alpha": grown * config["lora_alpha"],
    }
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: grown * alpha for name, alpha in config["alpha_pattern"].items()}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
