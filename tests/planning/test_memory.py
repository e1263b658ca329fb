"""Memory estimates compared with the allocations of a real step, closed forms and bitsandbytes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import LlavaConfig

from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.fake_tensors import MemoryTracker, bnb_state_bytes, quantized_bytes
from mmtune.models.load import load_base, resolve_model
from mmtune.models.meta_model import build_meta
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision
from mmtune.planning.memory import MemoryEstimate, estimate_memory, print_estimate, suggestions
from mmtune.planning.memory_sizes import parse_memory
from mmtune.planning.weight_counts import count_weights, describe_weights
from mmtune.recipe.recipe import ModelSection, Recipe
from mmtune.utils.errors import UserError

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_estimate.py"
SUPERVISED = 8


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_estimate_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def llava(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of 0.5 million parameters with 16 image tokens."""
    written: Path = benchmark.write_base("tiny", tmp_path_factory.mktemp("llava"))
    return written


@pytest.fixture
def recipe_of(benchmark: ModuleType, llava: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(tune: str = "lora", precision: str = "fp32", **train: Any) -> Recipe:
        recipe: Recipe = benchmark.make_recipe(llava, "tiny", tune, precision, tmp_path / "run", use_cpu=True, **train)
        return recipe

    return make


def parameters(recipe: Recipe, *parts: str) -> int:
    return sum(p.numel() for name, p in build_meta(recipe.model).named_parameters() if not parts or any(x in name for x in parts))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", ["lora", "full", "projector"])
def test_the_peak_is_what_a_real_run_allocates(
    benchmark: ModuleType, recipe_of: Callable[..., Recipe], tune: str, precision: str, checkpointing: bool
) -> None:
    recipe = recipe_of(tune, precision, activation_checkpointing=checkpointing)
    measured, _ = benchmark.measured_peak(recipe, 64, SUPERVISED)
    assert estimate_memory(recipe, tokens=64, supervised=SUPERVISED).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"optim": "sgd"}, {"optim": "adafactor"}])
def test_other_ways_to_step_hold_too(benchmark: ModuleType, recipe_of: Callable[..., Recipe], settings: dict[str, Any]) -> None:
    recipe = recipe_of("full", **settings)
    measured, _ = benchmark.measured_peak(recipe, 64)
    assert estimate_memory(recipe, tokens=64).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_of_a_token_budget_holds_too(benchmark: ModuleType, recipe_of: Callable[..., Recipe], packing: bool) -> None:
    """Sixteen samples; a dense mask of the packed row would be a fifth of the peak."""
    recipe = recipe_of("lora", per_device_train_batch_size=1)
    limits = {"packing": packing, "max_tokens": 64, "tokens_per_batch": 16 * 64}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=limits)})
    measured, _ = benchmark.measured_peak(recipe, 64, SUPERVISED)
    assert estimate_memory(recipe, tokens=64, supervised=SUPERVISED).peak == pytest.approx(measured, rel=0.05)


def test_the_last_sample_of_a_packed_row_fills_it(recipe_of: Callable[..., Recipe]) -> None:
    """A row of 150 tokens holds two samples of 64 and one of 22: more than two, and less than three of 64."""

    def peak(tokens: int) -> int:
        limits = {"packing": True, "max_tokens": 64, "tokens_per_batch": tokens}
        recipe = recipe_of("lora")
        return estimate_memory(recipe.model_copy(update={"data": recipe.data.model_copy(update=limits)}), tokens=64).peak

    assert peak(128) < peak(150) < peak(192)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantized_model_holds_too(benchmark: ModuleType, recipe_of: Callable[..., Recipe], precision: str) -> None:
    recipe = recipe_of("lora", precision)
    measured, _ = benchmark.measured_peak(recipe, 64, SUPERVISED)
    assert estimate_memory(recipe, tokens=64, supervised=SUPERVISED).peak == pytest.approx(measured, rel=0.15)


def test_weights_and_states_are_their_closed_forms(recipe_of: Callable[..., Recipe]) -> None:
    # With accumulation every gradient exists while the second batch is computed.
    recipe = recipe_of("projector", "bf16", gradient_accumulation_steps=2)
    estimate = estimate_memory(recipe, tokens=64)
    projector = parameters(recipe, "multi_modal_projector")
    buffers = sum(b.numel() * b.element_size() for b in build_meta(recipe.model).buffers())
    # PEFT keeps the projector as it was beside the copy that trains.
    assert estimate.weights == 2 * parameters(recipe) + buffers
    assert estimate.trainable == estimate.gradients == 4 * projector
    assert estimate.optimizer == pytest.approx(2 * 4 * projector, abs=64)  # and a step count for each of four tensors
    assert estimate.quantization_constants == 0
    assert estimate.peak == sum(
        estimate.as_json()[kind] for kind in ("weights", "trainable", "gradients", "optimizer", "activations", "logits")
    )


def test_plain_sgd_keeps_no_states(recipe_of: Callable[..., Recipe]) -> None:
    assert estimate_memory(recipe_of("full", optim="sgd"), tokens=64).optimizer == 0


@pytest.mark.slow
def test_checkpointing_and_fewer_tokens_and_samples_take_less(recipe_of: Callable[..., Recipe]) -> None:
    whole = estimate_memory(recipe_of(), tokens=64).peak
    assert estimate_memory(recipe_of(activation_checkpointing=True), tokens=64).peak < whole
    assert estimate_memory(recipe_of(), tokens=32).peak < whole
    assert estimate_memory(recipe_of(), tokens=64, images=0).peak < whole
    assert estimate_memory(recipe_of(per_device_train_batch_size=1), tokens=64).peak < whole
    assert estimate_memory(recipe_of(), tokens=64, supervised=4).peak < whole


def test_scores_grow_with_the_supervised_tokens_alone(recipe_of: Callable[..., Recipe], llava: Path, tmp_path: Path) -> None:
    config = json.loads((llava / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = vocabulary = 50_000
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")  # no weights are needed
    shutil.copy(llava / "preprocessor_config.json", tmp_path)
    recipe = recipe_of("projector", per_device_train_batch_size=1)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(tmp_path)})})
    few, many = (estimate_memory(recipe, tokens=200, supervised=count) for count in (64, 128))
    assert few.logits and many.logits == 2 * few.logits
    assert few.logits % (4 * 64 * vocabulary) == 0  # whole fp32 copies


@pytest.mark.parametrize(("precision", "shape"), [("nf4", (192, 320)), ("int8", (48, 96)), ("nf4", (1024, 704))])
def test_stored_bytes_are_those_of_bitsandbytes(precision: str, shape: tuple[int, int]) -> None:
    functional = bitsandbytes.functional
    weight = torch.randn(shape)
    if precision == "int8":
        packed, scales, _ = functional.int8_vectorwise_quant(weight.half())
        constants = scales.nbytes
    else:
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        nested = state.state2
        constants = sum(t.nbytes for t in (state.absmax, state.code, state.offset, nested.absmax, nested.code))
    assert quantized_bytes(*shape, precision) == (packed.nbytes, constants)


@pytest.mark.parametrize(("kind", "states", "in_8bit"), [("AdamW8bit", 2, True), ("AdamW", 2, False), ("Lion8bit", 1, True)])
@pytest.mark.parametrize("shape", [(96, 80), (31, 7)])
def test_optimizer_states_are_those_of_bitsandbytes(kind: str, states: int, in_8bit: bool, shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    parameter.grad = torch.randn(shape)
    optimizer = getattr(bitsandbytes.optim, kind)([parameter])
    optimizer.step()
    states_8bit = [value for name, value in optimizer.state[parameter].items() if torch.is_tensor(value) and "qmap" not in name]
    assert bnb_state_bytes(math.prod(shape), states, in_8bit) == sum(tensor.nbytes for tensor in states_8bit)


def test_paged_states_can_leave_the_device() -> None:
    assert bnb_state_bytes(1_000_000, 2, in_8bit=True, paged=True) == 0
    assert bnb_state_bytes(5000, 2, in_8bit=True, paged=True) == 2 * (5000 + 4 * 20)


def test_a_model_of_two_parts_is_estimated_from_their_configs(tmp_path: Path) -> None:
    vision, language = write_tiny_vision("siglip", tmp_path / "vision"), write_tiny_language("qwen2", tmp_path / "language")
    for folder in (vision, language):
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    recipe = Recipe.model_validate(
        {
            "model": {"vision": str(vision), "language": str(language), "precision": "bf16"},
            "data": {"train": [{"path": "none.json", "template": "llava"}]},
            "train": {"per_device_train_batch_size": 2, "use_cpu": True},
            "output_dir": str(tmp_path / "run"),
        }
    )
    estimate = estimate_memory(recipe, tokens=40)
    assert estimate.weights > 2 * parameters(recipe, "language_model", "vision_tower")
    assert estimate.activations > 0


def test_a_storage_counts_until_its_last_tensor_is_gone() -> None:
    memory = MemoryTracker(vocabulary=7)
    weight = memory.fake(torch.empty(100, 100))
    memory.track(weight, "weights")
    with memory:
        doubled = weight * 2
        view = doubled.view(-1)
        assert memory.live["activations"] == 40_000
        del doubled
        assert memory.live["activations"] == 40_000
        del view
        scores = weight[:3, :7] + 1
    assert memory.live["activations"] == 0
    assert memory.live["logits"] == scores.nbytes == 84
    assert memory.live["weights"] == 40_000
    assert sum(memory.peak.values()) == 80_000


@pytest.mark.slow
def test_suggestions_are_estimated_and_end_with_one_that_fits(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.planning.memory.CONTEXT", 0)
    recipe = recipe_of(per_device_train_batch_size=4)
    estimate = estimate_memory(recipe, tokens=64)
    assert suggestions(recipe, estimate, estimate.peak + estimate.overhead, tokens=64) == []

    half = estimate_memory(recipe_of(per_device_train_batch_size=2, gradient_accumulation_steps=2), tokens=64)
    limit = half.peak + half.overhead
    (line,) = suggestions(recipe, estimate, limit, tokens=64)
    assert line == (f"train.per_device_train_batch_size=2 train.gradient_accumulation_steps=2  ({half.peak / 1e6:.1f} MB, fits)")


@pytest.mark.slow
def test_suggestions_are_ordered_by_their_effect_on_the_result(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(per_device_train_batch_size=4)
    estimate = estimate_memory(recipe, tokens=64)
    lines = suggestions(recipe, estimate, 10, tokens=64)
    assert lines[0].startswith("train.per_device_train_batch_size=1 train.gradient_accumulation_steps=4  (")
    assert "train.activation_checkpointing=true" in lines[1]
    assert "model.precision=" in lines[-1]
    assert all(line.endswith("still too much)") for line in lines)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("0.5gb", 5 * 10**8), ("80G", 80 * 10**9), ("512 MiB", 2**29), ("100", 100)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "0GB", "24XB", "1e9GB", "iB"])
def test_invalid_amounts_of_memory_are_rejected(text: str) -> None:
    with pytest.raises(UserError, match="24GB"):
        parse_memory(text)


def test_images_that_exceed_the_memory_are_rejected(recipe_of: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"2 image\(s\) take 32 tokens, and a sample has 32"):
        estimate_memory(recipe_of(), tokens=32, images=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"base": "nobody/has-this-model"},
            "model.base: nobody/has-this-model: no local directory",
        ),
        (
            {"vision": "nobody/tower", "language": "nobody/answering_llava"},
            "vision: no local directory nobody/tower; HF_HUB",
        ),
    ],
)
def test_a_hub_id_that_cannot_be_downloaded_is_named(model: dict[str, str], message: str, tmp_path: Path) -> None:
    data = {"train": [{"path": "none.json", "template": "llava"}]}
    recipe = Recipe.model_validate({"model": model, "data": data, "output_dir": str(tmp_path)})
    with pytest.raises(UserError, match=message):
        estimate_memory(recipe, tokens=64)


def test_the_memory_table_shows_whether_the_run_fits(capsys: pytest.CaptureFixture[str]) -> None:
    gb = 10**9
    estimate = MemoryEstimate(14 * gb, 0, gb, 0, 2 * gb, 3 * gb, gb, "backward")
    print_estimate(estimate, 24 * gb)
    shown = capsys.readouterr().out
    assert "peak (in the backward pass)" in shown and "21.00" in shown and "limit: fits" in shown
    assert "quantization" not in shown
    print_estimate(estimate, 21 * gb)
    assert "does not fit" in capsys.readouterr().out


def test_experts_are_stored_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixtral's own numbers, by hand: 3 matrices for each of 8 experts in 32 layers, of which a token uses 2."""
    LlavaConfig(vision_config={"model_type": "clip_vision_model"}, text_config={"model_type": "mixtral"}).save_pretrained(
        tmp_path
    )
    section = ModelSection(base=str(tmp_path), precision="nf4")
    counts = count_weights(section)
    expert = 32 * 3 * 4096 * 14336
    assert counts.active == counts.stored - 6 * expert
    assert counts.stored == sum(parameter.numel() for parameter in build_meta(section).parameters()) > 46e9
    first, second = describe_weights(counts, "nf4")
    assert first == f"weights: {counts.stored:,} stored, {counts.active:,} used by one token: 2 of 8 experts in 32 layers"
    assert second.startswith(f"model.precision: nf4: {8 * expert:,} weights of stacked experts stay in bf16, 90.19 GB")
    assert not list(describe_weights(replace(counts, stacks=()), "nf4"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_hold_too(benchmark: ModuleType, tmp_path: Path, precision: str) -> None:
    """LoRA keeps a changed copy of every expert of a layer for the backward pass."""
    recipe = Recipe.model_validate(
        {
            "model": {
                "vision": str(write_tiny_vision("clip", tmp_path / "clip")),
                "language": str(write_tiny_language("mixtral", tmp_path / "mixtral")),
                "chat_template": "mistral",
                "precision": precision,
            },
            "tune": {"projector": "frozen", "language": {"method": "lora", "r": 2, "target_parameters": "all-experts"}},
            "data": {"train": [{"path": "rows.json", "template": "llava"}]},
            "train": {"per_device_train_batch_size": 2, "use_cpu": True},
            "output_dir": str(tmp_path / "run"),
        }
    )
    save_checkpoint(*load_base(resolve_model(recipe.model), 0), tmp_path / "base")
    model = recipe.model.model_copy(update={"base": str(tmp_path / "base"), "vision": None, "language": None})
    recipe = recipe.model_copy(update={"model": model})
    measured, _ = benchmark.measured_peak(recipe, 64, SUPERVISED)
    assert estimate_memory(recipe, tokens=64, supervised=SUPERVISED).peak == pytest.approx(measured, rel=0.02)
