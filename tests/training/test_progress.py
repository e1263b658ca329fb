"""Metrics of a run: correct values, in one place, sent only to the trackers of the recipe."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packing_models import samples, tiny
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, TrainerControl, TrainerState, TrainingArguments

from mmtune.data.batching.collate import Collator, RowSize
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.objectives.sft import score_supervised_only
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.callbacks import RecordMetrics, progress_line
from mmtune.training.throughput import progress
from mmtune.training.throughput.cpu_wait import CpuWait
from mmtune.training.throughput.flops import ModelFlops, PeakFlops, peak_flops
from mmtune.training.throughput.progress import TrainingProgress, format_duration


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------ floating-point operations

TEXT_LINEAR = r".*(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj"


def tuned(family: str, projector: bool) -> Any:
    """The text tuned by LoRA, the tower frozen, the projector in full or not; eager, as torch counts no fused one on CPUs."""
    model = tiny(family, "eager")
    names = [name for name, _ in model.named_modules() if name.endswith(("multi_modal_projector", "visual.merger", "connector"))]
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=TEXT_LINEAR, modules_to_save=names[:1] if projector else None)
    ).train()


def step(model: Any, rows: Sequence[dict[str, torch.Tensor]], counted: ModelFlops) -> tuple[float | None, int]:
    """The operations of a forward and backward pass over a batch: ours, and those that torch counts as they happen."""
    batch = Collator(0)(rows)
    images = "pixel_values" in batch
    counted.add(batch.pop("sizes"), images)
    inputs = score_supervised_only({key: value for key, value in batch.items() if key not in ("rows", "faults")})
    with FlopCounterMode(display=False) as counter:
        with counted.record_costs(inputs):
            loss = model(**inputs).loss
        loss.backward()
    return counted.take(), counter.get_total_flops()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("projector", [True, False])
def test_operations_are_those_that_torch_counts(family: str, projector: bool) -> None:
    model = tuned(family, projector)
    counted = ModelFlops(model)
    rows = samples(family)
    ours, happened = step(model, rows[:1], counted)
    # without the projector the first layer's attention needs no gradient of its own in part, which is a half percent here
    assert ours == pytest.approx(happened, rel=1e-9 if projector else 1e-2)
    for row in (rows[1], rows[3], rows[2]):  # no image, a larger one, two: predicted from the first pass with and without
        ours, happened = step(model, [row], counted)
        assert ours == pytest.approx(happened, rel=0.03)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_operations_of_a_model_tuned_in_full(family: str) -> None:
    model = tiny(family, "eager")
    ours, happened = step(model, samples(family)[:1], ModelFlops(model))
    assert ours == pytest.approx(happened, rel=1e-9)


def test_operations_by_hand() -> None:
    """A frozen Llama of two layers, LoRA of rank 4 on all of it, a frozen tower: text alone, so that the tower takes no part."""
    counted = ModelFlops(model := tuned("llava", False))
    ours, _ = step(model, samples("llava")[1:2], counted)
    n, d, kv, mlp, rank, layers = 14, 32, 16, 64, 4, 2
    weights = d * d + 2 * d * kv + d * d + 3 * d * mlp
    factors = rank * (2 * (d + d) + 2 * (d + kv) + 3 * (d + mlp))
    head = 13 * 32 * 64  # 13 of 14 tokens are predicted
    inputs = 3 * d * rank + d * d + 2 * d * kv  # q, k and v of the first layer: what they read needs no gradient
    expected = 2 * n * (layers * (2 * weights + 3 * factors) - inputs) + 2 * 2 * head + layers * 3 * 4 * n * n * d
    assert ours == pytest.approx(expected, rel=0.02)


def test_fused_attention_counts_as_products_do() -> None:
    counts = []
    for attention in ("eager", "sdpa"):
        model = tiny("smolvlm", attention)
        counts.append(step(model, samples("smolvlm")[3:], ModelFlops(model))[0])
    assert counts[0] == counts[1]


def test_neither_padding_nor_recomputation_counts() -> None:
    model, rows = tuned("llava", True), samples("llava")[::3]
    assert rows[0]["input_ids"].shape != rows[1]["input_ids"].shape
    counted = ModelFlops(model)
    alone = [step(model, [row], counted) for row in rows]
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # as training does
    together, happened = step(model, rows, ModelFlops(model))
    assert together == pytest.approx(sum(ours or 0 for ours, _ in alone), rel=1e-9)
    assert happened > 1.2 * sum(torchs for _, torchs in alone)


@pytest.mark.parametrize("full", [False, True])
def test_experts_count_by_those_that_a_token_uses(full: bool) -> None:
    model = tiny("qwen3_vl_moe", "eager")
    model.set_experts_implementation("eager")  # torch counts its products
    if not full:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TEXT_LINEAR, modules_to_save=["visual.merger"])).train()
    assert ModelFlops.supports(model)
    ours, happened = step(model, samples("qwen3_vl_moe")[:1], ModelFlops(model))
    assert ours == pytest.approx(happened, rel=5e-3)  # without the routers


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("a GPU of next year", None),
    ],
)
def test_a_peak_is_known_or_it_is_not(monkeypatch: pytest.MonkeyPatch, name: str, half: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"))
    assert (peak and peak.half) == half
    assert peak_flops(torch.device("cpu")) is None


def test_a_peak_is_that_of_the_format() -> None:
    assert [PeakFlops(3, 2, 1).at(*how) for how in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))] == [
        3e12,
        2e12,
        1e12,
    ]
    assert PeakFlops(3, None, 1).at(torch.float32, True) == 1e12


# ----------------------------------------------------------------------------------------------------------------- figures


class Clock:
    """A clock that advances on request."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Together(DistributedContext):
    """Two processes, of which the other returns fixed objects."""

    other: dict[type, Any]

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.other[type(value)]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def begun(
    dist: DistributedContext, state: TrainerState, monkeypatch: pytest.MonkeyPatch, peak: PeakFlops | None = None
) -> TrainingProgress:
    monkeypatch.setattr(progress, "peak_flops", lambda device: peak)
    arguments: Any = SimpleNamespace(device=torch.device("cpu"), torch_compile=False, tf32=None)
    callback = TrainingProgress([tuned("llava", True)], arguments, dist)
    callback.on_train_begin(arguments, state, TrainerControl())
    return callback


def test_metrics_cover_all_processes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    dist = Together(0, 2)
    dist.__dict__["other"] = {
        int: 300,
        tuple: (6, 0.5, 0.25, 9e9, 3e12),
    }  # tokens; samples, waits for data and for a core, memory, operations
    state = TrainerState(max_steps=100)
    progress = begun(dist, state, monkeypatch, PeakFlops(9, None, 1))
    monkeypatch.setattr(ModelFlops, "take", lambda self: 1e12)
    with progress.data_wait():
        clock.now += 1
    progress.add([RowSize(40, 9, 0), RowSize(60, 9, 0)], images=False)
    clock.now += 3
    state.global_step = 10
    figures = progress.metrics(state)
    assert figures["tokens"] == state.num_input_tokens_seen == 400
    assert (figures["tokens_per_second"], figures["samples_per_second"]) == (100, 2)
    assert figures["data_wait"] == 0.5  # the other's, for this one waited a quarter
    assert figures["cpu_wait"] == 0.25  # the other's
    assert figures["resident_memory_mb"] == 9e9
    assert figures["mfu"] == 0.5  # 4e12 operations in 4 s on two devices that can do 1e12
    assert (figures["seconds"], figures["seconds_left"]) == (4, 36)
    dist.__dict__["other"] |= {tuple: (0, 0.0, None, 0.0, None)}
    clock.now += 1
    assert "mfu" not in progress.metrics(state)


def test_the_wait_for_a_core_is_that_of_the_thread_that_waited_longest(tmp_path: Path) -> None:
    def count(**threads: tuple[int, int]) -> None:
        for name, (run, delay) in threads.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "schedstat").write_text(f"{run} {delay} 7\n")

    assert CpuWait(tmp_path).take() is None  # no kernel that counts
    count(t1=(9_000_000_000, 4_000_000_000))
    waits = CpuWait(tmp_path)
    assert waits.take() == 0  # what was before is not counted, nor is a thread that runs or sleeps
    count(t1=(9_000_000_001, 4_500_000_000), t2=(1, 1_250_000_000))
    assert waits.take() == 1.25
    shutil.rmtree(tmp_path / "t2")
    count(t1=(9_000_000_001, 4_750_000_000))
    assert waits.take() == 0.25


def test_the_time_left_follows_the_recent_rate_after_a_resume_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainerState(max_steps=1000, global_step=500, num_input_tokens_seen=7)
    progress = begun(SINGLE_PROCESS, state, monkeypatch)

    def log(seconds: float) -> float:
        clock.now += seconds
        state.global_step += 10
        return progress.metrics(state)["seconds_left"]

    assert log(20) == 2 * 490
    assert [log(10) for _ in range(10)][-1] == 390  # the first ten steps are forgotten
    assert state.num_input_tokens_seen == 7


def test_times_and_lines_are_short() -> None:
    assert [format_duration(each) for each in (0.2, 59.4, 59.6, 3723, 360_000)] == [
        "0 s",
        "59 s",
        "0:01:00",
        "1:02:03",
        "100:00:00",
    ]
    logs = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_second": 12345.6, "data_wait": 0.04, "mfu": 0.412}
    line = progress_line({**logs, "accelerator_memory_mb": 67_890.0, "seconds_left": 3723})
    assert line == "1:02:03 left  loss 1.2346  lr 2.0e-04  12,346 tokens/s  67.9 GB  data wait 4%  MFU 41%"
    busy = progress_line({**logs, "cpu_wait": 0.449, "resident_memory_mb": 800.0, "seconds_left": 1})
    assert "lr 2.0e-04  CPU wait 45%  12,346 tokens/s" in busy
    assert "CPU wait" not in progress_line({**logs, "cpu_wait": 0.09, "resident_memory_mb": 800.0, "seconds_left": 1})
    assert progress_line({**logs, "resident_memory_mb": 800.0, "seconds_left": 1}, room=10) == "1 s left"
    assert "MFU" not in progress_line(
        {**{k: v for k, v in logs.items() if k != "mfu"}, "resident_memory_mb": 800.0, "seconds_left": 1}
    )


@pytest.mark.parametrize(("columns", "last"), [(40, "left"), (60, "lr 2.0e-04"), (80, "12,346 tokens/s"), (120, "MFU 41%")])
def test_the_progress_line_is_fitted_to_the_terminal(
    columns: int, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    state = TrainerState(max_steps=1200, global_step=40, is_world_process_zero=True)
    logs = {"loss": 1.23456, "learning_rate": 2e-4, "tokens_per_second": 12345.6, "data_wait": 0.04, "mfu": 0.412}
    logs |= {"accelerator_memory_mb": 67_890.0, "seconds_left": 3723}
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        record, args = RecordMetrics(tmp_path / "metrics.jsonl"), TrainingArguments(disable_tqdm=False)
        record.on_train_begin(args, state, TrainerControl())
        record.on_log(args, state, TrainerControl(), logs)
        record.on_train_end(args, state, TrainerControl())
        terminal.close()
        output = b""
        with contextlib.suppress(OSError):  # EIO at the end: the other side is closed
            while chunk := screen.read(4096):
                output += chunk
    line = [part.strip() for part in output.decode().split("\r") if part.strip()][-1]
    assert line.startswith("40/1200 |")
    assert "|, 1:02:03 left" in line
    assert line.endswith(last)


def test_a_run_counts_its_rows_without_padding(
    make_recipe: Callable[..., Recipe], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processor = AutoProcessor.from_pretrained(str(base))
    recipe = make_recipe("train.save_strategy=steps", "train.save_steps=2", "train.logging_steps=3")
    rows = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)]
    lengths = [row["input_ids"].shape[1] for row in rows]
    assert len(set(lengths)) > 1
    train(recipe, ["test"])
    (record,) = metrics(recipe)  # three steps of four rows: each of the twelve once
    assert record["tokens"] == sum(lengths)
    assert record["tokens_per_second"] * record["seconds"] == pytest.approx(sum(lengths), rel=0.01)
    assert record["samples_per_second"] * record["seconds"] == pytest.approx(12, rel=0.01)
    assert 0 < record["data_wait"] < 1
    assert record["resident_memory_mb"] > 50
    assert record["seconds_left"] == 0
    assert "mfu" not in record  # a CPU's peak is not known
    assert f"step 3/3  {progress_line(record)}" in capsys.readouterr().out
    run = RunDirectory(Path(recipe.output_dir))
    tokens_seen = json.loads((run.checkpoints / "checkpoint-2" / "trainer_state.json").read_text())["num_input_tokens_seen"]
    for path in (run.summary, run.metrics):
        path.unlink()
    run.metrics.touch()
    monkeypatch.setattr(progress, "peak_flops", lambda device: PeakFlops(1, None, 1e-3))
    train(recipe, ["test"], resume=run.checkpoints / "checkpoint-2")
    (record,) = metrics(recipe)
    assert (record["step"], record["tokens"]) == (3, sum(lengths))  # a checkpoint between two logs has them all
    assert 0 < tokens_seen < sum(lengths)
    assert record["tokens_per_second"] * record["seconds"] == pytest.approx(sum(lengths) - tokens_seen, rel=0.01)
    assert record["mfu"] > 0
