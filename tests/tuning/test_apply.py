"""Application of a recipe's tuning: the named parameters are trainable, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmtune.families.structure import find_components
from mmtune.models.components import component_of
from mmtune.recipe.recipe import Recipe
from mmtune.tuning.apply import apply_tuning, count_parameters, learning_rates, trained_modules
from mmtune.utils.errors import UserError


def tuned(recipe: Recipe, base: Path, dtype: torch.dtype = torch.float32):
    model = AutoModelForImageTextToText.from_pretrained(str(base), dtype=dtype)
    components = find_components(model)
    return apply_tuning(model, components, recipe.tune), components


def trainable_components(model, components) -> set[str]:
    return {component_of(name, components) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_count_is_its_closed_form(make_recipe: Callable[..., Recipe], base: Path) -> None:
    model, components = tuned(make_recipe("tune.projector=frozen", "tune.language.r=4"), base)
    # r (in + out) for q, k, v, o of 128 x 128, gate and up of 128 x 352, down of 352 x 128, in five layers
    expected = 5 * 4 * (4 * (128 + 128) + 3 * (128 + 352))
    counts = {count.component: count for count in count_parameters(model, components, make_recipe().tune, 1e-3)}
    assert counts["language"].trainable == expected
    assert counts["vision"].trainable == counts["projector"].trainable == 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_saving_an_adapter_makes_no_hub_request(
    make_recipe: Callable[..., Recipe], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    model.name_or_path = "owner/name"
    adapted = apply_tuning(model, find_components(model), make_recipe().tune)
    lookup = "peft.utils.save_and_load.check_file_exists_on_hf_hub"
    monkeypatch.setattr(lookup, lambda *_: pytest.fail("asked the hub"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(pytest.fail.Exception, match="asked the hub"):  # as PEFT does by itself
        type(adapted).save_pretrained(adapted, tmp_path / "other")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"projector", "language"}),
        (["tune.projector=frozen"], {"language"}),
        (["tune.language=frozen"], {"projector"}),
        (["tune.language=frozen", "tune.vision=full"], {"vision", "projector"}),
        (["tune.language=full", "tune.projector=frozen"], {"language"}),
        (["tune.vision=full"], {"vision", "projector", "language"}),
    ],
)
def test_only_the_named_components_train(
    make_recipe: Callable[..., Recipe], base: Path, overrides: list[str], expected: set[str]
) -> None:
    model, components = tuned(make_recipe(*overrides), base)
    # The built-in model's head is tied to its embeddings and so belongs to the language model.
    assert {"language" if c == "lm_head" else c for c in trainable_components(model, components)} == expected


def test_parameters_are_counted_once(make_recipe: Callable[..., Recipe], base: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(str(base))
    recipe = make_recipe()
    model, components = tuned(recipe, base)
    counts = count_parameters(model, components, recipe.tune, 1e-3)
    adapter = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert sum(count.total for count in counts) == sum(p.numel() for p in plain.parameters()) + adapter
    assert {count.component: count.learning_rate for count in counts} == {"vision": None, "projector": 1e-3, "language": 1e-3}


def test_a_component_can_have_its_own_learning_rate(make_recipe: Callable[..., Recipe], base: Path) -> None:
    recipe = make_recipe("tune.projector.learning_rate=0.25")
    model, components = tuned(recipe, base)
    rates = learning_rates(model, components, recipe.tune, 0.5)
    assert set(rates.values()) == {0.25}
    assert all("multi_modal_projector" in name for name in rates)
    assert len(rates) == 4


def test_trainable_parameters_of_a_bf16_base_are_fp32(make_recipe: Callable[..., Recipe], base: Path) -> None:
    model, _ = tuned(make_recipe(), base, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "vision_tower" in name} == {torch.bfloat16}


@pytest.mark.parametrize("selector", ["[query_projection]", "qq.*", "[q_proj, vv_proj]"])
def test_a_selector_that_matches_nothing_is_an_error(make_recipe: Callable[..., Recipe], base: Path, selector: str) -> None:
    with pytest.raises(UserError, match="q_proj"):
        tuned(make_recipe(f"tune.language.target_modules={selector}"), base)


def test_lora_targets_stay_inside_the_language_model(make_recipe: Callable[..., Recipe], base: Path) -> None:
    model, components = tuned(make_recipe(), base)
    wrapped = {component_of(name, components) for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert wrapped == {"language"}
    # CLIP's attention has q_proj and v_proj as well: names alone would have taken it along.
    assert any(name.endswith("vision_tower.encoder.layers.0.self_attn.q_proj") for name, _ in model.named_modules())


def test_adapted_modules_are_listed_by_path(make_recipe: Callable[..., Recipe], base: Path) -> None:
    model, _ = tuned(make_recipe("tune.language.target_modules=[q_proj, down_proj]"), base)
    assert trained_modules(model) == {
        "model.multi_modal_projector": (1, 33_024),  # 128 x 128 and a bias of 128, twice
        "model.language_model.layers.*.self_attn.q_proj": (5, 5 * 4 * 256),
        "model.language_model.layers.*.mlp.down_proj": (5, 5 * 4 * 480),
    }
    whole, _ = tuned(make_recipe("tune.language=full", "tune.projector=frozen"), base)
    modules = trained_modules(whole)
    assert modules["model.language_model.layers.*.mlp.up_proj"] == (5, 5 * 128 * 352)
    assert sum(size for _, size in modules.values()) == sum(p.numel() for p in whole.parameters() if p.requires_grad)
    prompts, _ = tuned(make_recipe("tune.language={method: prompt_tuning}", "tune.projector=frozen"), base)
    assert trained_modules(prompts) == {"prompt_encoder.default.embedding": (1, 20 * 128)}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_trains_with_the_language_model(make_recipe: Callable[..., Recipe], base: Path, is_tied: bool) -> None:
    """A head of its own is the language model's; one tied to the embeddings is the same parameter, and is counted once."""
    recipe = make_recipe("tune.language=full", "tune.projector=frozen")
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    if not is_tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    components = find_components(model)
    tuned_model = apply_tuning(model, components, recipe.tune)
    trained = {name for name, parameter in tuned_model.named_parameters() if parameter.requires_grad}
    assert ("lm_head.weight" in trained) is not is_tied
    assert model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad
    counts = {count.component: count for count in count_parameters(tuned_model, components, recipe.tune, 1e-3)}
    assert set(counts) == {"vision", "projector", "language"}
    language = sum(parameter.numel() for parameter in model.get_decoder().parameters())
    assert counts["language"].trainable == language + (0 if is_tied else model.lm_head.weight.numel())
