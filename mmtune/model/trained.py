"""Trained weights on disk: a run's adapter or model, or, of a stopped run, its last good checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from mmtune.errors import UserError
from mmtune.manifest import NAME as MANIFEST
from mmtune.manifest import check_manifest
from mmtune.model.checkpoint import ADAPTER_WEIGHTS
from mmtune.run_directory import RunDirectory, run_of_checkpoint

ADAPTER_CONFIG = "adapter_config.json"
INITIAL = "initial.safetensors"
"""In a checkpoint: LoRA's matrices before training, where their initialization took them out of the base."""


@dataclass(frozen=True)
class Trained:
    """The weights that a path stands for.

    Attributes:
        path: an adapter's or a model's directory, or a hub id.
        run: the run that they are of; a directory without a recipe where they are of none.
        step, steps: of a checkpoint, the optimizer steps that it has behind it, and those of the whole run.
    """

    path: Path
    run: RunDirectory
    step: int | None = None
    steps: int | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether they are an adapter's, and not a whole model's."""
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether training may go on from them."""
        return self.step is not None


def find_trained(path: Path) -> Trained:
    """The weights of a run or of one of its checkpoints; any other path is taken as it is.

    Of a run that has not finished the last good checkpoint is taken, which is printed.

    Raises:
        UserError: a directory that holds none of these, or a checkpoint that was not finished.
        CheckFailed: a checkpoint that is damaged.
    """
    run = RunDirectory(path)
    for part in (run.adapter, run.model):
        if _holds_weights(part):
            return Trained(part, run)
    owner = run_of_checkpoint(path)
    if owner is not None or all((path / name).is_file() for name in (TRAINER_STATE_NAME, MANIFEST)):  # or a copy of one
        check_manifest(path)
        return _checkpoint(path, owner or run)
    if _holds_weights(path) or not path.is_dir():
        return Trained(path, run)
    if run.checkpoints_by_step() and run.recipe.is_file():
        trained = _last_checkpoint(run)
        last = trained.path
        print(f"{path} has not finished: {last.name} is taken, after {trained.step} of {trained.steps} steps")
        return trained
    raise UserError(f"{path}: neither a finished run (no adapter/ or model/), nor a checkpoint, nor a model (no {CONFIG_NAME})")


def _last_checkpoint(run: RunDirectory) -> Trained:
    """The newest good checkpoint; a run that goes on may remove one while it is read, and has a newer one then."""
    while (last := run.last_good_checkpoint()) is not None:
        try:
            return _checkpoint(last, run)
        except FileNotFoundError:
            if last.is_dir():
                raise
    raise UserError(f"{run.path}: the run has not finished, and none of its checkpoints is as it was written")


def _holds_weights(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or (path / CONFIG_NAME).is_file()


def _checkpoint(path: Path, run: RunDirectory) -> Trained:
    state = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return Trained(path, run, state["global_step"], state["max_steps"])


def export_adapter(trained: Trained, processor: ProcessorMixin, out: Path, base: str) -> None:
    """Write an adapter with its processor to a directory, and of a checkpoint nothing that only training needs.

    Args:
        base: the name or path of its base that the written adapter gives.
    """
    out.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, GENERATION_CONFIG_NAME):
        if (trained.path / name).is_file():
            shutil.copy2(trained.path / name, out)
    processor.save_pretrained(out)
    if (trained.path / INITIAL).is_file():
        to_plain_lora(out, load_file(trained.path / INITIAL))
    settings = out / ADAPTER_CONFIG
    config = json.loads(settings.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def to_plain_lora(adapter: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Make an adapter of a base that its initialization had changed an ordinary one, of twice the rank, of the base as it was.

    B A - B0 A0 = [B, -B0] [A; A0]. PEFT's own conversion leaves the modules that trained in full out.

    Args:
        adapter: its directory, whose files are written again.
        initial: A0 and B0 by key.
    """
    file, settings = adapter / ADAPTER_WEIGHTS, adapter / ADAPTER_CONFIG
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
