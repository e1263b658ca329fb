"""Key names of saved models: those of hub checkpoints of the class, which inference engines expect."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmtune.builtin import TINY_LLAVA
from mmtune.models.assemble import assemble, load_projector
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint, set_hub_key_mapping
from mmtune.models.checkpoints.unread_tensors import find_unread_tensors
from mmtune.models.load import load_base, resolve_model
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.recipe.recipe import ModelSection

LLAMA = {
    "language_model.model.embed_tokens",
    "language_model.model.layers",
    "language_model.model.norm",
    "language_model.lm_head",
}
PROJECTOR = {"multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}
CLIP = {f"vision_tower.vision_model.{part}" for part in ("embeddings", "encoder.layers", "pre_layrnorm", "post_layernorm")}
SIGLIP = CLIP - {"vision_tower.vision_model.pre_layrnorm"}
DINO = {"vision_tower.embeddings", "vision_tower.encoder.layer", "vision_tower.layernorm"}
TOWERS = {"clip": CLIP, "siglip": SIGLIP, "dinov2": DINO, "vit": DINO | {"vision_tower.pooler.dense"}}
PIXTRAL = {"vision_tower.ln_pre", "vision_tower.patch_conv", "vision_tower.transformer.layers"}
TIED = LLAMA - {"language_model.lm_head"}
GEMMA = TIED | SIGLIP
QWEN = {"model.embed_tokens", "model.layers", "model.norm", "lm_head", "visual.blocks", "visual.merger", "visual.patch_embed"}
IDEFICS = {"model.text_model.embed_tokens", "model.text_model.layers", "model.text_model.norm", "lm_head", "model.connector"}
IDEFICS |= {"model.vision_model.embeddings", "model.vision_model.encoder.layers", "model.vision_model.post_layernorm"}
HUB = {
    "llava": LLAMA | CLIP | PROJECTOR,
    "llava_pixtral": LLAMA | PIXTRAL | PROJECTOR,
    "llava_next": LLAMA | CLIP | PROJECTOR | {"image_newline"},
    "llava_onevision": LLAMA | SIGLIP | PROJECTOR | {"image_newline"},
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": {
        *(f"model.language_model.{part}" for part in ("embed_tokens", "layers", "norm")),
        *(f"model.visual.{part}" for part in ("blocks", "merger", "deepstack_merger_list", "patch_embed", "pos_embed")),
        "lm_head",
    },
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "internvl": LLAMA | PROJECTOR | {"multi_modal_projector.layer_norm"} | (DINO - {"vision_tower.layernorm"}),
    "gemma3": GEMMA | {"multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.mm_soft_emb_norm"},
    "paligemma": GEMMA | {"multi_modal_projector.linear"},
    "mistral3": LLAMA | PIXTRAL | PROJECTOR | {"multi_modal_projector.norm", "multi_modal_projector.patch_merger"},
}
"""The module names in published checkpoints of each class: every key is in one of them, and each of them has a key."""


def modules(keys: Any, known: set[str]) -> set[str]:
    """The modules of `known` that have a key, and the keys that are in none of them."""
    return {next((module for module in known if re.match(re.escape(module) + r"(\.|$)", key)), key) for key in keys}


def reload(path: Path) -> Any:
    model, report = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def keys_of(path: Path) -> set[str]:
    return {key for file in path.glob("*.safetensors") for key in load_file(file)}


@pytest.mark.parametrize(
    ("vision", "language"),
    [*((vision, "llama") for vision in TOWERS), *(("siglip", language) for language in ("qwen2", "qwen3", "gemma", "gemma3"))],
)
def test_an_assembled_model_is_saved_with_hub_key_names(
    tiny_checkpoints: Path, tmp_path: Path, vision: str, language: str
) -> None:
    model, processor = assemble(str(tiny_checkpoints / vision), str(tiny_checkpoints / language))
    save_checkpoint(model, processor, tmp_path / "out")
    head = set() if model.config.text_config.tie_word_embeddings else {"language_model.lm_head"}
    known = TIED | head | PROJECTOR | TOWERS[vision]
    assert modules(keys_of(tmp_path / "out"), known) == known
    batch = processor(images=Image.new("RGB", (60, 40), "teal"), text="<image> A cat", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(reload(tmp_path / "out")(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", BASES)
def test_loaded_and_built_models_are_saved_with_hub_key_names(family: str, tmp_path: Path) -> None:
    release = write_tiny_base(BASES[family], tmp_path / "release")
    assert modules(keys_of(release), HUB[family]) == HUB[family]
    model = reload(release)
    assert not find_unread_tensors(model, str(release))
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert keys_of(tmp_path / "saved") == keys_of(release)
    built = type(model)(model.config)  # without the key mapping that transformers stores while loading
    built.load_state_dict(model.state_dict())
    set_hub_key_mapping(built)
    built.save_pretrained(tmp_path / "built", max_shard_size="200KB")
    assert keys_of(tmp_path / "built") == keys_of(release)
    weights = reload(tmp_path / "built").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_the_built_in_checkpoint_has_hub_key_names_and_the_trained_values() -> None:
    weights = load_file(TINY_LLAVA / "model.safetensors")
    assert modules(weights, TIED | CLIP | PROJECTOR) == TIED | CLIP | PROJECTOR
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].numpy().tobytes())
    assert digest.hexdigest() == "16d0b84ecd84138f67666d1b35626938522f68f94175cb3603de76ae2db4a5ec"
    reload(TINY_LLAVA)
    untrained, _ = load_base(resolve_model(ModelSection.model_validate({"base": "builtin:tiny-llava-untrained"})), seed=0)
    assert untrained._weight_conversions  # full tuning of it saves hub key names, too


def test_checkpoints_with_hub_and_module_key_names_load(tiny_checkpoints: Path, llava: tuple[Any, Any], tmp_path: Path) -> None:
    """Older files have the key names that transformers gives a model that was built in memory."""
    model, processor = llava
    save_checkpoint(model, processor, tmp_path / "hub")
    save_checkpoint(model, processor, tmp_path / "older")
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    older = {key.replace("vision_tower.vision_model.", "vision_tower."): tensor for key, tensor in weights.items()}
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "older" / "model.safetensors", metadata={"format": "pt"})
    for names in ("hub", "older"):
        loaded = reload(tmp_path / names).state_dict()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        other, _ = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), seed=9)
        load_projector(other, tmp_path / names)
        projector = model.model.multi_modal_projector.state_dict()
        assert all(
            torch.equal(tensor, projector[name]) for name, tensor in other.model.multi_modal_projector.state_dict().items()
        )
