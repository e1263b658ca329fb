"""Distillation: its losses against closed forms and TRL, its teacher, and recipes that are rejected before weights load."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from mmtune.builtin import TINY_LLAVA
from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.load import ResolvedBase, load_trained
from mmtune.objectives.distillation import Distillation
from mmtune.objectives.distillation_losses import attention_divergences, divergences, hidden_state_errors
from mmtune.objectives.objective_table import build_objective
from mmtune.objectives.token_losses import CHUNK, by_chunks
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.rehearse import rehearse
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.throughput.flops import ModelFlops
from mmtune.utils.errors import RecipeValueError, UserError

MakeRecipe = Callable[..., Recipe]
EAGER = "model.attn_implementation=eager"


def distilled(teacher: str | Path = "builtin:tiny-llava", **settings: Any) -> str:
    return f"objective={json.dumps({'type': 'distillation', 'teacher': str(teacher), **settings})}"


def logits(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


# ---- losses


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_its_closed_form(beta: float, temperature: float) -> None:
    student, teacher = logits(7, 11)
    s, t = (softmax(each.numpy() / temperature, axis=-1) for each in (student, teacher))
    mixture = beta * t + (1 - beta) * s
    expected = {
        0.0: rel_entr(t, s).sum(-1),
        1.0: rel_entr(s, t).sum(-1),
    }.get(beta, beta * rel_entr(t, mixture).sum(-1) + (1 - beta) * rel_entr(s, mixture).sum(-1))
    np.testing.assert_allclose(divergences(student, teacher, beta, temperature).numpy(), expected, rtol=1e-10)


@pytest.mark.slow  # the import of TRL's trainer
@pytest.mark.filterwarnings("ignore")
def test_the_divergence_and_its_gradient_are_those_of_trl() -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = logits(2, 5, 11)
    labels = torch.tensor([[-100, 3, 4, -100, 2], [-100, -100, 1, 9, 10]])
    for beta in (0.0, 0.3, 0.5, 1.0):
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        keep = labels != -100
        loss = divergences(ours[keep], teacher[keep], beta, 2.0).sum() / 8
        reference = GKDTrainer.generalized_jsd_loss(theirs, teacher, labels, beta, 2.0, num_items_in_batch=8)
        torch.testing.assert_close(loss, reference, rtol=1e-10, atol=1e-12)
        loss.backward()
        reference.backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_the_divergence_is_computed_in_chunks_over_the_common_vocabulary() -> None:
    """Value and gradient are those of one piece; the padding of one output layer counts in neither."""
    student, teacher = logits(2 * CHUNK + 3, 7)
    rows: list[int] = []

    def compare(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        rows.append(len(one))
        return divergences(one, other, 0.5, 2.0)

    ours, whole = student.clone().requires_grad_(), student.clone().requires_grad_()
    chunked = by_chunks(compare, ours, torch.cat([teacher, torch.full((len(teacher), 3), 50.0)], dim=1))
    expected = divergences(whole, teacher, 0.5, 2.0)
    torch.testing.assert_close(chunked, expected)
    chunked.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, whole.grad)
    assert sorted(rows) == sorted(2 * [CHUNK, CHUNK, 3])  # and again in the backward pass


def test_hidden_states_and_attention_maps_by_plain_formulas() -> None:
    student, teacher = logits(6, 8)
    expected = ((student - teacher) ** 2).numpy().mean(-1)
    np.testing.assert_allclose(hidden_state_errors(student, teacher).numpy(), expected, rtol=1e-12)
    student, teacher = (each.softmax(-1) for each in logits(6, 3, 5))
    student[..., 4:], teacher[..., 4:] = 0, 0  # masked
    student, teacher = (each / each.sum(-1, keepdim=True) for each in (student, teacher))
    expected = rel_entr(teacher.numpy(), student.numpy()).sum(-1).mean(-1)
    student.requires_grad_()
    actual = attention_divergences(student, teacher)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-10)
    actual.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_loss_is_that_of_two_plain_models(make_recipe: MakeRecipe, base: Path, untrained: tuple[Any, Any]) -> None:
    """Every term at once, from whole logits, hidden states and attention maps of transformers' own models."""
    pairs = {
        "hidden_states": {"layers": [[1, 2], [-1, -1]], "weight": 3.0},
        "attention_maps": {"layers": [[0, 1]], "weight": 5.0},
    }
    recipe = make_recipe(distilled(beta=0.5, temperature=2.0, distillation_weight=0.7, crossentropy_weight=0.3, **pairs), EAGER)
    student, processor = copy.deepcopy(untrained[0]), untrained[1]
    student.set_attn_implementation("eager")
    objective = build_objective(recipe, ResolvedBase(recipe.model, recipe.model.base, student.config, processor))
    objective.load_models(recipe, torch.device("cpu"), SINGLE_PROCESS)
    encoder, samples = objective.encoder(processor, recipe.data), IndexedSamples(recipe.data.train)
    batch = objective.collator(processor)([encoder(lambda n=n: samples[n]) for n in range(4)])
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    losses = objective.compute_loss(student, objective.model_inputs(student, dict(batch)), objective.denominator([batch]))

    labels = batch.pop("labels")
    teacher, _ = load_trained(TINY_LLAVA)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (m(**batch, output_hidden_states=True, output_attentions=True) for m in (student.eval(), teacher.eval()))
    rows, places = np.nonzero((labels[:, 1:] != -100).numpy())
    count = len(rows)

    def at(tensor: torch.Tensor) -> Any:
        return tensor.double().numpy()[rows, places]

    s, t = (softmax(at(each.logits) / 2.0, axis=-1) for each in (ours, theirs))
    mixture = (s + t) / 2
    terms = {"distillation": (rel_entr(t, mixture).sum() + rel_entr(s, mixture).sum()) / 2 / count}
    targets = labels.numpy()[rows, places + 1]
    terms["crossentropy"] = -log_softmax(at(ours.logits), axis=-1)[np.arange(count), targets].mean()
    differences = [at(ours.hidden_states[a]) - at(theirs.hidden_states[b]) for a, b in ((1, 2), (-1, -1))]
    terms["hidden_states"] = np.mean([(difference**2).mean() for difference in differences])
    maps = [at(each.attentions[layer].transpose(1, 2)) for each, layer in ((ours, 0), (theirs, 1))]
    terms["attention_maps"] = rel_entr(maps[1], maps[0]).sum(-1).mean()
    assert {name: float(part) for name, part in losses.parts.items()} == pytest.approx(terms, rel=1e-4)
    weights = {"distillation": 0.7, "crossentropy": 0.3, "hidden_states": 3.0, "attention_maps": 5.0}
    assert float(losses.loss) == pytest.approx(sum(weights[name] * value for name, value in terms.items()), rel=1e-4)


# ---- the teacher


@pytest.mark.slow
def test_a_run_an_adapter_and_a_model_can_teach(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    """The base with another adapter, by each of its paths; the released adapter is the student's alone."""
    taught = make_recipe(f"output_dir={tmp_path / 'teacher'}")
    train(taught, ["test"])
    run = RunDirectory(tmp_path / "teacher")
    losses = []
    for teacher in (run.path, run.adapter, base):
        recipe = make_recipe(distilled(teacher), "train.max_steps=1")
        train(recipe, ["test"], overwrite=True)
        student = RunDirectory(Path(recipe.output_dir))
        losses.append(json.loads(student.metrics.read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1] > 1e-3
    assert losses[2] == pytest.approx(0, abs=1e-6)  # the student has not moved yet
    assert sorted(path.name for path in student.adapter.iterdir()) == sorted(path.name for path in run.adapter.iterdir())


def test_a_bf16_student_has_a_bf16_teacher(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(distilled(), "model.precision=bf16", "train.max_steps=1")
    train(recipe, ["test"])
    objective = Distillation(recipe.objective)  # type: ignore[arg-type]
    objective.load_models(recipe, torch.device("cpu"), SINGLE_PROCESS)
    assert {parameter.dtype for model in objective.frozen_models for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_the_plan_counts_the_teacher(make_recipe: MakeRecipe, base: Path) -> None:
    teacher = sum(parameter.numel() for parameter in load_trained(base)[0].parameters())
    alone, both = (estimate_memory(make_recipe(*extra), tokens=60) for extra in ((), (distilled(base),)))
    assert alone.frozen_models == 0
    assert both.frozen_models == pytest.approx(4 * teacher, rel=0.01)
    assert both.peak > alone.peak + both.frozen_models


def test_the_operations_of_the_teacher_are_counted(make_recipe: MakeRecipe, untrained: tuple[Any, Any]) -> None:
    recipe = make_recipe(distilled(), EAGER)
    student, processor = copy.deepcopy(untrained[0]), untrained[1]
    student.set_attn_implementation("eager")
    objective = build_objective(recipe, ResolvedBase(recipe.model, recipe.model.base, student.config, processor))
    objective.load_models(recipe, torch.device("cpu"), SINGLE_PROCESS)
    (teacher,) = objective.frozen_models
    teacher.set_attn_implementation("eager")  # type: ignore[operator]  # torch counts no fused attention on a CPU
    encoder, samples = objective.encoder(processor, recipe.data), IndexedSamples(recipe.data.train)
    batch = objective.collator(processor)([encoder(lambda: samples[0])])
    flops = ModelFlops(teacher)
    flops.add(batch.pop("sizes"), True)
    inputs = objective.model_inputs(student, {n: v for n, v in batch.items() if isinstance(v, torch.Tensor)})
    with FlopCounterMode(display=False) as counter, flops.record_costs(inputs), torch.no_grad():
        objective.compute_loss(student, inputs, objective.denominator([batch]))
    # Both models have the same layers, and neither has a backward pass here.
    assert flops.take() == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


@pytest.mark.slow
def test_a_rehearsal_has_a_tiny_teacher(
    make_recipe: MakeRecipe, tiny_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = f"model={{vision: {tiny_checkpoints / 'clip'}, language: {tiny_checkpoints / 'llama'}}}"
    for model in ((), (parts,)):
        pairs = {"hidden_states": {"layers": [[30, -28]]}}
        rehearse(make_recipe(*model, distilled("some/teacher-of-the-hub", **pairs)))
        assert "rehearsal passed" in capsys.readouterr().out


# ---- recipes that are rejected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("objective={type: destillation}",),
            r"objective\.type: expected one of sft, distillation.*, got 'destillation'; did you mean",
        ),
        (("objective={type: distillation}",), r"objective\.teacher: required"),
        (("objective={type: sft, teacher: x}",), r"objective\.teacher: unknown key"),
        (
            ("objective=distillation",),
            r"objective=distillation: expected a mapping, such as \{type: distillation\}, got 'distillation'",
        ),
        (("objective=[sft]",), r"objective=\[sft\]: expected a mapping, such as \{type: sft\}, got \["),
        (
            ("objective.beta=0.5", "objective.tmperature=2"),
            r"objective\.beta=0\.5: a setting of the objective distillation; expected objective\.type beside it, got none\n"
            r"command line: objective\.tmperature=2: unknown key",
        ),
        ((distilled(temperature=0),), r"objective\.temperature: expected more than 0, got 0"),
        ((distilled(beta=2),), r"objective\.beta: expected at most 1, got 2"),
        ((distilled(distillation_weight=0),), r"objective\.distillation_weight: 0 leaves nothing of the teacher"),
        ((distilled(hidden_states={"layers": []}),), r"objective\.hidden_states\.layers: expected a list with at least one item"),
        ((distilled(hidden_states={"layers": [[1]]}),), r"objective\.hidden_states\.layers\.0"),
        (
            (distilled(attention_maps={"layers": [[0, 0]]}),),
            r"command line: objective=.*attention_maps.*expected model\.attn_implementation: eager, got null",
        ),
        (
            (distilled(attention_maps={"layers": [[0, 0]]}), EAGER, "tune.language={method: prompt_tuning}"),
            r"objective\.attention_maps: prompt_tuning adds virtual tokens",
        ),
        (
            (distilled(attention_maps={"layers": [[0, 0]]}), EAGER, "data.packing=true", "data.max_tokens=99", "train={}"),
            r"attention_maps.*packed rows have maps over several samples; take data\.packing out",
        ),
    ],
)
def test_unsupported_teacher_settings_are_rejected(make_recipe: MakeRecipe, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(*overrides)


def rejected(recipe: Recipe, untrained: tuple[Any, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeValueError, match=message) as error:
        model, processor = untrained
        build_objective(recipe, ResolvedBase(recipe.model, recipe.model.base, model.config, copy.deepcopy(processor)))
    assert error.value.key == key


def test_layers_that_cannot_be_compared(make_recipe: MakeRecipe, untrained: tuple[Any, Any], tmp_path: Path) -> None:
    layers = make_recipe(distilled(hidden_states={"layers": [[1, 1], [2, 9]]}))
    rejected(layers, untrained, "objective.hidden_states.layers.1", "the teacher has hidden_states -6 to 5, got 9")
    maps = make_recipe(distilled(attention_maps={"layers": [[5, 0]]}), EAGER)
    rejected(maps, untrained, "objective.attention_maps.layers.0", "the student has attention_maps -5 to 4, got 5")
    wide = shutil.copytree(TINY_LLAVA, tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    width, heads = config["text_config"]["hidden_size"], config["text_config"]["num_attention_heads"]
    config["text_config"] |= {"hidden_size": 2 * width, "num_attention_heads": 2 * heads}
    (wide / "config.json").write_text(json.dumps(config))
    states = make_recipe(distilled(wide, hidden_states={"layers": [[1, 1]]}))
    message = f"expected one hidden_size, got {width} in the student and {2 * width} in the teacher"
    rejected(states, untrained, "objective.hidden_states", message)
    maps = make_recipe(distilled(wide, attention_maps={"layers": [[1, 1]]}), EAGER)
    message = f"expected one num_attention_heads, got {heads} in the student and {2 * heads} in the teacher"
    rejected(maps, untrained, "objective.attention_maps", message)


def test_a_teacher_with_another_vocabulary_or_image_processor(
    make_recipe: MakeRecipe, untrained: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = untrained[0], copy.deepcopy(untrained[1])
    processor.tokenizer.add_tokens(["<new>"])
    save_checkpoint(model, processor, tmp_path / "words")
    message = (
        r"expected the student's vocabulary \(\d+ tokens\), got another one .* '<new>' is missing in the student's and \d+ in"
    )
    rejected(make_recipe(distilled(tmp_path / "words")), untrained, "objective.teacher", message)
    processor = copy.deepcopy(untrained[1])
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    save_checkpoint(model, processor, tmp_path / "colours")
    message = "prepares an image differently from the student's: pixel_values"
    rejected(make_recipe(distilled(tmp_path / "colours")), untrained, "objective.teacher", message)


def test_a_teacher_without_a_processor_or_with_a_damaged_config(
    make_recipe: MakeRecipe, untrained: tuple[Any, Any], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_LLAVA / name, tmp_path)
    rejected(make_recipe(distilled(tmp_path)), untrained, "objective.teacher", "cannot load its processor")
    (tmp_path / "config.json").write_text("{")
    rejected(make_recipe(distilled(tmp_path)), untrained, "objective.teacher", rf"teacher: {tmp_path}: .*config")
    recipe = make_recipe(distilled(tmp_path))
    with pytest.raises(RecipeValueError, match=rf"teacher: {tmp_path}: .*config"):  # in the plan too
        Distillation(recipe.objective).build_meta_models(recipe)  # type: ignore[arg-type]


@pytest.mark.parametrize("language_only", [False, True])
def test_a_checkpoint_that_another_tool_has_quantized(
    language_only: bool, make_recipe: MakeRecipe, untrained: tuple[Any, Any], tmp_path: Path
) -> None:
    """A quantized language model teaches; a quantized vision encoder is an error, not a failed assertion."""
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"] if language_only else None
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(tmp_path)
    untrained[1].save_pretrained(tmp_path)
    recipe = make_recipe(distilled(tmp_path))
    objective = Distillation(recipe.objective)  # type: ignore[arg-type]
    message = r"expected only the language model quantized, got model\.vision_tower"
    with nullcontext() if language_only else pytest.raises(RecipeValueError, match=message):
        objective.load_models(recipe, torch.device("cpu"), SINGLE_PROCESS)


def test_a_teacher_that_cannot_read_packed_rows(
    make_recipe: MakeRecipe, base: Path, untrained: tuple[Any, Any], tmp_path: Path
) -> None:
    """Its virtual tokens would come before the first sample only."""
    untrained[1].save_pretrained(tmp_path / "prompts")
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": str(base)}
    (tmp_path / "prompts" / "adapter_config.json").write_text(json.dumps(config))
    packed = ("data.packing=true", "data.max_tokens=99", "train={max_steps: 1}")
    message = "packing is not supported: prompt_tuning adds its virtual tokens only before the first sample"
    rejected(make_recipe(distilled(tmp_path / "prompts"), *packed), untrained, "objective.teacher", message)


def test_recipe_check_compares_the_teacher_and_names_the_line(
    make_recipe: MakeRecipe, untrained: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = copy.deepcopy(untrained[1])
    processor.tokenizer.add_tokens(["<new>"])
    save_checkpoint(untrained[0], processor, tmp_path / "words")
    path = tmp_path / "checked.yaml"
    for teacher, code in (("builtin:tiny-llava", 0), (tmp_path / "words", 2)):
        path.write_text(make_recipe(distilled(teacher)).to_yaml(), encoding="utf-8")
        assert entry_point(["recipe", "check", str(path)]) == code
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "teacher:" in text)
    assert f"checked.yaml:{line}: objective.teacher: expected the student's vocabulary" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_named_with_its_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("train.max_steps=1")
    path = tmp_path / "named.yaml"
    path.write_text(recipe.to_yaml().replace("  type: sft", "  type: distillation\n  teacher: ./none"), encoding="utf-8")
    with pytest.raises(UserError, match=r"named\.yaml:\d+: objective\.teacher: .*none"):
        train(load_recipe(path), ["test"])
