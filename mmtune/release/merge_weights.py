"""Fold adapters into the weights of their base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel, ProcessorMixin

from mmtune.methods.method_table import METHODS
from mmtune.models.checkpoints.checkpoint_files import safetensors_files
from mmtune.models.checkpoints.trained_weights import TrainedWeights, locate_adapter_base, locate_trained_weights
from mmtune.models.load import adapter_method, load_strictly, load_trained
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.manifest import sha256


def locate_run_weights(path: Path) -> TrainedWeights:
    """What a run has trained, or had at one of its checkpoints.

    Raises:
        UserError: neither of these, or nothing was trained yet.
        CheckFailed: a damaged checkpoint.
    """
    trained = locate_trained_weights(path)
    if not trained.run.recipe.is_file():
        raise UserError(f"{path} is neither a run nor a checkpoint in a run's checkpoints/: there is no recipe.yaml")
    return trained


def locate_run_adapter(path: Path) -> TrainedWeights:
    """As `locate_run_weights`, of a run that trains an adapter.

    Raises:
        UserError: a run that trains the whole model as well.
    """
    trained = locate_run_weights(path)
    if not trained.is_adapter:
        raise UserError(f"{path} trained the whole model, so it has no adapter; `mmtune merge RUN OUT` alone releases it")
    return trained


def check_mergeable(trained: TrainedWeights) -> None:
    """
    Raises:
        UserError: the adapter's method is no change of weights.
    """
    method = adapter_method(trained.path)
    if not METHODS[method].mergeable:
        raise UserError(
            f"{trained.run.path}: {method} is no change of weights, so it cannot be merged; --keep-adapter releases it beside "
            "its base"
        )


def _content(base: str) -> tuple[str, ...]:
    """What a base is: the weights of a directory, since each run that assembles one has its own; else its name."""
    files = safetensors_files(Path(base))
    return tuple(sha256(file) for file in files) or (base,)


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base with the active adapter folded into it, and nothing of PEFT left."""
    base = model.get_base_model()
    for name, wrapper in list(base.named_modules()):
        # PEFT unloads these for LoRA only; for its other methods it leaves them or stumbles over a module without `weight`.
        if isinstance(wrapper, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, wrapper.modules_to_save[wrapper.active_adapters[0]])
    merged: PreTrainedModel = model.merge_and_unload()
    left = [name for name, module in merged.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if left:
        raise CheckFailed(f"the merge left {len(left)} modules of the adapter in place ({', '.join(left[:3])} ...)")
    return merged


def merge_weighted(
    parts: Sequence[tuple[TrainedWeights, float]], trust_remote_code: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """One base plus the weighted sum of what several adapters change in its weights, in fp32.

    Each adapter is folded alone, so every method that folds can take part, and each with its own settings.

    Args:
        parts: what runs have trained, and their weights in the sum.
        trust_remote_code: whether code that comes with the base may run.

    Returns:
        The model in eval mode, and the first run's processor.

    Raises:
        UserError: adapters of different bases or chat templates.
    """
    bases = {trained.path: locate_adapter_base(trained.path) for trained, _ in parts}
    if len({_content(base) for base in bases.values()}) > 1:
        listing = "; ".join(f"{path}: {base}" for path, base in bases.items())
        raise UserError(f"adapters of different bases cannot be added: {listing}")
    total: dict[str, torch.Tensor] = {}
    processors: list[Any] = []
    name = next(iter(bases.values()))
    base = load_strictly(name, name, quiet=True, dtype=torch.float32, trust_remote_code=trust_remote_code)
    before = {name: tensor for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    for trained, weight in parts:
        tuned, processor = load_trained(trained, torch.float32, trust_remote_code=trust_remote_code)
        processors.append(processor)
        merged = merge_adapter(tuned)
        base.generation_config = merged.generation_config
        for name, tensor in merged.state_dict().items():
            if name in before:
                change = weight * (tensor - before[name])
                total[name] = total[name] + change if name in total else change
    if len({processor.chat_template for processor in processors}) > 1:
        raise UserError("adapters that were trained with different chat templates cannot be added")
    base.load_state_dict({name: before[name] + change for name, change in total.items()}, strict=False)
    return base.eval(), processors[0]
