"""Zero-gated prefixes compared with attention written by hand, and with the features that recipes use."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from programs import run_program
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from mmtune.families.structure import find_components
from mmtune.methods.tuners.gated_prefix_tuner import GatedPrefixConfig, GatedPrefixLayer, gated_prefix_targets
from mmtune.utils.errors import UserError

HEADS, GROUPS, HEAD_DIM, WIDTH, LAYERS = 4, 2, 8, 24, 3
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // GROUPS,
    "head_dim": HEAD_DIM,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
# Qwen2-VL has no `head_dim` of its own: its width is divided by its heads.
MROPE = {
    **{key: value for key, value in TEXT.items() if key != "head_dim"},
    "hidden_size": HEADS * HEAD_DIM,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
}


def llava(model_type: str, **overrides: Any) -> Any:
    text = AutoConfig.for_model(model_type, **{**TEXT, **overrides})
    tower = {**TOWER, "patch_size": 4, "model_type": "clip_vision_model"}
    return AutoConfig.for_model("llava", text_config=text, vision_config=tower, image_token_index=60, vision_feature_layer=-1)


def qwen2_vl(model_type: str) -> Any:
    width = {"embed_dim": 16, "hidden_size": 32} if model_type == "qwen2_vl" else {"hidden_size": 16, "out_hidden_size": 32}
    tower = {**QWEN_TOWER, **width, "intermediate_size": 16, "fullatt_block_indexes": [0], "window_size": 16}
    return AutoConfig.for_model(model_type, text_config=dict(MROPE), vision_config=tower, **TOKENS)


def qwen3_vl() -> Any:
    tower = {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return AutoConfig.for_model("qwen3_vl", text_config={**TEXT, "rope_parameters": rope}, vision_config=tower, **TOKENS)


def gemma3() -> Any:
    text = {**TEXT, "sliding_window": 3, "query_pre_attn_scalar": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}
    text["layer_types"] = text["layer_types"][:LAYERS]
    tower = {**TOWER, "patch_size": 4}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=60)


FAMILIES: dict[str, Any] = {
    "llama": lambda: llava("llama"),
    "qwen2": lambda: llava("qwen2"),
    "qwen3": lambda: llava("qwen3"),
    "mistral": lambda: llava("mistral", sliding_window=3),
    "gemma": lambda: llava("gemma"),
    "gemma3_text": lambda: llava("gemma3_text", sliding_window=3, query_pre_attn_scalar=5, sliding_window_pattern=2),
    "gemma3": gemma3,
    "qwen2_vl": lambda: qwen2_vl("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen2_vl("qwen2_5_vl"),
    "qwen3_vl": qwen3_vl,
}


def randomize(model: nn.Module, scale: float = 0.4) -> None:
    """Weights of a size at which every part of the sum counts, norms and biases included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if parameter.ndim < 2 and "norm" in name else noise)


def adapt(model: Any, adapter_layers: int | None = None, **config: Any) -> PeftModel:
    root = find_components(model).language_model
    targets = gated_prefix_targets(model, root, adapter_layers)
    torch.manual_seed(1)
    return get_peft_model(model, GatedPrefixConfig(target_modules=targets, adapter_layers=adapter_layers, **config))


def open_gates(model: nn.Module, seed: int = 2) -> None:
    """Gates as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gated_prefix_gate" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def layers_of(model: nn.Module) -> list[GatedPrefixLayer]:
    return [module for module in model.modules() if isinstance(module, GatedPrefixLayer)]


# ---- the reference: one attention layer from the equations, in double precision


def rotated(heads: torch.Tensor, positions: torch.Tensor, theta: float, axes: list[int]) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) of (batch, heads, length, dim) in the two-halves layout; `axes` names each frequency's position."""
    half = heads.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[axes].permute(1, 2, 0) * frequencies  # (batch, length, half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(layer: GatedPrefixLayer, hidden: torch.Tensor, positions: torch.Tensor, traits: dict[str, Any]) -> torch.Tensor:
    weights = {name: value.double() for name, value in layer.base_layer.state_dict().items()}
    batch, length, _ = hidden.shape

    def project(name: str, x: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        y = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()).double())
        y = y.reshape(*x.shape[:-1], -1, HEAD_DIM)
        scale = weights.get(f"{norm}.weight")
        return rms(y, scale + traits["norm_offset"] if scale is not None else None, traits["eps"]).transpose(-3, -2)

    x = hidden.double()
    place = (positions, traits["theta"], traits["axes"])
    query = rotated(project("q_proj", x, "q_norm"), *place)
    key, value = rotated(project("k_proj", x, "k_norm"), *place), project("v_proj", x)
    prompt = layer.gated_prefix_prompt["default"].double()
    gate = layer.gated_prefix_gate["default"].double()
    prompt_key, prompt_value = project("k_proj", prompt, "k_norm"), project("v_proj", prompt)
    out = torch.zeros(batch, length, HEADS, HEAD_DIM, dtype=torch.float64)
    for b in range(batch):
        for h in range(HEADS):
            for i in range(length):
                seen = range(max(0, i + 1 - traits["window"]), i + 1)
                usual = torch.stack([query[b, h, i] @ key[b, h // GROUPS, j] for j in seen]) * traits["scale"]
                out[b, i, h] = usual.softmax(0) @ value[b, h // GROUPS, seen[0] : i + 1]
                scores = prompt_key[h // GROUPS] @ query[b, h, i] * traits["scale"]
                out[b, i, h] += math.tanh(gate[h].item()) * (scores.softmax(0) @ prompt_value[h // GROUPS])
    return out.reshape(batch, length, -1) @ weights["o_proj.weight"].T


def traits_of(family: str, number: int) -> dict[str, Any]:
    traits = {"norm_offset": 0, "eps": 1e-6, "theta": 10000.0, "axes": [0] * 4, "window": 100, "scale": HEAD_DIM**-0.5}
    if family == "mistral":
        traits["window"] = 3
    if family.startswith("gemma3"):
        sliding = number == 1 if family == "gemma3" else number != 1
        traits |= {"norm_offset": 1, "scale": 5**-0.5, "window": 3 if sliding else 100, "theta": 1e4 if sliding else 1e6}
    if family.endswith("_vl"):
        # mRoPE: the first two frequencies turn with time, one with height, one with width; Qwen3-VL deals them in turn.
        traits |= {"theta": 100.0, "axes": [0, 1, 2, 0] if family == "qwen3_vl" else [0, 0, 1, 2]}
    return traits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_layer_computes_the_equations(family: str, implementation: str) -> None:
    model = AutoModelForImageTextToText.from_config(FAMILIES[family](), attn_implementation=implementation).eval()
    randomize(model)
    adapted = adapt(model, LAYERS, adapter_len=5)
    open_gates(adapted)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number, layer in enumerate(layers_of(adapted)):
        layer.register_forward_hook(
            lambda _, args, kwargs, output, number=number: seen.update({number: (kwargs["hidden_states"], output[0])}),
            with_kwargs=True,
        )
    torch.manual_seed(3)
    decoder = model.get_decoder()
    batch, length = 2, 6
    plain = torch.arange(length).expand(batch, -1)
    positions = torch.randint(0, 9, (3, batch, length)) if family.endswith("_vl") else plain.expand(3, -1, -1)
    arguments = positions if family.endswith("_vl") else plain
    with torch.no_grad():
        decoder(inputs_embeds=torch.randn(batch, length, decoder.config.hidden_size), position_ids=arguments)
    assert len(seen) == LAYERS
    for number, layer in enumerate(layers_of(adapted)):
        hidden, output = seen[number]
        expected = by_hand(layer, hidden, positions, traits_of(family, number))
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


# ---- around a whole vision-language model


@pytest.fixture
def model(untrained: tuple[Any, Any]) -> Any:
    fresh = copy.deepcopy(untrained[0])
    randomize(fresh, 0.15)
    return fresh.eval()


@pytest.fixture(scope="module")
def inputs(untrained: tuple[Any, Any]) -> Any:
    """Two rows with an image each, padded on the left."""
    processor = untrained[1]
    pictures = [[Image.effect_noise((32, 32), 90).convert("RGB")] for _ in range(2)]
    texts = ["<image>Which digit is top left?", "<image>How many?"]
    return processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left")


def logits_of(model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs, **kwargs).logits
    return logits


def backward(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_closed_gates_are_the_base_to_the_bit(model: Any, inputs: Any) -> None:
    expected = logits_of(model, inputs)
    adapted = adapt(model)
    assert torch.equal(logits_of(adapted, inputs), expected)
    open_gates(adapted)
    assert (logits_of(adapted, inputs) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("adapter_layers", "adapted_layers"), [(None, 3), (2, 2), (5, 5)])
def test_trainable_parameters_are_the_closed_form(model: Any, adapter_layers: int | None, adapted_layers: int) -> None:
    adapted = adapt(model, adapter_layers, adapter_len=7)
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trainable.values()) == adapted_layers * (7 * 128 + 4)
    assert all("gated_prefix_" in name and parameter.dtype == torch.float32 for name, parameter in trainable.items())
    assert {name.split(".layers.")[1].split(".")[0] for name in trainable} == {str(n) for n in range(5 - adapted_layers, 5)}


def test_only_the_adapter_gets_gradients_and_with_closed_gates_only_the_gates(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    closed = backward(adapted, inputs)
    assert len(closed) == 6 and all("gated_prefix_" in name for name in closed)
    assert all((gradient != 0).all() if "gate." in name else (gradient == 0).all() for name, gradient in closed.items())
    open_gates(adapted)
    assert all((gradient != 0).any() for gradient in backward(adapted, inputs).values())


@pytest.mark.slow
def test_training_lowers_the_loss(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_disabled_and_unloaded_it_is_the_base_to_the_bit(model: Any, inputs: Any) -> None:
    expected, config = logits_of(model, inputs), model.config.text_config
    adapted = adapt(model)
    open_gates(adapted)
    tuned = logits_of(adapted, inputs)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, inputs), expected)
    assert torch.equal(logits_of(adapted, inputs), tuned)
    base = adapted.unload()
    assert torch.equal(logits_of(base, inputs), expected)
    assert not layers_of(base)
    assert all(
        module.config is config for name, module in base.named_modules() if name.endswith("language_model.layers.4.self_attn")
    )


def test_the_projector_is_trained_and_unloaded_with_it(model: Any, inputs: Any) -> None:
    expected = logits_of(model, inputs)
    adapted = adapt(model, modules_to_save=["model.multi_modal_projector"])
    trained = {name for name in backward(adapted, inputs) if "gated_prefix_" not in name}
    assert trained and all("multi_modal_projector.modules_to_save" in name for name in trained)
    assert torch.equal(logits_of(adapted.unload(), inputs), expected)


def test_a_cache_changes_nothing(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    open_gates(adapted)
    answers = [adapted.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*answers)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(**inputs, max_new_tokens=6, do_sample=False), answers[0])
    whole = logits_of(adapted, inputs)
    head = {key: value[:, :-3] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    cache = None
    with torch.no_grad():
        cache = adapted(**head, use_cache=True).past_key_values
        tail = adapted(
            input_ids=inputs["input_ids"][:, -3:], attention_mask=inputs["attention_mask"], past_key_values=cache, use_cache=True
        )
    torch.testing.assert_close(tail.logits, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    open_gates(adapted)
    together = logits_of(adapted, inputs)
    alone = logits_of(adapted, {key: value[:1] for key, value in inputs.items()})
    torch.testing.assert_close(alone, together[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(model: Any, inputs: Any, reentrant: bool) -> None:
    adapted = adapt(model, init_std=0.5).train()
    open_gates(adapted)
    plain = backward(adapted, inputs)
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    calls = []
    layers_of(adapted)[0].register_forward_hook(lambda *_: calls.append(1))
    checkpointed = backward(adapted, inputs)
    assert len(calls) == 2 or not reentrant  # a layer that is not reentered stops once it has what it needs
    assert checkpointed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_attention_implementation_may_change_afterwards(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    open_gates(adapted)
    assert model.config.text_config._attn_implementation == "sdpa"
    sdpa = logits_of(adapted, inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = adapted(**inputs, output_attentions=True)
    read = inputs["attention_mask"].bool()  # what padding attends to is each implementation's own affair
    torch.testing.assert_close(eager.logits[read], sdpa[read], rtol=1e-4, atol=1e-4)
    length = inputs["input_ids"].shape[1]
    assert [tuple(weights.shape) for weights in eager.attentions] == [(2, 4, length, length)] * 5


def test_the_usual_attention_function_is_called_as_without_an_adapter(
    model: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention reads its name and the weights' dtype from the module that it is given."""
    seen: list[Any] = []

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(module.config), module.config._attn_implementation, module.layer_idx, module.training, sorted(kwargs)))
        assert any(isinstance(child, nn.Linear) for child in module.modules()) and isinstance(module.is_causal, bool)
        return sdpa(module, *args, **kwargs)

    sdpa = AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", spy)
    tokens = {"input_ids": inputs["input_ids"][:, -4:]}
    logits_of(model, tokens)
    plain, seen[:] = list(seen), []
    logits_of(adapt(model), tokens)
    assert len(plain) == 5 and seen == plain


def test_two_adapters_add(model: Any, inputs: Any) -> None:
    adapted = adapt(model, 1)
    config = adapted.peft_config["default"]
    adapted.add_adapter("other", GatedPrefixConfig(target_modules=config.target_modules, adapter_len=3))
    (layer,) = layers_of(adapted)
    open_gates(adapted)
    attended: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, args, output: attended.append(output[0]))
    for active in (["default"], ["other"], ["default", "other"], []):
        adapted.base_model.set_adapter(active)
        logits_of(adapted, inputs)
    first, second, both, base = attended
    assert (first - base).abs().max() > 0.05 and (second - base).abs().max() > 0.05
    torch.testing.assert_close(both - base, first - base + second - base, rtol=1e-5, atol=1e-5)
    adapted.set_adapter("other")
    adapted.delete_adapter("default")
    logits_of(adapted, inputs)
    assert torch.equal(attended[-1], second) and list(layer.gated_prefix_prompt) == ["other"]


def test_a_copy_is_independent(model: Any, inputs: Any) -> None:
    adapted = adapt(model)
    open_gates(adapted)
    expected = logits_of(adapted, inputs)
    other = copy.deepcopy(adapted)
    assert torch.equal(logits_of(other, inputs), expected)
    open_gates(other, seed=5)
    assert not torch.equal(logits_of(other, inputs), expected)
    assert torch.equal(logits_of(adapted, inputs), expected)


def test_a_merge_is_rejected_and_changes_nothing(model: Any, inputs: Any) -> None:
    base = logits_of(model, inputs)
    adapted = adapt(model, modules_to_save=["model.multi_modal_projector"])
    open_gates(adapted)
    nn.init.normal_(adapted.get_parameter("base_model.model.model.multi_modal_projector.modules_to_save.default.linear_1.bias"))
    expected = logits_of(adapted, inputs)
    for merge in (adapted.merge_and_unload, adapted.merge_adapter, layers_of(adapted)[0].merge):
        with pytest.raises(UserError, match="release the adapter beside its base"):
            merge()
    assert torch.equal(logits_of(adapted, inputs), expected)
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, inputs), base)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_full_precision(model: Any, inputs: Any, autocast: bool) -> None:
    """Prompts stay fp32 on a bf16 base, and under autocast on an fp32 one; closed gates are exact in either."""
    adapted = adapt(model)
    open_gates(adapted)
    exact = logits_of(adapted, inputs)
    with adapted.disable_adapter():
        base = logits_of(adapted, inputs)
    if not autocast:
        adapted.unload().to(torch.bfloat16)
        adapted = adapt(model)
        assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with adapted.disable_adapter():
            half_base = logits_of(adapted, inputs)
        for layer in layers_of(adapted):
            nn.init.zeros_(layer.gated_prefix_gate["default"])
        assert torch.equal(logits_of(adapted, inputs), half_base)
        open_gates(adapted)
        half = logits_of(adapted, inputs)
        gradients = backward(adapted, inputs)
    assert (half.float() - exact).abs().mean() < 2 * (half_base.float() - base).abs().mean() < 0.5 * (exact - base).abs().mean()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantized_base_trains(base: Path, inputs: Any, precision: str) -> None:
    options: dict[str, Any] = {"load_in_8bit": True}
    if precision == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    spared = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantized = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=spared)
    )
    for module in quantized.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert quantized.get_submodule("model.language_model.layers.4.self_attn.k_proj").weight.dtype in (torch.uint8, torch.int8)
    expected = logits_of(quantized, inputs)
    adapted = adapt(quantized)
    assert torch.equal(logits_of(adapted, inputs), expected)
    optimizer = torch.optim.AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=0.1)
    losses = []
    for _ in range(6):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_saved_and_loaded_in_another_process_it_answers_the_same(base: Path, inputs: Any, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    untuned = logits_of(model, inputs)
    adapted = adapt(model, modules_to_save=["model.multi_modal_projector"], adapter_len=4)
    open_gates(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    expected = logits_of(adapted.eval(), inputs)
    assert (expected - untuned).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save({"inputs": dict(inputs), "logits": expected}, tmp_path / "expected.pt")
    program = f"""
    import torch
    import mmtune.methods.tuners.gated_prefix_tuner
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText
    known = torch.load({str(tmp_path / "expected.pt")!r})
    base = AutoModelForImageTextToText.from_pretrained({str(base)!r})
    by_peft = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
    lean = AutoModelForImageTextToText.from_pretrained({str(base)!r})
    lean = PeftModel.from_pretrained(lean, {str(tmp_path / "adapter")!r}, low_cpu_mem_usage=True).eval()
    by_transformers = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "adapter")!r}).eval()
    with torch.no_grad():
        for model in (by_peft, lean, by_transformers):
            print((model(**known["inputs"]).logits - known["logits"]).abs().max().item())
    """
    differences = [float(line) for line in run_program(program).split()]
    assert len(differences) == 3 and max(differences) <= 1e-6


# ---- where it goes


def test_targets_are_the_top_layers(model: Any) -> None:
    root = "model.language_model"
    assert gated_prefix_targets(model, root, None) == [f"{root}.layers.{number}.self_attn" for number in (2, 3, 4)]
    assert gated_prefix_targets(model, root, 1) == [f"{root}.layers.4.self_attn"]
    adapted = adapt(model)
    assert gated_prefix_targets(adapted, f"base_model.model.{root}", 1) == [f"base_model.model.{root}.layers.4.self_attn"]
    shallow = AutoModelForImageTextToText.from_config(llava("llama", num_hidden_layers=2))
    assert gated_prefix_targets(shallow, root, None) == [f"{root}.layers.1.self_attn"]


def test_a_deep_decoder_is_adapted_where_it_should_be() -> None:
    """PEFT shortens lists of twenty targets and more; none of the tower's attention modules may be caught by that."""
    config = llava("llama", num_hidden_layers=24)
    config.vision_config.num_hidden_layers = 24
    adapted = adapt(AutoModelForImageTextToText.from_config(config))
    assert len(layers_of(adapted)) == 22
    assert all("language_model.layers." in name for name in adapted.base_model.targeted_module_names)


@pytest.mark.parametrize("adapter_layers", [0, -1, 6])
def test_missing_layers_are_rejected(model: Any, adapter_layers: int) -> None:
    with pytest.raises(UserError, match=rf"adapter_layers: {adapter_layers} is out of range; .* has 5 layers"):
        gated_prefix_targets(model, "model.language_model", adapter_layers)


def test_structures_that_are_not_supported_are_rejected_with_the_reason(model: Any) -> None:
    for root, reason in [
        ("model.vision_tower", "no list of decoder layers"),
        (
            "model.vision_tower.encoder",
            r"layers.0 \(CLIPEncoderLayer\) has 0 attention modules with q_proj, k_proj, v_proj, o_proj",
        ),
    ]:
        with pytest.raises(UserError, match=reason):
            gated_prefix_targets(model, root, None)
    capped = AutoModelForImageTextToText.from_config(llava("gemma2"))
    with pytest.raises(UserError, match="attn_logit_softcapping"):
        gated_prefix_targets(capped, "model.language_model", None)
    whole = AutoModelForImageTextToText.from_config(llava("olmo2"))
    with pytest.raises(UserError, match="k_norm"):
        gated_prefix_targets(whole, "model.language_model", None)
    with pytest.raises(UserError, match=r"model.vision_tower.* has no o_proj"):
        get_peft_model(model, GatedPrefixConfig(target_modules=["model.vision_tower.encoder.layers.0.self_attn"]))
    with pytest.raises(UserError, match="target_modules names no attention module"):
        get_peft_model(model, GatedPrefixConfig())


@pytest.mark.parametrize(("field", "value"), [("adapter_len", 0), ("init_std", 0.0)])
def test_settings_that_cannot_train_are_rejected(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        GatedPrefixConfig(**{field: value})
