"""The router loss of a mixture of experts: what the class computes, once in an optimizer step, however its rows are batched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packing_models import CONFIGS, samples, tiny
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from mmtune.data.batching.collate import Collator
from mmtune.models.experts.router_loss import check_router_loss
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import SftSection
from mmtune.recipe.recipe import Recipe
from mmtune.utils.errors import UserError

COEFFICIENT = 0.5
"""Large, so that a wrong weight shows."""


def objective(coefficient: float | None = COEFFICIENT) -> SupervisedTuning:
    return SupervisedTuning(SftSection(router_aux_loss_coef=coefficient))


def batches(*groups: list[int]) -> list[dict[str, Any]]:
    rows, collator = samples("qwen3_vl_moe"), Collator(0)
    collated = [collator([rows[number] for number in group]) for group in groups]
    return [{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)} for batch in collated]


def step(model: Any, objective: SupervisedTuning, batches: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """The loss of a step with its parts, and the gradients."""
    model.zero_grad()
    denominator, record = objective.denominator(batches), dict[str, float]()
    for batch in batches:
        losses = objective.compute_loss(model, objective.model_inputs(model, dict(batch)), denominator)
        losses.loss.backward()
        for name, value in {"loss": losses.loss, **losses.parts}.items():
            record[name] = record.get(name, 0.0) + float(value)
    return record, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def test_a_padded_batch_is_that_of_the_class() -> None:
    model = tiny("qwen3_vl_moe")
    (batch,) = batches([1, 3])
    assert not batch["attention_mask"].all()
    record, gradients = step(model, objective(), [batch])
    model.zero_grad()
    model.config.text_config.router_aux_loss_coef = COEFFICIENT
    outputs = model(**batch, output_router_logits=True)
    outputs.loss.backward()
    assert record["loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert record["router_aux"] == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    assert record["loss"] == pytest.approx(record["crossentropy"] + COEFFICIENT * record["router_aux"], rel=1e-6)
    assert_same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_have_their_share(checkpointing: bool) -> None:
    """And a batch without a supervised token, such as a dummy's, has none."""
    model = tiny("qwen3_vl_moe")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    first, second, dummy = batches([0, 1], [3], [2])
    dummy["labels"] = torch.full_like(dummy["labels"], -100)
    record, gradients = step(model, objective(), [first, dummy, second])
    model.zero_grad()
    count, loss = objective().denominator([first, second]), torch.zeros(())
    for batch in (first, second):
        outputs = tiny_outputs(model, batch, count)
        share = objective().denominator([batch]) / count
        loss = loss + outputs.loss + COEFFICIENT * share * outputs.aux_loss
    loss.backward()
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def tiny_outputs(model: Any, batch: dict[str, Any], count: torch.Tensor) -> Any:
    """The class's own cross entropy and router loss, not summed."""
    model.config.text_config.router_aux_loss_coef = 0.0
    return model(**batch, output_router_logits=True, num_items_in_batch=count)


def test_the_configs_own_switch_counts_unless_the_recipe_overrides_it() -> None:
    model = tiny("qwen3_vl_moe")
    (batch,) = batches([0, 1])
    off, _ = step(model, objective(None), [batch])
    assert off.keys() == {"loss"}
    model.config.text_config.output_router_logits = True
    model.config.text_config.router_aux_loss_coef = COEFFICIENT
    on, _ = step(model, objective(None), [batch])
    assert on["loss"] == pytest.approx(off["loss"] + COEFFICIENT * on["router_aux"], rel=1e-6)
    assert step(model, objective(0.0), [batch])[0] == off
    assert step(model, objective(2 * COEFFICIENT), [batch])[0]["loss"] == pytest.approx(
        off["loss"] + 2 * COEFFICIENT * on["router_aux"], rel=1e-6
    )


def test_lora_with_frozen_routers_trains_on_it() -> None:
    targets = r".*language_model.*(q|v)_proj"
    model = get_peft_model(tiny("qwen3_vl_moe"), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    rows = batches([0, 1])
    (_, with_loss), (_, without) = (step(model, objective(coefficient), rows) for coefficient in (COEFFICIENT, None))
    assert with_loss.keys() == without.keys()
    assert any(not torch.allclose(with_loss[name], without[name], atol=1e-6) for name in without)


def test_a_class_without_the_loss_is_an_error(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llava, moe = CONFIGS["llava"](), CONFIGS["qwen3_vl_moe"]()
    for config in (llava, None):
        with pytest.raises(UserError, match="LlavaForConditionalGeneration computes no router loss"):
            check_router_loss(config, LlavaForConditionalGeneration, 0.1)
    assert check_router_loss(llava, LlavaForConditionalGeneration, None) is None
    assert check_router_loss(moe, LlavaForConditionalGeneration, 0.1) is None
    moe.text_config.output_router_logits = True
    assert "router_aux_loss_coef 0.001, as the base's config has it" in str(
        check_router_loss(moe, LlavaForConditionalGeneration, None)
    )
    recipe = make_recipe("objective.router_aux_loss_coef=0.01")
    assert json.loads(recipe.objective.model_dump_json())["router_aux_loss_coef"] == 0.01
