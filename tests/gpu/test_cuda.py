"""CUDA: every precision with and without gradient checkpointing, compared with fp32 on the CPU."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.models import packed_attention
from mmtune.models.load import load_trained
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.recipe import Recipe
from mmtune.release.merge import merge, parity_samples
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.profiling.step_profiler import TRACED_STEPS, WARMUP

pytestmark = pytest.mark.gpu

TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2, "int8": 5e-2, "nf4": 2e-1}
"""Largest allowed difference from the losses of three steps in fp32 on the CPU."""


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 off, so that fp32 is fp32; torch computes convolutions with it by default, products without it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.get_float32_matmul_precision() == "highest"


def losses(recipe: Recipe) -> list[float]:
    train(recipe, ["test"])
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_answers_and_merges_on_cuda(
    make_recipe: Callable[..., Recipe], tmp_path: Path, precision: str, checkpointing: str
) -> None:
    expected = losses(make_recipe(f"output_dir={tmp_path / 'cpu'}"))
    settings = ("train.use_cpu=false", f"model.precision={precision}", f"train.activation_checkpointing={checkpointing}")
    recipe = make_recipe(f"output_dir={tmp_path / 'cuda'}", *settings)
    assert losses(recipe) == pytest.approx(expected, abs=TOLERANCES[precision])
    model, processor = load_trained(tmp_path / "cuda")
    assert len(
        generate_answers(model.to("cuda") if precision in ("fp32", "bf16") else model, processor, parity_samples(recipe, 4), 4, 4)
    )
    parity = merge(tmp_path / "cuda", tmp_path / "merged", count=4)
    assert parity.merge_unrounded_difference < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_rows_on_cuda_have_the_losses_of_packed_rows_on_the_cpu(
    make_recipe: Callable[..., Recipe], tmp_path: Path, precision: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sdpa in bf16, torch's kernel for samples of variable length computes the attention."""
    kernel, calls = packed_attention.varlen_attn, []

    def count(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return kernel(*arguments, **settings)

    monkeypatch.setattr(packed_attention, "varlen_attn", count)
    train = "train={max_steps: 3, learning_rate: 5e-3, logging_steps: 1, use_cpu: true, seed: 0}"
    packing = ("data.packing=true", "data.max_tokens=512", train)
    expected = losses(make_recipe(f"output_dir={tmp_path / 'cpu'}", *packing))
    settings = ("train.use_cpu=false", f"model.precision={precision}", f"model.attn_implementation={attention}")
    recipe = make_recipe(f"output_dir={tmp_path / 'cuda'}", *packing, *settings)
    assert losses(recipe) == pytest.approx(expected, abs=TOLERANCES[precision])
    assert bool(calls) == (attention == "sdpa" and precision == "bf16")


@pytest.mark.parametrize("method", ["bottleneck", "gated_prefix", "prompt_tuning", "prefix_tuning", "ia3", "oft", "vera"])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_methods_train_on_cuda(make_recipe: Callable[..., Recipe], method: str, precision: str) -> None:
    settings = (f"tune.language={{method: {method}}}", "train.use_cpu=false", f"model.precision={precision}")
    assert all(0 < loss < 10 for loss in losses(make_recipe(*settings)))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_the_memory_estimate_holds_on_cuda(make_recipe: Callable[..., Recipe], precision: str) -> None:
    recipe = make_recipe("train.use_cpu=false", f"model.precision={precision}", "train.per_device_train_batch_size=12")
    predicted = estimate_memory(recipe, tokens=60).peak
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(recipe, ["test"])
    assert torch.cuda.max_memory_allocated() < 1.5 * predicted + 64e6  # a model of 8 MB: cuBLAS's workspaces are most of it


def test_a_profile_on_cuda_adds_up_and_changes_no_loss(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    settings = ("train.use_cpu=false", f"train.max_steps={WARMUP + 2 + 1 + TRACED_STEPS}")
    expected = losses(make_recipe(f"output_dir={tmp_path / 'plain'}", *settings))
    recipe = make_recipe(f"output_dir={tmp_path / 'profiled'}", *settings)
    train(recipe, ["test"], profile=2)
    run = RunDirectory(Path(recipe.output_dir))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(expected, abs=1e-5)
    profile = json.loads(run.profile.read_text())
    assert profile["device"] == "cuda" and not profile["notes"]
    assert sum(part["seconds"] for part in profile["parts"].values()) == pytest.approx(profile["step_seconds"], rel=1e-9)
    parts = ("vision", "projector", "language", "loss", "backward", "optimizer")
    assert all(profile["parts"][part]["seconds"] > 0 for part in parts)
    events = json.loads(gzip.decompress(run.trace.read_bytes()))["traceEvents"]
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("mmtune step")]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert len(marks) == TRACED_STEPS and kernels
    lanes = [event for event in events if event.get("cat") == "mmtune" and event["name"] == "backward"]
    for lane in lanes:  # the clocks of the events and of the trace agree: a backward pass has kernels in it
        assert any(lane["ts"] <= kernel["ts"] <= lane["ts"] + lane["dur"] for kernel in kernels)
