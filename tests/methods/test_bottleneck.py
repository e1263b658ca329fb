"""Bottleneck adapters compared with the published equations, and as a tuner of PEFT."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from programs import run_program
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmtune.methods.tuners.bottleneck_tuner import BottleneckConfig, BottleneckLayer, bottleneck_targets
from mmtune.utils.errors import UserError

LANGUAGE, VISION, PROJECTOR = "model.language_model", "model.vision_tower", "model.multi_modal_projector"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
LAYERS, HIDDEN, SIZE = 5, 128, 4
ERF_GELU = {"relu": lambda x: x.clamp(min=0), "silu": lambda x: x * torch.sigmoid(x)}
ERF_GELU["gelu"] = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On models this small a second thread only waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(untrained: tuple[Any, Any]) -> Any:
    """The built-in architecture, a fresh copy in eval mode."""
    return copy.deepcopy(untrained[0])


@pytest.fixture
def inputs(untrained: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    """Two sequences of 16 image tokens and 6 of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(20, 300, (2, 6), generator=generator)
    ids = torch.cat([torch.full((2, 16), untrained[1].image_token_id), text], dim=1)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def tuned(model: Any, root: str = LANGUAGE, **settings: Any) -> PeftModel:
    settings = {"bottleneck_size": SIZE, "task_type": "CAUSAL_LM"} | settings
    targets = bottleneck_targets(model, root, settings.get("placement", "houlsby"))
    return get_peft_model(model, BottleneckConfig(**({"target_modules": targets} | settings)))


def randomize(model: nn.Module, seed: int = 1, spread: float = 0.3) -> None:
    """Give every adapter, biases too, weights that show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.data = spread * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "bottleneck_" in name}


def equation(layer: Any, x: torch.Tensor, non_linearity: str, scaling: float, name: str = "default") -> torch.Tensor:
    """`s * (W_up f(W_down x + b_down) + b_up)`, from the bare matrices."""
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    return scaling * (ERF_GELU[non_linearity](x @ down.weight.T + down.bias) @ up.weight.T + up.bias)


# ---- the method


@pytest.mark.parametrize(
    ("placement", "non_linearity", "scaling"),
    [("houlsby", "relu", 1.0), ("houlsby", "gelu", 0.5), ("pfeiffer", "silu", 2.0), ("parallel", "relu", 4.0)],
)
def test_a_decoder_computes_the_published_equations(
    model: Any, inputs: dict[str, torch.Tensor], placement: str, non_linearity: str, scaling: float
) -> None:
    plain = copy.deepcopy(model)
    peft = tuned(model, placement=placement, non_linearity=non_linearity, scaling=scaling).eval()
    randomize(peft)

    # A Llama block written out, over the untouched weights.
    def block(layer: Any, own: Any, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        a, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
        if placement == "houlsby":
            a = a + equation(own.self_attn, a, non_linearity, scaling)
        hidden = hidden_states + a
        x = layer.post_attention_layernorm(hidden)
        h = layer.mlp.down_proj(nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
        return hidden + h + equation(own.mlp, x if placement == "parallel" else h, non_linearity, scaling)

    with torch.no_grad():
        before = plain(**inputs).logits
    for layer, own in zip(plain.model.language_model.layers, peft.base_model.model.model.language_model.layers, strict=True):
        layer.forward = MethodType(lambda self, hidden_states, own=own, **extra: block(self, own, hidden_states, **extra), layer)
    with torch.no_grad():
        expected, got = plain(**inputs).logits, peft(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing(model: Any, inputs: dict[str, torch.Tensor], placement: str, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        before = model(**inputs).logits
        peft = tuned(model, placement=placement).eval()
        assert torch.equal(peft(**inputs).logits, before)
        randomize(peft)
        assert not torch.equal(peft(**inputs).logits, before)
        with peft.disable_adapter():
            assert torch.equal(peft(**inputs).logits, before)


@pytest.mark.parametrize(("placement", "sublayers"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
def test_trainable_parameters_are_the_closed_form(model: Any, placement: str, sublayers: int) -> None:
    peft = tuned(model, placement=placement)
    assert peft.get_nb_trainable_parameters()[0] == LAYERS * sublayers * (2 * HIDDEN * SIZE + SIZE + HIDDEN)


def test_down_starts_as_a_linear_layer_and_the_rest_at_zero(model: Any) -> None:
    layer = tuned(model).get_submodule("base_model.model.model.language_model.layers.0.mlp")
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    assert 0.9 / HIDDEN**0.5 < down.weight.abs().max() <= 1 / HIDDEN**0.5
    assert not any(parameter.any() for parameter in (down.bias, up.weight, up.bias))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_adapters_get_gradients_and_all_of_them_do(model: Any, inputs: dict[str, torch.Tensor], placement: str) -> None:
    peft = tuned(model, placement=placement, non_linearity="silu").train()  # a unit of relu can be dead
    randomize(peft)
    peft(**inputs, labels=inputs["input_ids"]).loss.backward()
    moved = {name for name, parameter in peft.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved == set(adapters(peft))


def test_dropout_follows_the_non_linearity_and_only_while_training(model: Any) -> None:
    layer = tuned(model, bottleneck_size=64, bottleneck_dropout=0.5).get_submodule(
        "base_model.model.model.language_model.layers.0.mlp"
    )
    randomize(layer)
    x = torch.randn(1, 1, HIDDEN)
    seen: list[torch.Tensor] = []
    layer.bottleneck_up["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.eval()(x)
    layer.train()(x)
    is_kept = seen[1] != 0
    assert 0 < is_kept.sum() < (seen[0] != 0).sum()
    assert torch.allclose(seen[1][is_kept], 2 * seen[0][is_kept])


def test_adapters_on_a_model_in_eval_mode_are_in_eval_mode(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    peft = tuned(model, bottleneck_dropout=0.5)
    randomize(peft)
    with torch.no_grad():
        assert torch.equal(peft(**inputs).logits, peft(**inputs).logits)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_linear_layer_can_be_wrapped(model: Any, placement: str) -> None:
    path = f"{LANGUAGE}.layers.1.mlp.down_proj"
    plain = copy.deepcopy(model.get_submodule(path))
    peft = tuned(model, placement=placement, target_modules=[path])
    randomize(peft)
    layer = peft.get_submodule("base_model.model." + path)
    width = 352 if placement == "parallel" else HIDDEN
    assert layer.bottleneck_down["default"].weight.shape == (SIZE, width)
    x = torch.randn(3, 352)
    h = plain(x)
    torch.testing.assert_close(layer(x), h + equation(layer, x if placement == "parallel" else h, "relu", 1.0))
    assert layer.weight is layer.base_layer.weight


class FlatExperts(nn.Module):
    """Returns as Llama 4's experts do: all tokens in one row, and what the router said."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, str]:
        return self.expert(hidden_states).flatten(0, 1), "router"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_flat_outputs_and_further_outputs_keep_their_shape(placement: str) -> None:
    peft = get_peft_model(
        nn.ModuleDict({"mlp": FlatExperts()}),
        BottleneckConfig(placement=placement, target_modules=["mlp"]),  # type: ignore[arg-type]
    )
    randomize(peft)
    layer: Any = peft.get_submodule("base_model.model.mlp")
    x = torch.randn(1, 3, 8)
    h = layer.expert(x[0])
    hidden, router = layer(hidden_states=x)
    assert router == "router"
    torch.testing.assert_close(hidden, h + equation(layer, x[0] if placement == "parallel" else h, "relu", 1.0))
    assert hidden.shape == (3, 8)


# ---- precision


@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_a_half_precision_base_compute_in_fp32(model: Any, autocast: bool) -> None:
    peft = get_peft_model(
        model.to(torch.bfloat16),
        BottleneckConfig(
            bottleneck_size=SIZE, target_modules=bottleneck_targets(model, LANGUAGE, "pfeiffer"), placement="pfeiffer"
        ),
        autocast_adapter_dtype=autocast,
    )
    randomize(peft)
    assert {parameter.dtype for parameter in adapters(peft).values()} == {torch.float32 if autocast else torch.bfloat16}
    layer = peft.get_submodule("base_model.model.model.language_model.layers.0.mlp")
    x = torch.randn(2, 3, HIDDEN).to(torch.bfloat16)
    got, h = layer(x), layer.base_layer(x)
    assert got.dtype == torch.bfloat16
    if autocast:
        assert torch.equal(got, (h.float() + equation(layer, h.float(), "relu", 1.0)).to(torch.bfloat16))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_trains_under_autocast(model: Any, inputs: dict[str, torch.Tensor], placement: str) -> None:
    peft = tuned(model, placement=placement).train()
    randomize(peft, spread=0.1)
    exact = peft(**inputs, labels=inputs["input_ids"]).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = peft(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    assert {parameter.grad.dtype for parameter in adapters(peft).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel", "linear"])
def test_trains_on_a_quantized_base(base: Path, inputs: dict[str, torch.Tensor], precision: str, placement: str) -> None:
    skip = [VISION, PROJECTOR, "lm_head"]
    settings = {"load_in_8bit": True} if precision == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = tf.AutoModelForImageTextToText.from_pretrained(
        base, quantization_config=tf.BitsAndBytesConfig(**settings, llm_int8_skip_modules=skip), dtype=torch.bfloat16
    )
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    model.train()  # in eval mode without gradients bitsandbytes repacks 4-bit weights for the CPU
    before = model(**inputs).logits.detach()
    linear = {"target_modules": [f"{LANGUAGE}.layers.{i}.mlp.down_proj" for i in range(LAYERS)]} if placement == "linear" else {}
    peft = tuned(model, placement="houlsby" if linear else placement, **linear)
    kind = bitsandbytes.nn.Linear8bitLt if precision == "int8" else bitsandbytes.nn.Linear4bit
    assert sum(isinstance(module, kind) for module in peft.modules()) == 7 * LAYERS
    assert torch.equal(peft(**inputs).logits, before)
    assert {parameter.dtype for parameter in adapters(peft).values()} == {torch.float32}
    optimizer = torch.optim.SGD(adapters(peft).values(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = peft(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


# ---- checkpointing and generation


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_gives_the_same_gradients(model: Any, inputs: dict[str, torch.Tensor], placement: str) -> None:
    peft = tuned(model, placement=placement).train()
    randomize(peft)
    calls = []
    peft.get_submodule("base_model.model.model.language_model.layers.0.mlp").register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor]:
        calls.clear()
        peft.zero_grad()
        peft(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in adapters(peft).items()}

    plain = gradients()
    assert len(calls) == 1
    peft.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(calls) == 2
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generation_is_the_same_with_and_without_cache(
    answering_llava: tuple[Any, Any], inputs: dict[str, torch.Tensor], placement: str
) -> None:
    peft = tuned(copy.deepcopy(answering_llava[0]), placement=placement).eval()
    randomize(peft)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    answers = [
        peft.generate(**inputs, **settings, use_cache=use_cache, return_dict_in_generate=True) for use_cache in (True, False)
    ]
    assert answers[0].sequences.tolist() == answers[1].sequences.tolist()
    for cached, uncached in zip(answers[0].logits, answers[1].logits, strict=True):
        torch.testing.assert_close(cached, uncached, rtol=1e-5, atol=1e-5 * uncached.abs().max().item())
    assert len(set(answers[0].sequences[0, -8:].tolist())) > 1


def test_attentions_are_still_recorded(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True).attentions
    got = tuned(model).eval()(**inputs, output_attentions=True).attentions
    assert len(got) == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


# ---- PEFT


@pytest.mark.slow
def test_saves_and_loads_in_a_new_process(base: Path, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    peft = tuned(model, non_linearity="gelu", scaling=0.5, modules_to_save=[PROJECTOR])
    randomize(peft)
    projector = peft.get_submodule("base_model.model." + PROJECTOR + ".modules_to_save.default")
    with torch.no_grad():
        projector.linear_1.weight.add_(0.1)
    peft.eval()
    peft.save_pretrained(tmp_path / "adapter")
    torch.save(inputs, tmp_path / "inputs.pt")
    program = f"""
import sys, torch, transformers
from peft import PeftModel
import mmtune.methods.tuners.bottleneck_tuner
inputs = torch.load("inputs.pt", weights_only=True)
auto = transformers.AutoModelForImageTextToText
models = [PeftModel.from_pretrained(auto.from_pretrained({str(base)!r}), "adapter"), auto.from_pretrained("adapter")]
with torch.no_grad():
    torch.save([model.eval()(**inputs).logits for model in models], "logits.pt")
"""
    run_program(program, cwd=tmp_path)
    with torch.no_grad():
        expected = peft(**inputs).logits
    for got in torch.load(tmp_path / "logits.pt", weights_only=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_unload_gives_the_base_back(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    keys, before = list(model.state_dict()), model(**inputs).logits
    peft = tuned(model, modules_to_save=[PROJECTOR])
    randomize(peft)
    back = peft.unload()
    assert list(back.state_dict()) == keys
    assert torch.equal(back(**inputs).logits, before)


@pytest.mark.parametrize(
    "merge",
    [
        lambda peft: peft.merge_and_unload(),
        lambda peft: peft.merge_adapter(),
        lambda peft: peft.unmerge_adapter(),
        lambda peft: peft.get_submodule("base_model.model.model.language_model.layers.0.mlp").merge(),
    ],
    ids=["merge_and_unload", "merge_adapter", "unmerge_adapter", "layer"],
)
def test_merging_is_rejected_and_does_not_change_the_model(
    model: Any, inputs: dict[str, torch.Tensor], merge: Callable[[Any], Any]
) -> None:
    peft = tuned(model, modules_to_save=[PROJECTOR]).eval()
    randomize(peft)
    with torch.no_grad():
        peft.get_submodule(f"base_model.model.{PROJECTOR}.modules_to_save.default").linear_1.weight.add_(0.1)
    before, keys = peft(**inputs).logits, list(peft.state_dict())
    with pytest.raises(NotImplementedError, match=r"cannot be merged .*beside the base"):
        merge(peft)
    assert torch.equal(peft(**inputs).logits, before)
    assert list(peft.state_dict()) == keys


@pytest.mark.parametrize("second", ["houlsby", "parallel"])
def test_two_adapters_stack_in_the_order_of_activation(model: Any, inputs: dict[str, torch.Tensor], second: str) -> None:
    peft = tuned(model, placement="pfeiffer").eval()
    settings: dict[str, Any] = {"bottleneck_size": 6, "non_linearity": "silu", "placement": second}
    peft.add_adapter("second", BottleneckConfig(target_modules=bottleneck_targets(model, LANGUAGE, second), **settings))
    randomize(peft)
    layers = [module for module in peft.modules() if isinstance(module, BottleneckLayer)]
    assert len(layers) == (10 if second == "houlsby" else 5)
    layer = peft.get_submodule("base_model.model.model.language_model.layers.0.mlp")
    x = torch.randn(1, 4, HIDDEN)
    h = layer.base_layer(x)

    def first_then_second(h: torch.Tensor) -> torch.Tensor:
        h = h + equation(layer, h, "relu", 1.0)
        return h + equation(layer, x if second == "parallel" else h, "silu", 1.0, "second")

    def second_then_first(h: torch.Tensor) -> torch.Tensor:
        h = h + equation(layer, x if second == "parallel" else h, "silu", 1.0, "second")
        return h + equation(layer, h, "relu", 1.0)

    assert layer.active_adapters == ["default"]
    assert not any(parameter.requires_grad for name, parameter in adapters(peft).items() if ".second." in name)
    torch.testing.assert_close(layer(x), h + equation(layer, h, "relu", 1.0))
    peft.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), first_then_second(h))
    peft.base_model.set_adapter(["second", "default"])
    torch.testing.assert_close(layer(x), second_then_first(h))
    assert (first_then_second(h) - second_then_first(h)).abs().max() > 1e-4
    peft.set_adapter("second")
    trainable = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in adapters(peft) if ".second." in name}
    alone = peft(**inputs).logits
    peft.delete_adapter("default")
    assert torch.equal(peft(**inputs).logits, alone)
    assert all(".second." in name for name in adapters(peft))
    assert list(layer.bottleneck_config) == list(layer.bottleneck_dropout) == ["second"]


def test_each_adapter_is_saved_alone(model: Any, tmp_path: Path) -> None:
    peft = tuned(model, placement="pfeiffer")
    peft.add_adapter("second", BottleneckConfig(bottleneck_size=6, target_modules=bottleneck_targets(model, LANGUAGE, "houlsby")))
    peft.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "second"))
    assert len(one) == 4 * LAYERS
    assert len(other) == 8 * LAYERS
    assert {tensor.shape[0] for name, tensor in one.items() if "down" in name} == {SIZE}
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in one | other)


def test_a_wrapped_modules_public_attributes_are_available_and_private_ones_are_separate(model: Any) -> None:
    plain = copy.deepcopy(model.model.language_model.layers[1].self_attn)
    layer = copy.deepcopy(tuned(model)).get_submodule("base_model.model.model.language_model.layers.1.self_attn")
    assert isinstance(layer, BottleneckLayer)
    for name in ("layer_idx", "is_causal", "scaling", "head_dim"):
        assert getattr(layer, name) == getattr(plain, name)
    assert layer.config is layer.base_layer.config
    assert layer.q_proj is layer.base_layer.q_proj
    assert not hasattr(layer, "weight")
    layer.base_layer._hf_hook = object()
    assert not hasattr(layer, "_hf_hook")
    with pytest.raises(AttributeError, match=r"LlamaAttention.*nonsense"):
        _ = layer.nonsense


def test_one_target_inside_another_is_rejected(model: Any) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj lies inside another target"):
        tuned(model, target_modules=[f"{LANGUAGE}.layers.0.mlp", f"{LANGUAGE}.layers.0.mlp.down_proj"])


def test_a_module_without_a_width_is_rejected(model: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot tell the width of gate"):
        get_peft_model(nn.ModuleDict({"gate": nn.Sequential(nn.ReLU())}), BottleneckConfig(target_modules=["gate"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bottleneck_size": 0},
        {"placement": "sideways"},
        {"non_linearity": "tanh"},
        {"bottleneck_dropout": 1.0},
        {"scaling": float("nan")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BottleneckConfig(**wrong)


def test_every_setting_has_a_help_text_and_sets_are_written_in_order() -> None:
    own = set(BottleneckConfig.__dataclass_fields__)
    assert all(BottleneckConfig.__dataclass_fields__[name].metadata.get("help") for name in own - {"auto_mapping"})
    config = BottleneckConfig(target_modules=set("hgfedcba"))  # type: ignore[arg-type]
    assert config.to_dict()["target_modules"] == list("abcdefgh")


# ---- families

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXTS: dict[str, dict[str, Any]] = {name: {} for name in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")}
TEXTS |= {"mixtral": {"num_local_experts": 4}, "qwen3_moe": EXPERTS}
TEXTS |= {"qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24}}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
EYE |= {"image_size": 28, "patch_size": 14}
EYES = {
    "clip_vision_model": "encoder.layers.{}.self_attn",
    "siglip_vision_model": "encoder.layers.{}.self_attn",
    "dinov2": "encoder.layer.{}.attention",
    "vit": "layers.{}.attention",
}


def build_text(family: str) -> Any:
    config = tf.AutoConfig.for_model(family, **TEXT, **TEXTS[family])
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def build_eye(family: str) -> Any:
    torch.manual_seed(0)
    return tf.AutoModel.from_config(tf.AutoConfig.for_model(family, **EYE)).eval()


def reference(model: Any, peft: Any, names: list[str], placement: str) -> None:
    """Adapters as forward hooks, with the matrices of `peft`, on the plain sublayers of `model`."""
    for name in names:
        own = peft.get_submodule("base_model.model." + name)

        def hook(_: Any, args: Any, kwargs: Any, output: Any, own: Any = own) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = h + equation(own, args[0] if placement == "parallel" else h, "relu", 1.0)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", [*TEXTS, *EYES])
def test_every_family_is_adapted_where_the_papers_say(family: str, placement: str) -> None:
    text = family in TEXTS
    model = build_text(family) if text else build_eye(family)
    plain = copy.deepcopy(model)
    attention = "model.layers.{}.self_attn" if text else EYES[family]
    feed_forward = attention.rpartition(".")[0] + ".mlp"
    kinds = [attention, feed_forward] if placement == "houlsby" else [feed_forward]
    expected = [kind.format(i) for i, kind in itertools.product(range(2), kinds)]
    root = "model" if text else ""
    assert bottleneck_targets(model, root, placement) == expected  # type: ignore[arg-type]

    peft = get_peft_model(model, BottleneckConfig(bottleneck_size=SIZE, placement=placement, target_modules=expected)).eval()  # type: ignore[arg-type]
    assert {parameter.numel() for name, parameter in adapters(peft).items() if name.endswith("up.default.bias")} == {32}
    inputs = {"input_ids": torch.arange(2, 9)[None]} if text else {"pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        assert torch.equal(peft(**inputs)[0], plain(**inputs)[0])
        randomize(peft)
        reference(plain, peft, expected, placement)
        got, wanted = peft(**inputs)[0], plain(**inputs)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    assert bottleneck_targets(model, root, placement) == expected  # type: ignore[arg-type]


def test_the_tower_of_qwen2_vl_has_its_own_width() -> None:
    eye = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    visual = Qwen2VisionTransformerPretrainedModel(tf.Qwen2VLConfig(vision_config=eye).vision_config)
    targets = bottleneck_targets(visual, "", "houlsby")
    assert targets == ["blocks.0.attn", "blocks.0.mlp"]
    peft = get_peft_model(visual, BottleneckConfig(bottleneck_size=SIZE, target_modules=targets))
    assert {parameter.shape[1] for name, parameter in adapters(peft).items() if "down.default.weight" in name} == {16}


def test_the_vision_tower_trains_inside_a_vision_language_model(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    before = model(**inputs).logits
    peft = tuned(model, root=VISION)
    assert torch.equal(peft(**inputs).logits, before)
    randomize(peft)
    peft(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(adapters(peft)) == 4 * 2 * 4
    assert all(parameter.grad.any() for parameter in adapters(peft).values())


# ---- refusals


class Block(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class WithResidual(nn.Module):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x + residual


WHOLE = Block(self_attn=nn.Linear(4, 4), mlp=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (nn.ModuleList([Block(fc1=nn.Linear(4, 4))]), r"found no transformer blocks in tower .*its lists hold: Block"),
        (nn.Linear(4, 4), r"found no transformer blocks in tower \(Linear\).*its lists hold: nothing"),
        (nn.ModuleList([WHOLE, Block(mamba=nn.Linear(4, 4))]), r"tower: tower\.1 \(Block\) is not .*it holds mamba"),
        (nn.ModuleList([WHOLE, Block()]), r"tower\.1 \(Block\) .*it holds nothing"),
        (
            nn.ModuleList([Block(self_attn=nn.Linear(4, 4), mlp=WithResidual())]),
            r"tower\.0\.mlp \(WithResidual\) adds the residual",
        ),
    ],
    ids=["no_sublayers", "no_list", "mixed", "empty_block", "residual_inside"],
)
def test_an_unknown_structure_is_rejected(component: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bottleneck_targets(nn.ModuleDict({"tower": component}), "tower", "houlsby")


def test_a_missing_component_is_rejected(model: Any) -> None:
    with pytest.raises(UserError, match=r"LlavaForConditionalGeneration has no module 'model\.tower'"):
        bottleneck_targets(model, "model.tower", "pfeiffer")


def test_bloom_whose_sublayers_add_the_residual_is_rejected() -> None:
    bloom = tf.AutoModel.from_config(tf.BloomConfig(hidden_size=16, n_head=2, n_layer=1, vocab_size=16))
    with pytest.raises(UserError, match="BloomBlock"):
        bottleneck_targets(bloom, "", "houlsby")
