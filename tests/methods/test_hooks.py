"""The hooks of every method: their defaults, and which methods override which hooks."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmtune.methods.method import COMPONENTS, Method
from mmtune.methods.method_table import METHODS, full_modules_config, method_of, method_of_config, method_of_peft_type
from mmtune.utils.errors import UserError


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2, vocab_size=32, tie_word_embeddings=True))


def public(method: type[Method]) -> dict[str, Any]:
    return {hook: each for hook, each in inspect.getmembers(method, inspect.isfunction) if not hook.startswith("_")}


@pytest.mark.parametrize("name", METHODS)
def test_every_overridden_hook_exists_with_its_parameters(name: str) -> None:
    """A function that no caller knows would never run, and one with other parameters would fail when it does."""
    method = METHODS[name]
    hooks = public(Method)
    for hook, each in public(type(method)).items():
        assert hook in hooks, f"{hook} is no hook; the name of a helper begins with _"
        assert list(inspect.signature(each).parameters) == list(inspect.signature(hooks[hook]).parameters), hook
    with pytest.raises(FrozenInstanceError):
        method.learning_rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_agrees_with_its_configuration(name: str) -> None:
    method = METHODS[name]
    fields = set(inspect.signature(method.config_class()).parameters)
    stated = {
        *method.default_settings(),
        *method.selectors,
        *method.setting_types,
        *(key for key, _ in method.unsupported_values),
    }
    assert stated <= fields
    assert set(method.by_component) <= fields | set(method.extra_settings)
    assert not set(method.managed) & stated
    assert not set(method.extra_settings) & fields
    assert set(method.components) <= set(COMPONENTS)
    assert set(method.alternatives) <= set(METHODS)
    assert all(method.check_component(component, {}) is None for component in method.components)
    for component in set(COMPONENTS) - set(method.components):
        reason = str(method.check_component(component, {}))
        assert name in reason and "tune.language" in reason


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_found_by_its_configuration_and_its_type(name: str) -> None:
    config_class = METHODS[name].config_class()
    [peft_type] = [kind for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if known is config_class]
    assert method_of_peft_type(peft_type.value) is METHODS[name]
    assert method_of_config(object.__new__(config_class)) is METHODS[name]


def test_a_plain_model_and_an_unknown_type_have_no_method() -> None:
    assert method_of(nn.Linear(2, 2)) is None
    assert method_of_peft_type("XLORA") is method_of_peft_type(None) is None
    assert method_of_config(object()) is None


def test_virtual_tokens_are_positions_of_the_logits(model: LlamaForCausalLM) -> None:
    ids = torch.arange(5)[None]
    for config in (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        tuned = get_peft_model(model, config)
        method = method_of(tuned)
        assert method is not None
        assert tuned(input_ids=ids).logits.shape[1] == 5 + method.virtual_tokens(config)


def test_modules_trained_in_full_need_no_adapted_layer(model: LlamaForCausalLM) -> None:
    tuned = get_peft_model(model, full_modules_config(["model.layers.1.mlp"]))
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained and all("modules_to_save" in name for name in trained)


@pytest.mark.parametrize(
    ("name", "settings", "module", "message"),
    [
        ("vera", {}, "model.embed_tokens", "vera works on linear layers, and model.embed_tokens is a Embedding"),
        ("lora", {}, "model.embed_tokens", "is tied to the head"),
        ("lora", {"trainable_token_indices": [3, 32]}, "lm_missing", "expected token ids from 0 to 31, got 32"),
        ("lora", {"init_lora_weights": "pissa", "r": 17}, "model.layers.0.self_attn.q_proj", "expected at most 16"),
        ("adalora", {"init_r": 2, "target_r": 3}, "lm_missing", "target_r: expected less than init_r: 2, got 3"),
        ("shira", {"r": 9}, "model.layers.0.self_attn.q_proj", "r: 9 trains 288 weights of .*, which has 256; use at most 8"),
        ("oft", {"oft_block_size": 5}, "model.layers.0.mlp.up_proj", "oft_block_size: 5 does not divide the 16 inputs"),
    ],
)
def test_settings_are_checked_against_the_model(
    model: LlamaForCausalLM, name: str, settings: dict[str, Any], module: str, message: str
) -> None:
    targets = {path: each for path, each in model.named_modules() if path == module}
    with pytest.raises(UserError, match=message):
        METHODS[name].check_model(model, targets, settings)


def test_an_estimate_needs_neither_weights_nor_data() -> None:
    settings = {"init_lora_weights": "eva", "r": 4}
    assert METHODS["lora"].plain_initialization(settings) == {"init_lora_weights": True}
    assert METHODS["lora"].plain_initialization({"r": 4}) == {}


@pytest.mark.parametrize(
    ("init", "expected"),
    [("gaussian", False), ("pissa", False), ("eva", False), ("olora", True), ("lora_ga", True), (True, False)],
)
def test_which_initializations_need_full_weights(init: object, expected: bool) -> None:
    assert METHODS["lora"].needs_full_weights({"init_lora_weights": init}) is expected


def test_a_share_of_adaloras_term_is_put_back(model: LlamaForCausalLM) -> None:
    config = METHODS["adalora"].build_config({"init_r": 3, "target_r": 2, "target_modules": ["q_proj"]}, None, 500)
    assert config.total_step == 500
    tuned = get_peft_model(model, config)
    whole = config.orth_reg_weight
    with METHODS["adalora"].shared_loss(tuned, 4):
        assert config.orth_reg_weight == whole / 4
    assert config.orth_reg_weight == whole


def test_loraplus_multiplies_the_rate_of_b_alone() -> None:
    factor = METHODS["lora"].rate_factor
    assert factor("x.lora_B.default.weight", {"loraplus_lr_ratio": 8.0}) == 8.0
    assert factor("x.lora_A.default.weight", {"loraplus_lr_ratio": 8.0}) == 1.0
    assert factor("x.lora_B.default.weight", {}) == 1.0
