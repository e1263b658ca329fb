"""Tiny models, and the choice of the tiny model for a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from mmtune.models.tiny.tiny_models import VISION_FAMILIES, tiny_family, write_tiny_language, write_tiny_vision
from mmtune.utils.errors import UserError


def test_tiny_tokenizers_are_trained_on_texts(tmp_path: Path) -> None:
    write_tiny_language("llama", tmp_path, texts=["how many sevens are there"] * 5, vocab_size=290)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("sevens", add_special_tokens=False)["input_ids"]) < 6
    assert tokenizer.decode(tokenizer("naïve 日本", add_special_tokens=False)["input_ids"]) == "naïve 日本"


@pytest.mark.parametrize(
    ("checkpoint", "kind", "family"),
    [
        ("openai/clip-vit-large-patch14-336", "vision", "clip"),
        ("google/siglip-so400m-patch14-384", "vision", "siglip"),
        ("facebook/dinov2-large", "vision", "dinov2"),
        ("google/vit-base-patch16-224-in21k", "vision", "vit"),
        ("lmsys/vicuna-7b-v1.5", "language", "llama"),
        ("meta-llama/Llama-3.1-8B-Instruct", "language", "llama3"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "language", "qwen2"),
        ("Qwen/Qwen3-4B", "language", "qwen3"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "language", "mistral"),
        ("google/gemma-2b-it", "language", "gemma"),
        ("google/gemma-3-1b-it", "language", "gemma3"),
        ("llava-hf/llava-1.5-7b-hf", "base", "llava"),
        ("mistral-community/pixtral-12b", "base", "llava_pixtral"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "base", "llava_next"),
        ("llava-hf/llama3-llava-next-8b-hf", "base", "llava_next"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "base", "llava_onevision"),
        ("Qwen/Qwen2-VL-7B-Instruct", "base", "qwen2_vl"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "base", "qwen2_5_vl"),
        ("Qwen/Qwen3-VL-4B-Instruct", "base", "qwen3_vl"),
        ("HuggingFaceM4/Idefics3-8B-Llama3", "base", "idefics3"),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "base", "smolvlm"),
        ("OpenGVLab/InternVL3-8B-hf", "base", "internvl"),
        ("google/gemma-3-4b-it", "base", "gemma3"),
        ("google/paligemma2-3b-mix-448", "base", "paligemma"),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "base", "mistral3"),
        ("builtin:tiny-llava", "base", "llava"),
    ],
)
def test_families_of_well_known_names(checkpoint: str, kind: Any, family: str) -> None:
    assert tiny_family(checkpoint, kind) == family


def test_families_of_local_checkpoints_and_unknown_names(tiny_checkpoints: Path, tmp_path: Path) -> None:
    for name in VISION_FAMILIES:
        assert tiny_family(str(tiny_checkpoints / name), "vision") == name
    for name in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3"):
        assert tiny_family(str(tiny_checkpoints / name), "language") == name
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128256}))
    assert tiny_family(str(tmp_path), "language") == "llama3"
    with pytest.raises(UserError, match=r"model_type 'clip'.*llama"):
        tiny_family(str(tiny_checkpoints / "clip"), "language")
    for name in (
        "someone/model",
        "google/siglip2-base-patch16-naflex",
        "Qwen/Qwen2-VL-7B-Instruct",
        "google/gemma-2-9b",
    ):
        with pytest.raises(UserError, match=r"download its config.json once|model_type"):
            tiny_family(name, "vision" if "siglip" in name else "language")
    with pytest.raises(UserError, match="did you mean 'clip'"):
        write_tiny_vision("clp", tiny_checkpoints / "x")
    with pytest.raises(UserError, match="unknown tiny language model 'gpt2'"):
        write_tiny_language("gpt2", tiny_checkpoints / "x")
