"""Shrunk bases for `mmtune train --rehearse`: the processor and config of a base with a tiny random model.

Everything that determines tokens, masks and positions is unchanged: tokenizer, chat template, image sizes, patches, grids. Only
widths and numbers of layers shrink.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from mmtune.models.checkpoints.locate_base import local_folder
from mmtune.models.checkpoints.remote_code import auto_class

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
"""New values of the config fields that set a size; other fields are unchanged."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors.index.json", ".bin.index.json")


def local_files(base: str) -> Path | None:
    """The local folder with a base's config, tokenizer and processor, or None if one of them is missing."""
    folder = local_folder(base)
    required = (("config.json",), ("tokenizer_config.json",), ("preprocessor_config.json", "processor_config.json"))
    return folder if folder and all(any((folder / name).is_file() for name in names) for names in required) else None


def write_shrunk_base(name: str, folder: Path, out: Path, seed: int = 0, trust_remote_code: bool = False) -> Path:
    """Write a checkpoint with the files of a base and the weights of a tiny random model.

    Args:
        name: the directory or hub id of the base.
        folder: the local folder with its files.
        out: the directory to write.
        seed: the seed of the weights.
        trust_remote_code: whether code in the checkpoint may be executed.
    """
    config = shrunk_config(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.save_pretrained(out)
    for file in folder.iterdir():  # also copies the generation config
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, out / file.name)
    return out


def shrunk_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with small widths and few layers; changed in place."""
    layers = config.__dict__.get("vision_feature_layer")
    selected = [layer for layer in (layers if isinstance(layers, list) else [layers]) if layer is not None]
    vision_layers = max([LAYERS, *(-layer for layer in selected)])
    sub_configs = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, sub_config in (("", config), *sub_configs.items()):
        if isinstance(sub_config, PreTrainedConfig):
            _shrink(sub_config, vision_layers if name == "vision_config" else LAYERS)
    return config


def _shrink(config: PreTrainedConfig, layers: int) -> None:
    values = vars(config)
    for name, size in SIZES.items():
        if isinstance(values.get(name), type(size)):
            setattr(config, name, size)
    for name in ("num_hidden_layers", "depth"):
        if isinstance(values.get(name), int):
            setattr(config, name, layers)
    if values.get("layer_types"):
        config.layer_types = _select_layer_types(config.layer_types, layers)
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        config.rope_parameters = {**rope, "mrope_section": _split_evenly(HEAD_DIM // 2, len(rope["mrope_section"]))}


def _select_layer_types(layer_types: list[str], layers: int) -> list[str]:
    """`layers` layer types, with every type of `layer_types` if there are enough layers."""
    types = list(dict.fromkeys(layer_types))
    return [*types, *[types[-1]] * layers][:layers]


def _split_evenly(total: int, count: int) -> list[int]:
    return [total // count + (index < total % count) for index in range(count)]
