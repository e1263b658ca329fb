"""What every objective keeps: the same gradients however the rows are batched, and dummy batches that add nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launch
from safetensors.torch import load_file

from mmtune.data.dataset import IndexedSamples
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.objectives.objective_table import OBJECTIVES, build_objective
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import OBJECTIVE_SECTIONS
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.loss_record import LossRecord

TEACHER = {"type": "distillation", "teacher": "builtin:tiny-llava"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sft": ({"type": "sft"}, ()),
    "distillation": ({**TEACHER, "temperature": 2.0, "beta": 0.5, "crossentropy_weight": 0.5}, ()),
    "distillation of layers": (
        {**TEACHER, "hidden_states": {"layers": [[1, 1], [-1, -1]]}, "attention_maps": {"layers": [[0, 0], [2, 4]]}},
        ("model.attn_implementation=eager",),
    ),
}
"""An `objective` section of each objective, and what else the recipe then needs."""

MakeRecipe = Callable[..., Recipe]
Batches = list[list[int]]


class Setup:
    """An objective with its models, a student on the CPU, and encoded rows."""

    def __init__(self, recipe: Recipe, untrained: tuple[Any, Any]) -> None:
        self.student, processor = copy.deepcopy(untrained[0]).train(), untrained[1]
        self.student.set_attn_implementation(recipe.model.attn_implementation or "sdpa")
        self.objective: SupervisedTuning = build_objective(recipe, processor)
        self.objective.load_models(recipe, torch.device("cpu"), SINGLE_PROCESS)
        encoder = self.objective.encoder(processor, recipe.data)
        samples = IndexedSamples(recipe.data.train)
        self.rows = [encoder(lambda number=number: samples[number]) for number in range(6)]
        self.dummy = self.objective.dummy_batch(processor)
        self.processor = processor

    def batches(self, numbers: Batches, packed: bool = False) -> list[dict[str, Any]]:
        collator = self.objective.collator(self.processor, packed)
        collated = [collator([self.rows[number] for number in batch]) for batch in numbers]
        return [{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)} for batch in collated]

    def step(self, batches: list[dict[str, Any]]) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
        """The loss, its parts and the gradients of one optimizer step over batches."""
        self.student.zero_grad()
        denominator = self.objective.denominator(batches)
        loss, parts = 0.0, dict[str, float]()
        for batch in batches:
            inputs = self.objective.model_inputs(self.student, dict(batch))
            losses = self.objective.compute_loss(self.student, inputs, denominator)
            losses.loss.backward()
            loss += float(losses.loss)
            parts = {name: parts.get(name, 0.0) + float(value) for name, value in losses.parts.items()}
        return loss, parts, {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}


@pytest.fixture(params=CASES)
def setup(request: pytest.FixtureRequest, make_recipe: MakeRecipe, untrained: tuple[Any, Any]) -> Setup:
    section, overrides = CASES[request.param]
    return Setup(make_recipe(f"objective={json.dumps(section)}", *overrides), untrained)


def assert_same(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert actual[0] == pytest.approx(expected[0], abs=1e-5)
    assert actual[1] == pytest.approx(expected[1], abs=1e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, atol=1e-5, rtol=1e-4)


def test_every_objective_has_a_section_and_a_case_here() -> None:
    assert OBJECTIVES.keys() == OBJECTIVE_SECTIONS.keys() == {section["type"] for section, _ in CASES.values()}


def test_accumulated_batches_give_the_gradients_of_one_large_batch(setup: Setup) -> None:
    large = setup.step(setup.batches([[0, 1, 2, 3, 4, 5]]))
    assert max(float(gradient.abs().max()) for gradient in large[2].values()) > 1e-3
    assert_same(setup.step(setup.batches([[0], [1, 2, 3], [4, 5]])), large)


def test_a_dummy_batch_adds_nothing(setup: Setup) -> None:
    real = setup.batches([[0, 1, 2]])
    assert int(setup.objective.denominator([setup.dummy])) == 0
    assert_same(setup.step([*real, dict(setup.dummy)]), setup.step(real))


def test_packed_rows_give_the_gradients_of_padded_ones(setup: Setup) -> None:
    if "attention_maps" in setup.objective.settings.model_dump(exclude_none=True):
        pytest.skip("a recipe with attention maps cannot pack")
    assert_same(setup.step(setup.batches([[0, 1, 2, 3]], packed=True)), setup.step(setup.batches([[0, 1, 2, 3]])))


def test_frozen_models_are_in_eval_mode_and_get_no_gradient(setup: Setup) -> None:
    before = [copy.deepcopy(model.state_dict()) for model in setup.objective.frozen_models]
    setup.step(setup.batches([[0, 1]]))
    for model, state in zip(setup.objective.frozen_models, before, strict=True):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_trainer_logs_the_loss_and_its_parts_alike_however_it_accumulates(case: str, make_recipe: MakeRecipe) -> None:
    section, overrides = CASES[case]
    logs = []
    for size, accumulation in ((12, 1), (3, 4)):
        batch = f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={accumulation}"
        recipe = make_recipe(f"objective={json.dumps(section)}", *overrides, *batch, "train.max_steps=2")
        train(recipe, ["test"], overwrite=True)
        metrics = RunDirectory(Path(recipe.output_dir)).metrics.read_text(encoding="utf-8")
        logs.append([{n: v for n, v in json.loads(line).items() if n.startswith("loss")} for line in metrics.splitlines()])
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-3, abs=1e-6)
    weights = {"loss_distillation": section.get("distillation_weight", 1.0)}
    weights["loss_crossentropy"] = section.get("crossentropy_weight", 0.0)
    weights |= {f"loss_{name}": 1.0 for name in ("hidden_states", "attention_maps") if name in section}
    if section["type"] == "sft":
        assert logs[0][0].keys() == {"loss"}
    else:
        assert logs[0][0].keys() == {"loss", *weights}
        assert logs[0][0]["loss"] == pytest.approx(sum(w * logs[0][0][name] for name, w in weights.items()), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_what_one_does(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """DDP, ZeRO-3 and FSDP2, by plain descent, whose steps are the gradients."""
    jobs, runs = [], {}
    for number, (case, (section, overrides)) in enumerate(CASES.items()):
        for name, strategy, size in (("one", None, 4), ("ddp", "ddp", 2), ("zero3", "zero3", 2), ("fsdp2", "fsdp2", 2)):
            out = tmp_path / f"{number}_{name}"
            settings = f"train.per_device_train_batch_size={size}", "train.optim=sgd", "train.learning_rate=0.1"
            recipe = make_recipe(f"objective={json.dumps(section)}", *overrides, *settings, f"output_dir={out}")
            path = tmp_path / f"{out.name}.yaml"
            path.write_text(recipe.to_yaml(), encoding="utf-8")
            runs[case, name] = RunDirectory(out)
            if strategy is None:
                train(recipe, ["test"])
            else:
                jobs.append((path, strategy))
    assert launch(jobs, tmp_path) == [True] * len(jobs)
    for (case, name), run in runs.items():
        expected, actual = (load_file(each.adapter / "adapter_model.safetensors") for each in (runs[case, "one"], run))
        assert max((expected[key] - actual[key]).abs().max() for key in expected) < 1e-5, (case, name)
        losses = [
            [json.loads(line)["loss"] for line in each.metrics.read_text(encoding="utf-8").splitlines()]
            for each in (runs[case, "one"], run)
        ]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5), (case, name)


def test_the_loss_record_averages_over_steps_and_tokens_and_leaves_out_a_dropped_step() -> None:
    record = LossRecord(["a", "b", "none"])
    for step, value in enumerate((1.0, 100.0, 4.0)):
        record.begin_step()
        for _ in range(2):  # batches
            record.add_parts({"term": torch.tensor(value)})
            record.add_by_source(torch.tensor([value, 7.0], dtype=torch.float64), torch.tensor([0, 1]))
        if step == 1:
            record.drop_step()
    assert record.take() == {"loss_term": 5.0, "loss/a": 2.5, "loss/b": 7.0}
    assert record.take() == {}
