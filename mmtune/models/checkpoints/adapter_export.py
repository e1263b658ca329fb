"""Export of adapters: without training state, and as plain LoRA if the initialization changed the base's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ProcessorMixin
from transformers.utils import GENERATION_CONFIG_NAME

from mmtune.models.checkpoints.checkpoint_files import ADAPTER_WEIGHTS
from mmtune.models.checkpoints.trained_weights import ADAPTER_CONFIG, INITIAL_LORA, TrainedWeights


def export_adapter(trained: TrainedWeights, processor: ProcessorMixin, out: Path, base: str) -> None:
    """Write an adapter and its processor to a directory, without the training state of a checkpoint.

    Args:
        trained: the adapter.
        processor: the processor to save with it.
        out: the directory to create.
        base: the hub id or path for `base_model_name_or_path`.
    """
    out.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, GENERATION_CONFIG_NAME):
        if (trained.path / name).is_file():
            shutil.copy2(trained.path / name, out)
    processor.save_pretrained(out)
    if (trained.path / INITIAL_LORA).is_file():
        to_plain_lora(out, load_file(trained.path / INITIAL_LORA))
    settings = out / ADAPTER_CONFIG
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_plain_lora(adapter: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Convert an adapter whose initialization changed the base into a plain LoRA of twice the rank on the original base.

    The update is B A - B0 A0 = [B, -B0] [A; A0]. PEFT's own conversion drops fully trained modules.

    Args:
        adapter: the adapter directory; its files are overwritten.
        initial: the initial matrices A0 and B0 by key.
    """
    file, settings = adapter / ADAPTER_WEIGHTS, adapter / ADAPTER_CONFIG
    tensors = load_file(file)
    for name, start in initial.items():
        final = tensors[name]
        tensors[name] = torch.cat([final, start], dim=0) if ".lora_A" in name else torch.cat([final, -start], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    config: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    # Keeps the scale of the update: alpha / r, or alpha / sqrt(r) with rsLoRA.
    alpha_factor = 2**0.5 if config["use_rslora"] else 2
    config |= {
        "init_lora_weights": True,
        "lora_ga_config": None,
        "r": 2 * config["r"],
        "lora_alpha": alpha_factor * config["lora_alpha"],
    }
    config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
    config["alpha_pattern"] = {name: alpha_factor * alpha for name, alpha in config["alpha_pattern"].items()}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
