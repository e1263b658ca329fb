"""Quantization in int8 and nf4: which layers are quantized, and training and reloading of quantized models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from mmtune.models.load import load_base, load_trained, resolve_model
from mmtune.models.quantize import prepare_quantized, quantization_config
from mmtune.recipe.recipe import Recipe
from mmtune.train import train
from mmtune.utils.errors import UserError

LAYER_TYPES = {"nf4": Linear4bit, "int8": Linear8bitLt}


@pytest.mark.parametrize("precision", LAYER_TYPES)
def test_only_linear_layers_of_the_language_model_are_quantized(make_recipe: Callable[..., Recipe], precision: str) -> None:
    model, _ = load_base(resolve_model(make_recipe(f"model.precision={precision}").model), 0)
    quantized = {name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}
    assert len(quantized) == 5 * 7
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    assert {type(model.get_submodule(name)) for name in quantized} == {LAYER_TYPES[precision]}
    other_dtypes = {p.dtype for name, p in model.named_parameters() if name.rpartition(".")[0] not in quantized}
    assert other_dtypes == {torch.bfloat16}
    if precision == "nf4":
        states = [model.get_submodule(name).weight.quant_state for name in quantized]
        assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_a_forward_pass_does_not_change_4bit_weights(make_recipe: Callable[..., Recipe]) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks them in place unless this is disabled."""
    from bitsandbytes.functional import dequantize_4bit

    model, _ = load_base(resolve_model(make_recipe("model.precision=nf4").model), 0)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers]
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(5, 25)[None])
    for layer, expected in zip(layers, before, strict=True):
        assert torch.equal(dequantize_4bit(layer.weight.data, layer.weight.quant_state), expected)


def test_a_projector_inside_the_vision_tower_is_not_quantized() -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model_config = Qwen2_5_VLConfig(vision_config=vision, text_config={**text, "num_key_value_heads": 2, "vocab_size": 64})
    config = quantization_config(model_config, "nf4")
    assert config.llm_int8_skip_modules == ["model.visual", "model.visual.merger", "lm_head"]
    assert config.bnb_4bit_use_double_quant


def test_a_quantized_vision_tower_is_detected(base: Path) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)  # transformers' own default
    model = AutoModelForImageTextToText.from_pretrained(str(base), quantization_config=config, device_map={"": "cpu"})
    with pytest.raises(
        UserError, match=r"expected only the language model quantized, got .* of the (vision|projector) component"
    ):
        prepare_quantized(model)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_8bit_and_paged_optimizers_update_weights(make_recipe: Callable[..., Recipe], optimizer: str) -> None:
    recipe = make_recipe("model.precision=nf4", f"train.optim={optimizer}")
    train(recipe, ["test"])
    model, _ = load_trained(Path(recipe.output_dir))
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert all(p.dtype == torch.float32 and bool((p != 0).any()) for p in trained.values())


@pytest.mark.slow
def test_an_assembled_base_is_saved_unquantized_and_trained_quantized(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision

    write_tiny_vision("siglip", tmp_path / "vision")
    write_tiny_language("qwen2", tmp_path / "language", hidden_size=64, intermediate_size=128)
    section = f"{{vision: {tmp_path / 'vision'}, language: {tmp_path / 'language'}, precision: nf4}}"
    recipe = make_recipe(f"model={section}")
    train(recipe, ["test"])
    run = Path(recipe.output_dir)
    base = AutoModelForImageTextToText.from_pretrained(str(run / "base"))
    assert not getattr(base, "is_quantized", False)
    model, _ = load_trained(run)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
