"""Tensors of a checkpoint that its model class does not read, such as a multi-token-prediction head; copied into releases."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from mmtune.models.checkpoints.checkpoint_files import safetensors_files
from mmtune.utils.errors import CheckFailed


def find_unread_tensors(model: PreTrainedModel, source: str) -> dict[str, Path]:
    """The keys of a checkpoint that no module of the model reads, with the files that contain them.

    Keys are renamed as transformers renames them on loading. transformers drops keys that the model does not have, without a
    warning if the class lists them as expected.

    Args:
        model: a model of the checkpoint's class, without PEFT modules.
        source: the directory or hub id of the checkpoint; it must be on this machine.
    """
    files = safetensors_files(Path(cached_file(source, CONFIG_NAME)).parent)
    if not files:
        print(f"{source}: no safetensors files; tensors that {type(model).__name__} does not read are not searched for")
    files_by_key = {key: file for file in files for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118 - no mapping
    model_keys = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    unread = {}
    for key in sorted(files_by_key, key=dot_natural_key):  # some renamings depend on the order
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, model_keys)
        if renamed not in model_keys and key not in model_keys:
            unread[key] = files_by_key[key]
    return unread


def append_tensors(tensors: Mapping[str, Path], out: Path, max_shard_size: str = "5GB") -> dict[str, dict[str, object]]:
    """Copy tensors into a saved checkpoint as additional shards, byte for byte.

    Args:
        tensors: keys and their files, from `find_unread_tensors`.
        out: the checkpoint; its files are renamed to shards and its index is rewritten.
        max_shard_size: the maximum size of a new shard, as in `save_pretrained`.

    Returns:
        `dtype` and `shape` of each tensor by key, for the manifest.

    Raises:
        CheckFailed: the checkpoint already has a tensor of that name.
    """
    if not tensors:
        return {}
    copied: dict[str, torch.Tensor] = {}
    for file in sorted(set(tensors.values())):
        with safe_open(file, framework="pt") as opened:
            copied |= {key: opened.get_tensor(key).clone() for key in tensors if tensors[key] == file}
    split = split_torch_state_dict_into_shards(copied, max_shard_size=max_shard_size)
    shards: list[tuple[Path | None, list[str]]] = []
    for file in safetensors_files(out):
        with safe_open(file, framework="pt") as opened:
            shards.append((file, list(opened.keys())))
    shards += [(None, names) for names in split.filename_to_tensors.values()]
    weight_map: dict[str, str] = {}
    for number, (existing, names) in enumerate(shards, start=1):
        path = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if existing is not None:
            existing.rename(path)
        else:
            save_file({name: copied[name] for name in names}, path, metadata={"format": "pt"})
        if duplicates := sorted(weight_map.keys() & names):
            raise CheckFailed(f"{out}: duplicate tensors {', '.join(duplicates[:3])} after copying unread tensors of the base")
        weight_map |= dict.fromkeys(names, path.name)
    index = out / SAFE_WEIGHTS_INDEX_NAME
    metadata = json.loads(index.read_text(encoding="utf-8"))["metadata"] if index.is_file() else {}
    metadata["total_size"] = sum(_size(path) for path in out.glob("model-*.safetensors"))
    index.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
    return {key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)} for key, value in copied.items()}


def _size(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: the file without its header and the 8-byte length of the header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def copy_unread_tensors(model: PreTrainedModel, base: str, out: Path) -> None:
    """Copy the tensors of the base that its class does not read into a saved model, and print their names.

    Args:
        model: a model of the base's class.
        base: the directory or hub id of the base; it must be on this machine.
        out: the saved model.
    """
    if copied := append_tensors(find_unread_tensors(model, base), out):
        print(describe_unread_tensors(model, copied))


def describe_unread_tensors(model: PreTrainedModel, keys: Collection[str], action: str = "copied from the base unchanged") -> str:
    """One line about tensors that the model class does not read, and what was done with them."""
    names = ", ".join([*keys][:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"tensors that {type(model).__name__} does not read, {action}: {len(keys)} ({names})"
