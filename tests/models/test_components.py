"""Components: every parameter of every supported family belongs to exactly one of them; selection of modules."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from mmtune.families.structure import Components, find_components
from mmtune.models.components import component_of, linear_modules, select_modules
from mmtune.models.tiny.tiny_bases import BASES
from mmtune.recipe.recipe import TuneSection
from mmtune.tuning.apply import apply_tuning
from mmtune.tuning.peft_config import frozen_parts
from mmtune.utils.errors import UserError

PATHS = {
    "qwen2_vl": ("model.visual", "model.visual.merger"),
    "qwen2_5_vl": ("model.visual", "model.visual.merger"),
    "qwen3_vl": ("model.visual", "model.visual.merger"),
    "idefics3": ("model.vision_model", "model.connector"),
    "smolvlm": ("model.vision_model", "model.connector"),
}
"""Paths of vision tower and projector; the other families have LLaVA's paths."""
PROCESSORS = {family: cache(base.processor) for family, base in BASES.items()}


def _build(family: str, device: str = "meta") -> Any:
    with torch.device(device):
        return tf.AutoModelForImageTextToText.from_config(BASES[family].config(PROCESSORS[family]()))


@pytest.mark.parametrize("family", BASES)
def test_every_parameter_belongs_to_one_component(family: str) -> None:
    model = _build(family)
    components = find_components(model)
    expected = PATHS.get(family, ("model.vision_tower", "model.multi_modal_projector"))
    assert (components.vision_tower, components.projector) == expected
    assert model.get_submodule(components.language_model) is model.get_decoder()
    by_object: dict[int, str] = {}
    tower = model.get_submodule(components.vision_tower)
    projector = model.get_submodule(components.projector)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        component = component_of(name, components)
        is_tied = component in ("lm_head", "language")
        assert by_object.setdefault(id(parameter), component) == component or is_tied
        assert component_of(f"base_model.model.{name}", components) == component
    assert set(by_object.values()) - {"lm_head"} == {"vision", "projector", "language"}
    inside_projector = {id(parameter) for parameter in projector.parameters()}
    assert inside_projector and all(by_object[key] == "projector" for key in inside_projector)
    assert any(by_object[id(p)] == "vision" for p in tower.parameters())
    assert all(by_object[id(p)] == "language" for p in model.get_decoder().layers.parameters())


@pytest.mark.parametrize(
    ("family", "part"), [("llava_next", "model.image_newline"), ("qwen3_vl", "model.visual.deepstack_merger_list")]
)
def test_what_is_trained_with_the_projector_belongs_to_it(family: str, part: str) -> None:
    components = find_components(_build(family))
    assert components.projector_extras == (part,)
    assert component_of(part, components) == "projector"


@pytest.mark.parametrize("family", BASES)
def test_linear_modules_are_the_linear_layers_and_never_the_head(family: str) -> None:
    model = _build(family)
    components = find_components(model)
    listed = [name for part in ("vision", "projector", "language") for name in linear_modules(model, components, part)]  # type: ignore[arg-type]
    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(listed) == sorted(name for name in everything if name != components.lm_head)
    assert linear_modules(model, components, "lm_head") == []
    assert "model.language_model.layers.0.self_attn.q_proj" in listed or "model.text_model.layers.0.self_attn.q_proj" in listed


def test_selectors_name_modules() -> None:
    model = _build("llava")
    components = find_components(model)
    chosen = [f"model.language_model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    assert select_modules(model, components, "language", ["v_proj", "self_attn.q_proj"]) == chosen
    assert select_modules(model, components, "language", r"[qv]_proj") == chosen
    assert select_modules(model, components, "vision", r"encoder\.layers\.1\..*fc\d") == [
        f"model.vision_tower.encoder.layers.1.mlp.fc{n}" for n in (1, 2)
    ]
    assert select_modules(model, components, "projector", "all-linear") == [
        f"model.multi_modal_projector.linear_{n}" for n in (1, 2)
    ]


def test_the_merger_inside_qwens_vision_tower_belongs_to_the_projector() -> None:
    model = _build("qwen2_5_vl")
    components = find_components(model)
    assert not any("merger" in name for name in select_modules(model, components, "vision", "all-linear"))
    assert all(".merger." in name for name in select_modules(model, components, "projector", "all-linear"))


@pytest.mark.parametrize(
    ("selector", "named"),
    [
        ("w_q", "w_q"),
        (["q_proj", "q_prj"], "q_prj.*did you mean 'q_proj'"),
        ([], "empty"),
        ("(", "regular expression"),
        (["proj"], "proj"),
    ],
)
def test_a_selector_without_a_match_is_an_error(selector: str | list[str], named: str) -> None:
    model = _build("llava")
    with pytest.raises(UserError, match=named) as caught:
        select_modules(model, find_components(model), "language", selector)
    assert selector == "(" or "k_proj (2)" in str(caught.value)


def test_a_component_without_linear_layers_is_an_error_with_its_modules() -> None:
    model = _build("gemma3")
    with pytest.raises(UserError, match=r"no linear layer.*mm_soft_emb_norm"):
        select_modules(model, find_components(model), "projector", "all-linear")


def test_the_components_of_a_peft_model_are_found() -> None:
    model = _build("llava", "cpu")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"])
    peft = get_peft_model(model, lora)
    components = find_components(peft)
    assert components.projector == "base_model.model.model.multi_modal_projector"
    assert peft.get_submodule(components.language_model) is peft.get_base_model().get_decoder()
    trained = {component_of(name, components) for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trained == {"projector", "language"}


def test_an_unsupported_family_is_an_error() -> None:
    config = tf.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*'llama'"):
        find_components(model)


def test_a_name_outside_every_component_is_an_error() -> None:
    components = Components("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    with pytest.raises(UserError, match=r"model.vision_tower_2.x"):
        component_of("model.vision_tower_2.x", components)


@pytest.mark.parametrize("family", BASES)
def test_the_default_tuning_applies_to_every_family(family: str) -> None:
    """LoRA in the language model and a fully trained projector; nothing else is trainable."""
    model = _build(family, "cpu")
    tune = TuneSection.model_validate({"language": {"method": "lora", "r": 2}})
    frozen = frozen_parts(model, find_components(model), tune)
    assert frozen == (["model.image_newline"] if family in ("llava_next", "llava_onevision") else [])
    tuned = apply_tuning(model, find_components(model), tune)
    components = find_components(tuned)
    trained = {component_of(name, components) for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"projector", "language"}
    projector = {n: p for n, p in tuned.named_parameters() if component_of(n, components) == "projector"}
    expected = {n for n in projector if ".original_module." not in n and n.removeprefix("base_model.model.") not in frozen}
    assert expected == {n for n, p in projector.items() if p.requires_grad}


@pytest.mark.parametrize(
    ("paths", "owner"),
    [
        (("model.visual", "model.visual", "model.text", "head"), "projector"),
        (("model.visual", "projector", "model.visual", "head"), "vision"),
        (("tower", "projector", "model", "model"), "lm_head"),
        (("tower", "model.shared", "model.shared", "head"), "projector"),
    ],
)
def test_a_path_of_two_components_belongs_to_the_more_specific_one(paths: tuple[str, str, str, str], owner: str) -> None:
    """A head is a part of the language model, and a projector a part of the vision tower or of the language model."""
    shared = next(path for path in paths if paths.count(path) == 2)
    components = Components(*paths)
    for name in (shared, f"{shared}.weight", f"base_model.model.{shared}.weight"):
        assert component_of(name, components) == owner
