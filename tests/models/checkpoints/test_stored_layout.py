"""Stacked experts are saved in the layout of the files that they were loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from mmtune.models.load import load_strictly


@pytest.mark.parametrize("transposed", [True, False])
def test_experts_keep_the_layout_of_their_files(transposed: bool, tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**tower, "deepstack_visual_indexes": [0]})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    stored = load_file(file)
    experts = [key for key in stored if ".experts." in key]
    assert {tuple(stored[key].shape) for key in experts} == {(4, 48, 32), (4, 32, 24)}
    if transposed:  # as in the hub's files of Qwen3-VL-30B-A3B
        stored |= {key: stored[key].transpose(1, 2).contiguous() for key in experts}
        save_file(stored, file, metadata={"format": "pt"})
    load_strictly(str(tmp_path / "base"), "base").save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], stored[key]) for key in stored)
