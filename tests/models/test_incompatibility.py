"""Incompatible vision encoders and language models are errors that give the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from mmtune.models import compatibility
from mmtune.models.assemble import assemble, save_checkpoint
from mmtune.models.load import load_base, resolve_model
from mmtune.recipe.recipe import ModelSection
from mmtune.utils.errors import UserError


def _config_only(path: Path, config: Any) -> str:
    """A checkpoint without weights, because these errors occur before weights are read."""
    config.save_pretrained(path)
    return str(path)


def test_incompatible_language_models_are_errors(tiny_checkpoints: Path, tmp_path: Path) -> None:
    clip = str(tiny_checkpoints / "clip")
    gemma2 = tf.Gemma2Config(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    for config, message in (
        (tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64), "GPT2Model has no `embed_tokens` module"),
        (tf.BertConfig(), "expected a decoder-only language model, got an encoder"),
        (tf.T5Config(), "got an encoder-decoder model"),
        (gemma2, "final_logit_softcapping 30"),
        (tf.LlavaConfig(), "set model.base"),
        (tf.CLIPVisionConfig(), "not a causal language model"),
    ):
        with pytest.raises(UserError, match=message):
            assemble(clip, _config_only(tmp_path / config.model_type, config))


def test_incompatible_vision_towers_are_errors(tiny_checkpoints: Path, tmp_path: Path) -> None:
    llama = str(tiny_checkpoints / "llama")
    for config, message in (
        (tf.Siglip2Config(), "NaFlex"),
        (tf.Siglip2VisionConfig(), "NaFlex"),
        (tf.ConvNextConfig(), "model_type 'convnext' is not supported as a vision tower; supported: clip_vision_model"),
        (tf.LlamaConfig(), "model_type 'llama' is not supported as a vision tower"),
    ):
        with pytest.raises(UserError, match=message):
            assemble(_config_only(tmp_path / config.model_type, config), llama)


def test_missing_paths_are_errors_with_the_expected_content(tiny_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision: no such directory: /nowhere/clip; the nearest existing folder, /, contains "):
        assemble("/nowhere/clip", str(tiny_checkpoints / "llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"language: .*empty: expected a checkpoint directory with config.json"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path / "empty"))


def test_a_vision_tower_with_a_missing_weight_is_an_error(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for file in (tiny_checkpoints / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights do not match Dinov2Model: missing layernorm.weight"):
        assemble(str(tmp_path), str(tiny_checkpoints / "llama"))


def test_a_base_with_missing_or_mismatched_weights_is_an_error(llava: tuple[Any, Any], tmp_path: Path) -> None:
    save_checkpoint(*llava, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    wide = {**weights, key: torch.cat([weights[key], weights[key]])}
    del weights[key]
    for tensors, problem in (
        (weights, r"missing .*fc1\.weight"),
        (wide, r"fc1\.weight: expected shape \(64, 32\), got \(128, 32\)"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"base: its weights do not match LlavaForConditionalGeneration: .*" + problem):
            load_base(
                resolve_model(ModelSection.model_validate({"base": str(tmp_path / "base"), "chat_template": "vicuna_v1"})), seed=0
            )


def test_tensors_that_the_language_model_does_not_read_are_reported(
    tiny_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tiny_checkpoints / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "mtp.fc.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
    assert f"does not read, dropped from {tmp_path}: 1 (mtp.fc.weight)" in capsys.readouterr().out


def test_invalid_arguments_are_errors(tiny_checkpoints: Path) -> None:
    with pytest.raises(UserError, match="no class token"):
        assemble(str(tiny_checkpoints / "siglip"), str(tiny_checkpoints / "llama"), vision_feature_select_strategy="default")
    with pytest.raises(UserError, match="expected 'default' or 'full', got 'cls'"):
        assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), vision_feature_select_strategy="cls")
    with pytest.raises(UserError, match=r"vision_feature_layer: expected -4 to 3 .*got -5"):
        assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), vision_feature_layer=-5)


def test_a_language_model_without_a_chat_template_is_an_error(tiny_checkpoints: Path, tmp_path: Path) -> None:
    config = tf.OlmoConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    tf.OlmoForCausalLM(config).save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(tiny_checkpoints / "llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no default for model_type 'olmo'.*is missing"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
    model, _ = assemble(str(tiny_checkpoints / "clip"), str(tmp_path), chat_template="vicuna_v1")
    assert type(model.model.language_model).__name__ == "OlmoModel"


def test_a_mismatch_of_image_tokens_and_features_names_the_vision_tower(
    tiny_checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compatibility.PREFIX_TOKENS, "dinov2", 2)
    with pytest.raises(UserError, match=r"vision: .*dinov2.*640 x 480 pixels the processor writes 17 .*gives 16 image features"):
        assemble(str(tiny_checkpoints / "dinov2"), str(tiny_checkpoints / "llama"))


def test_a_slow_tokenizer_is_an_error(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny_checkpoints / "llama" / file).read_bytes())
    with pytest.raises(UserError, match="tokenizer"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
