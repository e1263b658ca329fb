"""Checkpoint files: atomic writing, complete loading, and projector weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmtune.families.structure import find_components
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK
from mmtune.models.components import PEFT_PREFIX
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object, replaced_directory
from mmtune.utils.transformers_private import set_weight_conversions, weight_conversions

ADAPTER_WEIGHTS = "adapter_model.safetensors"
UNUSED_WEIGHTS = ("pooler.dense.weight", "pooler.dense.bias")
"""Weights of a vision tower's pooler, whose output is not used; some checkpoints do not have them."""
LOADING_INFO: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments of `from_pretrained` that report missing and mismatched weights, which `check_weights_loaded` checks."""


def check_weights_loaded(name: str, model: PreTrainedModel, report: Mapping[str, Collection[Any]]) -> None:
    """Check that every weight of a model was loaded from its checkpoint and none was initialized at random.

    Args:
        name: the checkpoint, for the message.
        model: the loaded model.
        report: the loading info that `from_pretrained` returns with `LOADING_INFO`.

    Raises:
        UserError: weights that are missing or have another shape, by name.
    """
    missing = [key for key in sorted(report["missing_keys"]) if not key.endswith(UNUSED_WEIGHTS)]
    problems = [f"missing {_shortened(missing)}"] if missing else []
    if mismatched := [
        f"{key}: expected shape {tuple(expected)}, got {tuple(actual)}" for key, actual, expected in report["mismatched_keys"]
    ]:
        problems.append(_shortened(sorted(mismatched)))
    if problems:
        raise UserError(f"{name}: its weights do not match {type(model).__name__}: {'; '.join(problems)}")


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def set_hub_key_mapping(model: PreTrainedModel) -> None:
    """Set the key mapping of a model that was built in memory, so that it is saved with the key names of hub checkpoints.

    transformers stores the key mapping of a loaded checkpoint in `_weight_conversions` and inverts it when saving. Without it,
    keys lack prefixes such as `vision_tower.vision_model`, which inference engines expect.
    """
    if weight_conversions(model) is None:
        set_weight_conversions(model, get_model_conversion_mapping(model, add_legacy=False))


def save_checkpoint(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    *,
    overwrite: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint that AutoModelForImageTextToText and AutoProcessor load without mmtune.

    The directory is written atomically: see `replaced_directory`.

    Args:
        model: the model.
        processor: its processor.
        out: the directory to write.
        overwrite: replace an existing checkpoint.
        state_dict: the full weights of a sharded model.

    Raises:
        UserError: `out` exists and `overwrite` is not set, or `out` is not a checkpoint.
    """
    with replaced_directory(Path(out), overwrite, CHECKPOINT_MARK) as fresh:
        write_checkpoint(model, processor, fresh, state_dict)


def write_checkpoint(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the files of a checkpoint into an existing folder; arguments as for `save_checkpoint`."""
    set_hub_key_mapping(model)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def load_projector(model: PreTrainedModel, path: Path) -> None:
    """Load projector weights from disk into a model, in place; nothing is changed if a tensor does not fit.

    Args:
        model: a vision-language model; its dtype is kept.
        path: a PEFT adapter directory, a run directory with `adapter/`, or a full checkpoint.

    Raises:
        UserError: tensors that are missing, unexpected or of another shape, by name.
    """
    components = find_components(model)
    projectors = [path for path in (components.projector, *components.projector_extras) if path is not None]
    parameters = {
        name: parameter
        for name, parameter in (*model.named_parameters(), *model.named_buffers())
        if any(_is_inside(name, module) for module in projectors) and name in model.state_dict()
    }
    tensors = _projector_tensors(Path(path), projectors)
    if not tensors:
        raise UserError(f"{path}: expected projector weights ({', '.join(projectors)}), found none in its safetensors files")
    problems = [f"missing {name}" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & tensors.keys()):
        expected, actual = tuple(parameters[name].shape), tuple(tensors[name].shape)
        if expected != actual:
            problems.append(f"{name}: expected shape {expected}, got {actual}")
    if problems:
        raise UserError(f"{path}: its projector does not match this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _projector_tensors(path: Path, projectors: list[str]) -> dict[str, torch.Tensor]:
    """The projector tensors in a folder, by their names in the model.

    PEFT adds the prefix `base_model.model.` and, in some versions, `modules_to_save.` or `modules_to_save.ADAPTER.` inside the
    name; LLaVA checkpoints on the hub have no `model.` prefix.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is not a mapping
                name = _model_name(key, projectors)
                if name is None:
                    continue
                if name in tensors:
                    raise UserError(f"{path}: duplicate tensor {name} ({key})")
                tensors[name] = opened.get_tensor(key)
    return tensors


def _model_name(key: str, projectors: list[str]) -> str | None:
    """The name in the model of a key of a projector tensor; None for other keys and for PEFT's copy of the original module."""
    name = key.removeprefix(PEFT_PREFIX)
    for module in projectors:
        for prefix in (module, module.removeprefix("model.")):
            if _is_inside(name, prefix):
                suffix = name.removeprefix(prefix)
                for wrapper in (".modules_to_save.default", ".modules_to_save", ".original_module"):
                    if suffix.startswith(wrapper + "."):
                        if wrapper == ".original_module":
                            return None
                        suffix = suffix.removeprefix(wrapper)
                return module + suffix
    return None


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or the shards in its index; empty if it has none.

    Raises:
        UserError: an index that is invalid or names a file in another folder.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    weights = read_json_object(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"{index}: weight_map: expected an object with a file name for each tensor")
    names = sorted(set(weights.values()))
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise UserError(f"{index}: weight_map: expected file names in the same folder, got {outside[0]!r}")
    return [folder / name for name in names]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of an adapter directory, a run directory with `adapter/`, or a full checkpoint.

    Raises:
        UserError: the path is none of these.
    """
    if not path.is_dir():
        raise UserError(f"projector: {path}: expected a directory of an adapter, a run or a checkpoint")
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_WEIGHTS).is_file():
            return [folder / ADAPTER_WEIGHTS]
    if files := safetensors_files(path):
        return files
    raise UserError(
        f"projector: {path}: expected {ADAPTER_WEIGHTS}, adapter/{ADAPTER_WEIGHTS} or {SAFE_WEIGHTS_NAME}, found none"
    )
