"""Checkpoints on disk: written whole or not at all, and projectors read back strictly."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, ProcessorMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK
from mmtune.models.components import PEFT_PREFIX, find_components
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object, replaced_directory

ADAPTER_WEIGHTS = "adapter_model.safetensors"


UNUSED_WEIGHTS = ("pooler.dense.weight", "pooler.dense.bias")
"""Of towers whose pooled output is not read; some checkpoints lack them."""
LOADING_INFO: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments of `from_pretrained` that report missing and mismatched weights, which `check_weights_loaded` checks."""


def check_weights_loaded(name: str, model: PreTrainedModel, report: Mapping[str, Collection[Any]]) -> None:
    """Refuse a checkpoint that leaves some of its weights to chance.

    Args:
        name: of the checkpoint, for the message.
        report: transformers' own, which comes with `LOADING_INFO`.

    Raises:
        UserError: naming weights that are missing or of another shape.
    """
    random = [key for key in sorted(report["missing_keys"]) if not key.endswith(UNUSED_WEIGHTS)]
    faults = [f"no weights for {_some(random)}"] if random else []
    if mismatched := [f"{key} is {tuple(found)}, not {tuple(right)}" for key, found, right in report["mismatched_keys"]]:
        faults.append(_some(sorted(mismatched)))
    if faults:
        raise UserError(f"{name}: not a whole {type(model).__name__}: {'; '.join(faults)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def set_hub_key_mapping(model: PreTrainedModel) -> None:
    """Have a model that was built in memory saved under the key names of hub checkpoints of its class.

    transformers notes the renamings of a checkpoint that it loads in `_weight_conversions`, and undoes them when it saves. A
    model without such notes it would save without prefixes, such as `vision_tower.vision_model`, that engines read.
    """
    if getattr(model, "_weight_conversions", None) is None:
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def save_checkpoint(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    out: Path,
    *,
    overwrite: bool = False,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint that AutoModelForImageTextToText and AutoProcessor load with no mmtune.

    It is never half written: see `replaced_directory`.

    Args:
        state_dict: the weights, where the model's are in parts.

    Raises:
        UserError: when `out` exists, unless `overwrite`.
    """
    with replaced_directory(Path(out), overwrite, CHECKPOINT_MARK) as fresh:
        write_checkpoint(model, processor, fresh, state_dict)


def write_checkpoint(
    model: PreTrainedModel, processor: ProcessorMixin, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the files of a checkpoint into a folder; arguments as for `save_checkpoint`."""
    set_hub_key_mapping(model)
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def load_projector(model: PreTrainedModel, path: Path) -> None:
    """Copy projector weights from disk into a model, all of them or none.

    Args:
        model: a vision-language model; changed in place, its dtype kept.
        path: a PEFT adapter directory, a run directory that holds `adapter/`, or a full checkpoint.

    Raises:
        UserError: naming any tensor that is missing, unexpected or of another shape.
    """
    components = find_components(model)
    projectors = [part for part in (components.projector, *components.projector_extras) if part is not None]
    wanted = {
        name: parameter
        for name, parameter in (*model.named_parameters(), *model.named_buffers())
        if any(_inside(name, part) for part in projectors) and name in model.state_dict()
    }
    found = _projector_tensors(Path(path), projectors)
    if not found:
        raise UserError(f"{path}: its safetensors hold no projector weights ({', '.join(projectors)})")
    faults = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        if wanted[name].shape != found[name].shape:
            faults.append(f"{name} has shape {tuple(found[name].shape)} where {tuple(wanted[name].shape)} is right")
    if faults:
        raise UserError(f"{path}: not the projector of this model: {'; '.join(faults)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _inside(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _projector_tensors(path: Path, projectors: list[str]) -> dict[str, torch.Tensor]:
    """Projector tensors by their plain names. PEFT writes `base_model.model.` before them and, in some versions, the
    wrapper's `modules_to_save.` or `modules_to_save.ADAPTER.` inside; LLaVA checkpoints on the hub name them without `model.`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                plain = _plain_name(key, projectors)
                if plain is None:
                    continue
                if plain in tensors:
                    raise UserError(f"{path}: holds {plain} twice ({key})")
                tensors[plain] = opened.get_tensor(key)
    return tensors


def _plain_name(key: str, projectors: list[str]) -> str | None:
    name = key.removeprefix(PEFT_PREFIX)
    for part in projectors:
        for spelled in (part, part.removeprefix("model.")):
            if _inside(name, spelled):
                below = name.removeprefix(spelled)
                for wrapper in (".modules_to_save.default", ".modules_to_save", ".original_module"):
                    if below.startswith(wrapper + "."):
                        if wrapper == ".original_module":
                            return None
                        below = below.removeprefix(wrapper)
                return part + below
    return None


def safetensors_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, one or those of an index; none where it has no safetensors."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    weights = read_json_object(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise UserError(f"{index}: expected `weight_map`, an object of file names by tensor")
    names = sorted(set(weights.values()))
    if odd := [name for name in names if Path(name).name != name or name == ".."]:
        raise UserError(f"{index}: {odd[0]!r} is not the name of a file beside it")
    return [folder / name for name in names]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of an adapter, of a run that holds `adapter/`, or of a full checkpoint.

    Raises:
        UserError: for a path that is none of these.
    """
    if not path.is_dir():
        raise UserError(f"projector: {path} is not a directory; expected an adapter, a run or a checkpoint directory")
    for folder in (path, path / "adapter"):
        if (folder / ADAPTER_WEIGHTS).is_file():
            return [folder / ADAPTER_WEIGHTS]
    if files := safetensors_files(path):
        return files
    raise UserError(f"projector: {path} holds none of {ADAPTER_WEIGHTS}, adapter/{ADAPTER_WEIGHTS}, model.safetensors")
