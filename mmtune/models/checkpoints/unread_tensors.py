"""Tensors of a checkpoint that its model class does not read, such as a multi-token-prediction head: found, and carried over."""

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
    """The tensors of a checkpoint that have no module in the model: their keys, as stored, and the files that hold them.

    The keys are renamed as transformers renames them when it loads. What it then does not find in the model it drops, without
    a warning where the class says so.

    Args:
        model: of the checkpoint's class, with nothing of PEFT in it.
        source: directory or hub id of the checkpoint, which is on this machine.
    """
    files = safetensors_files(Path(cached_file(source, CONFIG_NAME)).parent)
    if not files:
        print(f"{source}: its weights are not in safetensors, so tensors that {type(model).__name__} does not read are not found")
    where = {key: file for file in files for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118 - no mapping
    known = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    unread = {}
    for key in sorted(where, key=dot_natural_key):  # some renamings depend on the order
        renamed, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and key not in known:
            unread[key] = where[key]
    return unread


def append_tensors(tensors: Mapping[str, Path], out: Path, max_shard_size: str = "5GB") -> dict[str, dict[str, object]]:
    """Add tensors to a checkpoint in shards of their own, byte for byte.

    Args:
        tensors: from `find_unread_tensors`.
        out: a saved checkpoint; its files get the names of shards, and its index is written again.
        max_shard_size: of a new file, as transformers takes it.

    Returns:
        `dtype` and `shape` by key, for a manifest.

    Raises:
        CheckFailed: the checkpoint has a tensor of that name already.
    """
    if not tensors:
        return {}
    carried: dict[str, torch.Tensor] = {}
    for file in sorted(set(tensors.values())):
        with safe_open(file, framework="pt") as opened:
            carried |= {key: opened.get_tensor(key).clone() for key in tensors if tensors[key] == file}
    split = split_torch_state_dict_into_shards(carried, max_shard_size=max_shard_size)
    shards: list[tuple[Path | None, list[str]]] = []
    for file in safetensors_files(out):
        with safe_open(file, framework="pt") as opened:
            shards.append((file, list(opened.keys())))
    shards += [(None, names) for names in split.filename_to_tensors.values()]
    weight_map: dict[str, str] = {}
    for number, (written, names) in enumerate(shards, start=1):
        path = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if written is not None:
            written.rename(path)
        else:
            save_file({name: carried[name] for name in names}, path, metadata={"format": "pt"})
        if twice := sorted(weight_map.keys() & names):
            raise CheckFailed(f"{out}: {', '.join(twice[:3])} would be there twice")
        weight_map |= dict.fromkeys(names, path.name)
    index = out / SAFE_WEIGHTS_INDEX_NAME
    metadata = json.loads(index.read_text(encoding="utf-8"))["metadata"] if index.is_file() else {}
    metadata["total_size"] = sum(_size(path) for path in out.glob("model-*.safetensors"))
    index.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
    return {key: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)} for key, value in carried.items()}


def _size(file: Path) -> int:
    """Bytes of the tensors in a safetensors file: all but its header, whose length stands before it in 8 bytes."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def carry_over_unread_tensors(model: PreTrainedModel, base: str, out: Path) -> None:
    """Append the tensors of the base that its class does not read to a saved model, and print their names.

    Args:
        base: directory or hub id of the base, which is on this machine.
    """
    if appended := append_tensors(find_unread_tensors(model, base), out):
        print(describe_unread_tensors(model, appended))


def describe_unread_tensors(
    model: PreTrainedModel, keys: Collection[str], done: str = "carried over from the base unchanged"
) -> str:
    """One line on tensors that a class does not read, and what was done with them."""
    names = ", ".join([*keys][:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    return f"tensors that {type(model).__name__} does not read, {done}: {len(keys)} ({names})"
