"""Stacked experts: tuned as plain PEFT tunes them, resumed, merged and loaded back, and named where they stay frozen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Glm4vMoeConfig, Llama4ForCausalLM, Llama4TextConfig, LlavaConfig

from mmtune.families.structure import Components, find_components
from mmtune.models.components import linear_modules, select_parameters
from mmtune.models.experts.expert_stacks import find_experts
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision
from mmtune.recipe.recipe import Recipe, TuneSection
from mmtune.release.merge import merge
from mmtune.release.merge_weights import merge_adapter
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.tuning.apply import apply_tuning, tune_model
from mmtune.utils.errors import UserError

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.arange(8, 20).view(2, 6)


def mixtral() -> LlavaConfig:
    tower = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **TOWER}
    text = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **TEXT}
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=3)


def glm() -> Glm4vMoeConfig:
    """A dense layer, and one of routed and shared experts."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    text = {**TEXT, **experts, "first_k_dense_replace": 1, "n_shared_experts": 1, "rope_parameters": rope}
    tower = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 14}
    tokens = {"image_token_id": 3, "video_token_id": 4, "image_start_token_id": 5, "image_end_token_id": 6}
    return Glm4vMoeConfig(text_config=text, vision_config={**tower, "image_size": 56}, **tokens)


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


def section(**language: Any) -> TuneSection:
    return TuneSection.model_validate({"projector": "frozen", "language": {"method": "lora", "r": 2, **language}})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_a_step_is_that_of_plain_peft() -> None:
    model, other = build(mixtral()), build(mixtral())
    paths = linear_modules(model, find_components(model), "language")
    assert {path.rpartition(".")[2] for path in paths} == set(ATTENTION)
    torch.manual_seed(1)
    tuned = apply_tuning(model, find_components(model), section(target_parameters="all-experts"))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    torch.manual_seed(1)
    plain = get_peft_model(other, LoraConfig(r=2, lora_alpha=32, target_modules=paths, target_parameters=names))
    gradients = []
    for each in (tuned, plain):
        optimizer = torch.optim.SGD((p for p in each.parameters() if p.requires_grad), lr=1.0)
        for _ in range(2):  # at step 0 the gradient of A is zero, as B is
            optimizer.zero_grad()
            each.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert sum("experts" in name for name in gradients[0]) == 2 * 2 * 2  # A and B of two parameters in two layers
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("parameters", [None, "all-experts"])
def test_layers_that_peft_would_read_as_experts_are_adapted_as_layers(parameters: str | None, tmp_path: Path) -> None:
    """PEFT replaces `gate_proj` of this family by the routed experts: those would train, and the shared ones would not."""
    model = build(glm())
    tuned = apply_tuning(model, find_components(model), section(target_parameters=parameters))
    adapted = {name.partition(".lora_")[0].rpartition("layers.")[2] for name, p in tuned.named_parameters() if p.requires_grad}
    dense, shared = ([f"{path}.{name}_proj" for name in ("gate", "up", "down")] for path in ("0.mlp", "1.mlp.shared_experts"))
    experts = {"1.mlp.experts", "1.mlp.experts.base_layer"} if parameters else set()
    assert adapted == {f"{layer}.self_attn.{name}" for layer in (0, 1) for name in ATTENTION} | {*dense, *shared} | experts
    for name, parameter in tuned.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected, base = logits(tuned), logits(build(glm()))
    assert (expected - base).abs().max() > 0.01
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(build(glm()), tmp_path / "adapter")), expected)
    merge_adapter(tuned).save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("language", "advice"),
    [
        ({}, "to tune them, write target_parameters: all-experts"),
        ({"method": "vera"}, "write method: lora and target_parameters: all-experts"),
        ({"target_parameters": "all-experts"}, None),
    ],
)
def test_experts_that_stay_frozen_are_named(language: Any, advice: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    tune_model(build(mixtral()), section(**language), 1e-3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "the experts stay frozen" in line]
    if advice is None:
        assert not lines
        return
    (line,) = lines
    assert f"{2 * 4 * 3 * 32 * 48:,} weights" in line and "layers.*.mlp.experts.gate_up_proj" in line and line.endswith(advice)


def test_a_router_is_no_target() -> None:
    """Llama 4's is a linear layer whose forward pass returns a tuple, to which PEFT would add an update."""
    config = Llama4TextConfig(**TEXT, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1)
    model = Llama4ForCausalLM(config)
    components = Components(None, None, "model", "lm_head")
    assert not [path for path in linear_modules(model, components, "language") if path.endswith("router")]
    with pytest.raises(UserError, match=r"layers\.0\.feed_forward\.router is a router"):
        apply_tuning(model, components, section(target_modules=["router"]))
    tuned = apply_tuning(model, components, section(target_parameters="all-experts"))
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    assert {(stack.experts, stack.used, stack.size) for stack in find_experts(tuned).values()} == {(4, 1, 3 * 32 * 48)}


def test_selectors_that_reach_no_expert_say_what_does() -> None:
    model = build(mixtral())
    components = find_components(model)
    with pytest.raises(UserError, match=r"'experts\.down_prj' matches no parameter of the language.*target_parameters: all-exp"):
        select_parameters(model, components, "language", ["experts.down_prj"])
    with pytest.raises(UserError, match="all-experts: the vision component has no experts"):
        select_parameters(model, components, "vision", "all-experts")
    with pytest.raises(UserError, match=r"holds stacked experts.*target_parameters: all-experts"):
        apply_tuning(model, components, section(target_modules=["experts"]))


@pytest.mark.slow
def test_a_run_on_experts_resumes_and_merges(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    vision, language = write_tiny_vision("clip", tmp_path / "clip"), write_tiny_language("mixtral", tmp_path / "mixtral")
    recipe = make_recipe(
        f"model={{vision: {vision}, language: {language}, chat_template: mistral}}",
        "tune.language.target_parameters=all-experts",
        "train={max_steps: 4, learning_rate: 1e-2, per_device_train_batch_size: 4, use_cpu: true, save_strategy: steps, "
        "save_steps: 2}",
    )
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    shutil.rmtree(run.adapter)
    run.summary.unlink()
    train(recipe, ["test"], resume=True)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights
    merge(run.path, tmp_path / "merged")  # raises an error where the merged model does not answer as the adapter
    files = list((tmp_path / "merged").glob("*.safetensors"))
    keys = {key for file in files for key in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert "language_model.model.layers.0.block_sparse_moe.experts.3.w1.weight" in keys
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(run.base), run.adapter)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-2)  # the release is rounded to bf16


@pytest.mark.slow
def test_sharded_experts_train_as_in_one_process(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Weights of 262,144 numbers, which DeepSpeed shards; those below 100,000 stay in every process."""
    vision = write_tiny_vision("clip", tmp_path / "clip")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_local_experts": 8}
    language = write_tiny_language("mixtral", tmp_path / "mixtral", **sizes)
    recipes = [
        make_recipe(
            f"model={{vision: {vision}, language: {language}, chat_template: mistral}}",
            "tune.language.target_parameters=all-experts",
            f"train={{max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: {size}, use_cpu: true}}",
            f"output_dir={tmp_path / name}",
        )
        for name, size in (("one", 4), ("zero3", 2), ("fsdp2", 2))
    ]
    train(recipes[0], ["test"])
    jobs = [(tmp_path / f"{name}.yaml", name) for name in ("zero3", "fsdp2")]
    for (path, _), recipe in zip(jobs, recipes[1:], strict=True):
        path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert launch(jobs, tmp_path, timeout_s=300.0) == [True, True]
    one, *others = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "zero3", "fsdp2"))
    assert sum(".experts." in key for key in one) == 2 * 4  # A and B of two parameters in two layers
    for other in others:
        assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)
