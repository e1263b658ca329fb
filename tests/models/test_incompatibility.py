"""Parts that do not fit are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import mmtune.models.compatibility as parts
from mmtune.models.assemble import assemble, save_checkpoint
from mmtune.models.load import load_base
from mmtune.recipe.recipe import ModelSection
from mmtune.utils.errors import UserError


def _config_only(path: Path, config: Any) -> str:
    """A checkpoint with no weights: what is refused here is refused before any are read."""
    config.save_pretrained(path)
    return str(path)


def test_language_models_that_do_not_fit_are_refused(tiny_checkpoints: Path, tmp_path: Path) -> None:
    clip = str(tiny_checkpoints / "clip")
    gemma2 = tf.Gemma2Config(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    for config, reason in (
        (tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64), "GPT2Model has no embed_tokens"),
        (tf.BertConfig(), "is an encoder;"),
        (tf.T5Config(), "encoder-decoder"),
        (gemma2, "final_logit_softcapping 30"),
        (tf.LlavaConfig(), "model.base"),
        (tf.CLIPVisionConfig(), "not a causal language model"),
    ):
        with pytest.raises(UserError, match=reason):
            assemble(clip, _config_only(tmp_path / config.model_type, config))


def test_towers_that_do_not_fit_are_refused(tiny_checkpoints: Path, tmp_path: Path) -> None:
    llama = str(tiny_checkpoints / "llama")
    for config, reason in (
        (tf.Siglip2Config(), "NaFlex"),
        (tf.Siglip2VisionConfig(), "NaFlex"),
        (tf.ConvNextConfig(), "not known to be a sequence of patches"),
        (tf.LlamaConfig(), "not known to be a sequence of patches"),
    ):
        with pytest.raises(UserError, match=reason):
            assemble(_config_only(tmp_path / config.model_type, config), llama)


def test_missing_paths_say_what_was_looked_for(tiny_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vision: no such directory: /nowhere/clip; the nearest folder, /, holds "):
        assemble("/nowhere/clip", str(tiny_checkpoints / "llama"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"language: .*empty is here but holds no config.json"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path / "empty"))


def test_weights_left_to_chance_are_refused(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for file in (tiny_checkpoints / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for layernorm.weight"):
        assemble(str(tmp_path), str(tiny_checkpoints / "llama"))


def test_a_base_that_leaves_weights_to_chance_is_refused(llava: tuple[Any, Any], tmp_path: Path) -> None:
    save_checkpoint(*llava, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    key = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    wide = {**weights, key: torch.cat([weights[key], weights[key]])}
    del weights[key]
    for tensors, fault in ((weights, r"no weights for .*fc1\.weight"), (wide, r"fc1\.weight is \(128, 32\), not \(64, 32\)")):
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"base: not a whole LlavaForConditionalGeneration: .*" + fault):
            load_base(ModelSection.model_validate({"base": str(tmp_path / "base"), "chat_template": "vicuna_v1"}), seed=0)


def test_what_the_language_model_does_not_read_is_named(
    tiny_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tiny_checkpoints / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "mtp.fc.weight": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
    assert f"does not read, left out of {tmp_path}: 1 (mtp.fc.weight)" in capsys.readouterr().out


def test_arguments_are_checked(tiny_checkpoints: Path) -> None:
    with pytest.raises(UserError, match="no class token"):
        assemble(str(tiny_checkpoints / "siglip"), str(tiny_checkpoints / "llama"), vision_feature_select_strategy="default")
    with pytest.raises(UserError, match="neither"):
        assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), vision_feature_select_strategy="cls")
    with pytest.raises(UserError, match=r"-5 is out of range.*3 layers"):
        assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), vision_feature_layer=-5)


def test_a_text_model_with_no_template_to_take_is_refused(tiny_checkpoints: Path, tmp_path: Path) -> None:
    config = tf.OlmoConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    tf.OlmoForCausalLM(config).save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(tiny_checkpoints / "llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no default for model_type 'olmo'.*is missing"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
    model, _ = assemble(str(tiny_checkpoints / "clip"), str(tmp_path), chat_template="vicuna_v1")
    assert type(model.model.language_model).__name__ == "OlmoModel"


def test_a_count_that_is_wrong_names_the_tower(tiny_checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parts.PREFIX_TOKENS, "dinov2", 2)
    with pytest.raises(UserError, match=r"vision: .*dinov2.*640 x 480 pixels the processor writes 17 tokens.*makes 16 features"):
        assemble(str(tiny_checkpoints / "dinov2"), str(tiny_checkpoints / "llama"))


def test_a_slow_tokenizer_is_refused(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((tiny_checkpoints / "llama" / file).read_bytes())
    with pytest.raises(UserError, match="tokenizer"):
        assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
