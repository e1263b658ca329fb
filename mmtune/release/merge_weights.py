"""Merging of adapters into the weights of their base."""

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
    """The trained weights of a run or of one of its checkpoints.

    Raises:
        UserError: the path is neither, or the run has no trained weights yet.
        CheckFailed: a damaged checkpoint.
    """
    trained = locate_trained_weights(path)
    if not trained.run.recipe.is_file():
        raise UserError(f"{path}: expected a run or a checkpoint in its checkpoints/, found no recipe.yaml")
    return trained


def locate_run_adapter(path: Path) -> TrainedWeights:
    """The adapter of a run or of one of its checkpoints.

    Raises:
        UserError: as `locate_run_weights`, or a run that trained the full model.
    """
    trained = locate_run_weights(path)
    if not trained.is_adapter:
        raise UserError(f"{path}: the run trained the full model and has no adapter; release it with `mmtune merge RUN OUT`")
    return trained


def check_mergeable(trained: TrainedWeights) -> None:
    """Check that an adapter's method can be merged.

    Raises:
        UserError: the method is not a change of the base's weights.
    """
    method = adapter_method(trained.path)
    if not METHODS[method].mergeable:
        raise UserError(
            f"{trained.run.path}: a {method} adapter cannot be merged into the base's weights; release it next to its base with "
            "--keep-adapter"
        )


def _base_identity(base: str) -> tuple[str, ...]:
    """Hashes of the weights of a local base, because each run that assembles a base has its own copy; otherwise the hub id."""
    files = safetensors_files(Path(base))
    return tuple(sha256(file) for file in files) or (base,)


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The base with the active adapter merged into its weights and all PEFT modules removed.

    Raises:
        CheckFailed: PEFT left modules of the adapter in the model.
    """
    base = model.get_base_model()
    for name, wrapper in list(base.named_modules()):
        # PEFT unloads these for LoRA only; for other methods it leaves them, or fails on a module without `weight`.
        if isinstance(wrapper, ModulesToSaveWrapper):
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, wrapper.modules_to_save[wrapper.active_adapters[0]])
    merged: PreTrainedModel = model.merge_and_unload()
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    if remaining := [name for name, module in merged.named_modules() if isinstance(module, wrappers)]:
        raise CheckFailed(
            f"after the merge {len(remaining)} adapter modules remain ({', '.join(remaining[:3])} ...), expected none"
        )
    return merged


def merge_weighted(
    weighted: Sequence[tuple[TrainedWeights, float]], trust_remote_code: bool = False
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Merge the weighted sum of several adapters' weight changes into their common base, in fp32.

    Each adapter is merged on its own, so the adapters may have different mergeable methods and settings.

    Args:
        weighted: adapters and their weights in the sum.
        trust_remote_code: whether code in the base may be executed.

    Returns:
        The model in eval mode, and the first run's processor.

    Raises:
        UserError: adapters with different bases or chat templates.
    """
    bases = {trained.path: locate_adapter_base(trained.path) for trained, _ in weighted}
    if len({_base_identity(base) for base in bases.values()}) > 1:
        listing = "; ".join(f"{path}: {base}" for path, base in bases.items())
        raise UserError(f"expected adapters with the same base, got different bases: {listing}")
    total: dict[str, torch.Tensor] = {}
    processors: list[Any] = []
    name = next(iter(bases.values()))
    base = load_strictly(name, name, quiet=True, dtype=torch.float32, trust_remote_code=trust_remote_code)
    base_weights = {name: tensor for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
    for trained, weight in weighted:
        tuned, processor = load_trained(trained, torch.float32, trust_remote_code=trust_remote_code)
        processors.append(processor)
        merged = merge_adapter(tuned)
        base.generation_config = merged.generation_config
        for name, tensor in merged.state_dict().items():
            if name in base_weights:
                change = weight * (tensor - base_weights[name])
                total[name] = total[name] + change if name in total else change
    if len({processor.chat_template for processor in processors}) > 1:
        raise UserError("expected adapters with the same chat template, got adapters that were trained with different ones")
    base.load_state_dict(base.state_dict() | {name: base_weights[name] + change for name, change in total.items()})
    return base.eval(), processors[0]
