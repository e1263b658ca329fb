"""Objectives: the same gradients for every batching of the rows, and no effect of dummy batches."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched import launch
from safetensors.torch import load_file
from scipy.special import log_softmax

from mmtune.data.dataset import IndexedSamples
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.models.load import ResolvedBase
from mmtune.objectives.objective_table import OBJECTIVES, build_objective
from mmtune.objectives.sft import SupervisedTuning
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.objective_section import OBJECTIVE_SECTIONS
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.loss_record import LossRecord
from mmtune.utils.errors import UserError

MakeRecipe = Callable[..., Recipe]
Batches = list[list[int]]
ROOT = Path(__file__).parents[2]
TEACHER = {"type": "distillation", "teacher": "builtin:tiny-llava"}


@dataclass(frozen=True)
class Case:
    """An `objective` section, and what the tests of every objective need to know about it.

    Attributes:
        section: the section.
        loss: the closed form of the loss where it depends on the model's distribution alone: from the log-probabilities at the
            supervised tokens, fp64, shape (tokens, vocabulary), and the labels, shape (tokens,), to the loss of every token.
        overrides: what else the recipe needs.
        parts: the weight in the loss of each part that the log has; empty where the log has the loss alone.
        packs: whether a recipe can have it with `data.packing`.
        together: whether several processes are compared with one; no other case then covers it.
    """

    section: dict[str, Any]
    loss: Callable[[Any, Any], Any] | None = None
    overrides: tuple[str, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    packs: bool = True
    together: bool = True

    def recipe(self, make_recipe: MakeRecipe, *overrides: str) -> Recipe:
        return make_recipe(f"objective={json.dumps(self.section)}", *self.overrides, *overrides)


def label_losses(log_probabilities: Any, labels: Any) -> Any:
    return -np.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


CASES = {
    "sft": Case({"type": "sft"}, label_losses, together=False),
    "distillation": Case(
        {**TEACHER, "temperature": 2.0, "beta": 0.5, "crossentropy_weight": 0.5},
        parts={"distillation": 1.0, "crossentropy": 0.5},
        together=False,
    ),
    "distillation of layers": Case(
        {**TEACHER, "hidden_states": {"layers": [[1, 1], [-1, -1]]}, "attention_maps": {"layers": [[0, 0], [2, 4]]}},
        overrides=("model.attn_implementation=eager",),
        parts={"distillation": 1.0, "crossentropy": 0.0, "hidden_states": 1.0, "attention_maps": 1.0},
        packs=False,
    ),
}
"""At least one row for every objective; each test here runs for every row."""


class Setup:
    """An objective with its models, a student on the CPU, and encoded rows."""

    def __init__(self, recipe: Recipe, untrained: tuple[Any, Any]) -> None:
        self.student, processor = copy.deepcopy(untrained[0]).train(), untrained[1]
        self.student.set_attn_implementation(recipe.model.attn_implementation or "sdpa")
        base = ResolvedBase(recipe.model, recipe.model.base, self.student.config, processor)
        self.objective: SupervisedTuning = build_objective(recipe, base)
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
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def setup(case: Case, make_recipe: MakeRecipe, untrained: tuple[Any, Any]) -> Setup:
    return Setup(case.recipe(make_recipe), untrained)


def assert_same(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert actual[0] == pytest.approx(expected[0], abs=1e-5)
    assert actual[1] == pytest.approx(expected[1], abs=1e-5)
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        torch.testing.assert_close(actual[2][name], gradient, atol=1e-5, rtol=1e-4)


def test_every_objective_has_a_section_and_a_case_here() -> None:
    assert OBJECTIVES.keys() == OBJECTIVE_SECTIONS.keys() == {case.section["type"] for case in CASES.values()}


def test_the_docs_have_every_objective_and_setting() -> None:
    sections = re.split(r"^## ", (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name, section in OBJECTIVE_SECTIONS.items():
        (text,) = (each for each in sections if each.startswith(f"{name}\n"))
        rows = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
        assert rows == section.model_fields.keys() - {"type"}, name


@pytest.mark.parametrize(
    "case", [each for each in CASES.values() if each.loss is not None], ids=lambda case: case.section["type"]
)
def test_the_loss_is_its_closed_form(case: Case, setup: Setup) -> None:
    """From whole logits of the plain model, in fp64. A loss that depends on another model has a closed form in its own tests."""
    assert case.loss is not None
    (batch,) = setup.batches([[0, 1, 2, 3]])
    loss, parts, _ = setup.step([batch])
    labels = batch.pop("labels").numpy()
    with torch.no_grad():
        logits = setup.student(**batch).logits.double().numpy()
    rows, places = np.nonzero(labels[:, 1:] != -100)
    expected = case.loss(log_softmax(logits[rows, places], axis=-1), labels[rows, places + 1]).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert parts.keys() == case.parts.keys()


@pytest.mark.parametrize("case", [CASES["sft"]], ids=["sft"])
def test_the_backward_pass_needs_no_array_over_the_vocabulary_but_the_logits(setup: Setup) -> None:
    """transformers' loss saves their log-softmax too: at a vocabulary of 150,000, 0.6 GB for every 1,000 tokens."""
    (batch,) = setup.batches([[0, 1, 2, 3]])
    config = setup.student.config.get_text_config()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = setup.objective.compute_loss(setup.student, setup.objective.model_inputs(setup.student, batch), 1)
    wide = [each for each in saved if each.shape[-1:] == (config.vocab_size,) and len(each) != config.hidden_size]  # not the head
    assert {each.data_ptr() for each in wide} == {losses.logits.data_ptr()}


def test_a_method_with_a_loss_of_its_own_needs_the_models_loss(case: Case, make_recipe: MakeRecipe) -> None:
    adalora = "tune.language={method: adalora}"
    if case.section["type"] == "sft":
        case.recipe(make_recipe, adalora)
        return
    message = rf"objective\.type: adalora adds a term to the model's own loss, which {case.section['type']} replaces; use lora"
    with pytest.raises(UserError, match=message):
        case.recipe(make_recipe, adalora)


def test_accumulated_batches_give_the_gradients_of_one_large_batch(setup: Setup) -> None:
    large = setup.step(setup.batches([[0, 1, 2, 3, 4, 5]]))
    assert max(float(gradient.abs().max()) for gradient in large[2].values()) > 1e-3
    assert_same(setup.step(setup.batches([[0], [1, 2, 3], [4, 5]])), large)


def test_a_dummy_batch_adds_nothing(setup: Setup) -> None:
    real = setup.batches([[0, 1, 2]])
    assert int(setup.objective.denominator([setup.dummy])) == 0
    assert_same(setup.step([*real, dict(setup.dummy)]), setup.step(real))


@pytest.mark.parametrize("case", [each for each in CASES.values() if each.packs], ids=lambda case: case.section["type"])
def test_packed_rows_give_the_gradients_of_padded_ones(setup: Setup) -> None:
    """For the objectives that a recipe can have with `data.packing`."""
    assert_same(setup.step(setup.batches([[0, 1, 2, 3]], packed=True)), setup.step(setup.batches([[0, 1, 2, 3]])))


def test_frozen_models_are_in_eval_mode_and_get_no_gradient(setup: Setup) -> None:
    before = [copy.deepcopy(model.state_dict()) for model in setup.objective.frozen_models]
    setup.step(setup.batches([[0, 1]]))
    for model, state in zip(setup.objective.frozen_models, before, strict=True):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_plan_predicts_a_step(case: Case, make_recipe: MakeRecipe) -> None:
    """The loss runs without values of the weights and of the batch."""
    estimate = estimate_memory(case.recipe(make_recipe), tokens=60)
    assert estimate.activations > 0
    assert bool(estimate.frozen_models) == ("teacher" in case.section)


def losses_of(run: RunDirectory) -> list[dict[str, float]]:
    lines = run.metrics.read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name.startswith("loss")} for line in lines]


@pytest.mark.slow
def test_the_trainer_logs_the_loss_and_its_parts_alike_however_it_accumulates(case: Case, make_recipe: MakeRecipe) -> None:
    logs = []
    for size, accumulation in ((12, 1), (3, 4)):
        batch = f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={accumulation}"
        recipe = case.recipe(make_recipe, *batch, "train.max_steps=2")
        train(recipe, ["test"], overwrite=True)
        logs.append(losses_of(RunDirectory(Path(recipe.output_dir))))
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-3, abs=1e-6)
    assert logs[0][0].keys() == {"loss", *(f"loss_{name}" for name in case.parts)}
    if case.parts:
        total = sum(weight * logs[0][0][f"loss_{name}"] for name, weight in case.parts.items())
        assert logs[0][0]["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_run(case: Case, make_recipe: MakeRecipe) -> None:
    recipe = case.recipe(make_recipe, "train.save_strategy=steps", "train.save_steps=2", "train.max_steps=4")
    run = RunDirectory(Path(recipe.output_dir))
    train(recipe, ["test"])
    weights, losses = (run.adapter / "adapter_model.safetensors").read_bytes(), losses_of(run)
    for path in (run.adapter, run.checkpoints / "checkpoint-4"):
        shutil.rmtree(path)
    run.summary.unlink()
    train(recipe, ["test"], resume=True)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights
    assert losses_of(run) == losses


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """DDP, ZeRO-3 and FSDP2, by plain descent, whose steps are the gradients. Those of `sft` are in tests/distributed."""
    jobs, runs = [], {}
    for number, (label, case) in enumerate(CASES.items()):
        if not case.together:
            continue
        for name, strategy, size in (("one", None, 4), ("ddp", "ddp", 2), ("zero3", "zero3", 2), ("fsdp2", "fsdp2", 2)):
            out = tmp_path / f"{number}_{name}"
            settings = f"train.per_device_train_batch_size={size}", "train.optim=sgd", "train.learning_rate=0.1"
            recipe = case.recipe(make_recipe, *settings, f"output_dir={out}")
            path = tmp_path / f"{out.name}.yaml"
            path.write_text(recipe.to_yaml(), encoding="utf-8")
            runs[label, name] = RunDirectory(out)
            if strategy is None:
                train(recipe, ["test"])
            else:
                jobs.append((path, strategy))
    assert launch(jobs, tmp_path) == [True] * len(jobs)
    for (label, name), run in runs.items():
        expected, actual = (load_file(each.adapter / "adapter_model.safetensors") for each in (runs[label, "one"], run))
        assert max((expected[key] - actual[key]).abs().max() for key in expected) < 1e-5, (label, name)
        losses = [[each["loss"] for each in losses_of(each_run)] for each_run in (runs[label, "one"], run)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5), (label, name)


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
