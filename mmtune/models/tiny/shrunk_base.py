"""Shrunk bases for `mmtune train --rehearse`: a base's own processor and configuration with a tiny random model.

Everything that decides tokens, masks and positions stays the base's own: tokenizer, chat template, image sizes, patches, grids.
Only widths and numbers of layers shrink.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from mmtune.models.checkpoints.locate_base import local_folder

WIDTH, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
HEAD_DIM = WIDTH // HEADS
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "embed_dim": WIDTH,
    "out_hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_window_layers": LAYERS,
    "fullatt_block_indexes": [LAYERS - 1],
    "deepstack_visual_indexes": [0],
}
"""What the fields of a config that set a size become. Others stay as they are."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors.index.json", ".bin.index.json")


def local_files(base: str) -> Path | None:
    """The folder with a base's configuration, tokenizer and processor, if all are on this machine; weights need not be."""
    folder = local_folder(base)
    needed = (("config.json",), ("tokenizer_config.json",), ("preprocessor_config.json", "processor_config.json"))
    return folder if folder and all(any((folder / name).is_file() for name in names) for names in needed) else None


def write_shrunk_base(name: str, folder: Path, out: Path, seed: int = 0) -> Path:
    """Write a base's files with a tiny random model in place of its weights.

    Args:
        name: the base, for `AutoConfig`.
        folder: where its files are.
        out: the directory to write.
        seed: draws the weights.
    """
    config = shrunk_config(AutoConfig.from_pretrained(name, trust_remote_code=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(out)
    for file in folder.iterdir():  # the base's own generation settings among them
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, out / file.name)
    return out


def shrunk_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same configuration with small widths and few layers; changed in place."""
    layers = config.__dict__.get("vision_feature_layer")
    deepest = max((-layer for layer in (layers if isinstance(layers, list) else [layers]) if layer is not None), default=0)
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, part in (("", config), *parts.items()):
        if isinstance(part, PreTrainedConfig):
            _shrink(part, max(LAYERS, deepest) if name == "vision_config" else LAYERS)
    return config


def _shrink(part: PreTrainedConfig, layers: int) -> None:
    own = vars(part)
    for name, size in SIZES.items():
        if isinstance(own.get(name), type(size)):
            setattr(part, name, size)
    for name in ("num_hidden_layers", "depth"):
        if isinstance(own.get(name), int):
            setattr(part, name, layers)
    if own.get("layer_types"):
        part.layer_types = _kinds(part.layer_types, layers)
    rope = own.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        part.rope_parameters = {**rope, "mrope_section": _divided(HEAD_DIM // 2, len(rope["mrope_section"]))}


def _kinds(layer_types: list[str], layers: int) -> list[str]:
    """As many layers with every kind among them, if there is room."""
    kinds = list(dict.fromkeys(layer_types))
    return [*kinds, *[kinds[-1]] * layers][:layers]


def _divided(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]
