"""Export of adapters: without training state, and for the original base if the initialization changed its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from transformers import ProcessorMixin
from transformers.utils import GENERATION_CONFIG_NAME

from mmtune.methods.method_table import method_of_peft_type
from mmtune.models.checkpoints.checkpoint_files import ADAPTER_WEIGHTS
from mmtune.models.checkpoints.trained_weights import ADAPTER_CONFIG, INITIAL_FACTORS, TrainedWeights, read_adapter_config


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
    if (trained.path / INITIAL_FACTORS).is_file():
        method = method_of_peft_type(read_adapter_config(out).get("peft_type"))
        if method is not None:
            method.restore_base(out, load_file(trained.path / INITIAL_FACTORS))
    settings = out / ADAPTER_CONFIG
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
