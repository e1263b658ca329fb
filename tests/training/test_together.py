"""Multi-process training: stop and resume, mixed modalities, and the memory of a sharded model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launched import launch, launcher
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mmtune.builtin.tiny_checkpoint import build_untrained
from mmtune.models.assemble import assemble
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.load import load_trained
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision
from mmtune.recipe.recipe import load_recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train

STEPS = 5
STOPPED = 4
"""The step at which early stopping ends the runs that are stopped and resumed: the first was the best one."""


def recipe(folder: Path, shallow: Path, rows: Path, name: str, **changes: Any) -> Path:
    """Written as JSON, which is YAML."""
    document = {
        "model": {"base": str(shallow), "precision": "fp32"},
        "tune": {"language": {"method": "lora", "r": 4, "lora_dropout": 0.2}},
        "data": {"train": [{"path": str(rows), "template": "llava", "media_root": "/"}], **changes.pop("data", {})},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "disable_tqdm": True,
            **changes.pop("train", {}),
        },
        "output_dir": str(folder / name),
    }
    if (questions := changes.pop("held_out", None)) is not None:
        source = {"path": str(questions), "template": "llava", "limit": 3}
        document["evaluate"] = {"data": [source], "before": False, "max_new_tokens": 1, "leakage": "warn"}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mixed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows, by chance with a picture or without."""
    pictures = json.loads(rows.read_text(encoding="utf-8"))
    draw = random.Random(0)
    row_list = []
    for number in range(200):
        row = draw.choice(pictures)
        turns = [{"from": "human", "value": f"count to {number}"}, {"from": "gpt", "value": f"{number} it is"}]
        with_picture = {"image": str(rows.parent / row["image"]), "conversations": row["conversations"]}
        row_list.append({"id": f"r{number}", **(with_picture if draw.random() < 0.5 else {"conversations": turns})})
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(row_list), encoding="utf-8")
    return path


LAYOUTS = {"DDP": "ddp", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
READ = {"indexed": {}, "streamed": {"stream": True, "shuffle_window": 8}}
WORSE = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "best",
    "save_total_limit": 1,  # the newest checkpoint, and the best one
    "load_best_model_at_end": True,
    "greater_is_better": True,  # of the loss, which falls
    "early_stopping_patience": 3,
}
TOO_FAR = {"learning_rate": 1e38, "max_grad_norm": 0.0}
RESUMED = [("DDP", "indexed"), ("ZeRO-2", "streamed"), ("ZeRO-3", "indexed")]


@pytest.fixture(scope="module")
def stopped(shallow: Path, rows: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """The outcomes of an uninterrupted run, of one that was stopped and of its continuation, and the two runs."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs: list[Any] = []
    for strategy, read in RESUMED:
        whole, broken = (
            recipe(folder, shallow, mixed, f"{strategy}_{read}_{name}", data=READ[read], train=WORSE, held_out=rows)
            for name in ("whole", "broken")
        )
        jobs += [(whole, LAYOUTS[strategy]), (broken, LAYOUTS[strategy], 3), (broken, LAYOUTS[strategy], "resume")]
    for strategy in ("ZeRO-2", "ZeRO-3"):
        far = recipe(folder, shallow, mixed, f"{strategy}_far", data={"max_nonfinite_steps": 1}, train=TOO_FAR)
        jobs.append((far, LAYOUTS[strategy]))
    done = launch(jobs, folder)
    return {("far", "away"): done[3 * len(RESUMED) :]} | {
        key: [*done[3 * number : 3 * number + 3], *(job[0].with_suffix("") for job in jobs[3 * number : 3 * number + 2])]
        for number, key in enumerate(RESUMED)
    }


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "read"), RESUMED)
def test_two_processes_resume_bit_for_bit(strategy: str, read: str, stopped: dict[tuple[str, str], list[Any]]) -> None:
    """The second process gets SIGTERM in the third step: both finish it and save. The best step is the first."""
    whole, ended, resumed, unbroken, broken = stopped[strategy, read]
    assert whole is True, whole
    assert "by SIGTERM after step 3" in str(ended)
    assert resumed is True, resumed
    runs = [RunDirectory(unbroken), RunDirectory(broken)]
    adapters = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    figures = [[json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()] for run in runs]
    assert [record["step"] for record in figures[1]] == [step for step in range(1, STOPPED + 1) for _ in ("loss", "eval_loss")]
    for one, two in zip(*figures, strict=True):
        names = ("loss", "grad_norm", "tokens", "eval_loss")
        assert [one.get(name) for name in names] == [two.get(name) for name in names]
    for run in runs:
        assert run.read_summary()["best_step"] == 1
        best = load_file(run.checkpoints / "checkpoint-1" / "adapter_model.safetensors")
        assert all(
            torch.equal(tensor, best[name]) for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items()
        )
    assert load_trained(broken / "checkpoints" / "checkpoint-3")[0].peft_config  # an adapter as any other


@pytest.mark.slow
def test_deepspeed_leaves_out_a_step_that_is_not_finite(stopped: dict[tuple[str, str], list[Any]]) -> None:
    """The first step goes so far that the second has no finite gradient, nor has the third."""
    for output in stopped["far", "away"]:
        assert str(output).startswith("CheckFailed: the gradients of step 3 are not finite, after 1 that were skipped")


@pytest.mark.slow
def test_a_model_assembled_at_zero_3_is_saved_as_one_process_saves_it(shallow: Path, mixed: Path, tmp_path: Path) -> None:
    """The base beside an adapter, and a model that was tuned in full."""
    parts = {
        "vision": str(write_tiny_vision("clip", tmp_path / "clip")),
        "language": str(write_tiny_language("qwen3", tmp_path / "qwen3")),
    }
    paths = []
    for name, tune in {"adapter": {"language": {"method": "lora"}}, "full": {"language": "full", "vision": "full"}}.items():
        path = recipe(tmp_path, shallow, mixed, name, train={"max_steps": 1})
        document = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**document, "model": {**parts, "precision": "fp32"}, "tune": tune}), encoding="utf-8")
        paths.append((path, "zero3"))
    assert launch(paths, tmp_path) == [True, True]
    save_checkpoint(*assemble(parts["vision"], parts["language"], seed=42), tmp_path / "alone")
    alone, base, full = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "adapter/base", "full/model"))
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in alone
    assert alone.keys() == base.keys() == full.keys()
    assert all(torch.equal(alone[name], base[name]) for name in alone)


@pytest.mark.slow
def test_modalities_that_differ_by_process_do_not_deadlock(shallow: Path, mixed: Path, tmp_path: Path) -> None:
    """20 steps at ZeRO-3, where a process that runs the tower waits for the others' part of it."""
    rows = json.loads(mixed.read_text(encoding="utf-8"))
    differing = sum(("image" in one) != ("image" in two) for one, two in zip(rows[:40:2], rows[1:40:2], strict=True))
    assert 5 < differing < 18
    settings = {"max_steps": 20, "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", "logging_steps": 10}
    path = recipe(tmp_path, shallow, mixed, "long", train=settings)
    assert launch([(path, "zero3")], tmp_path, timeout_s=300.0) == [True]
    summary = RunDirectory(tmp_path / "long").read_summary()
    assert summary["strategy"] == "2 processes, ZeRO-3"
    steps = [json.loads(line)["step"] for line in RunDirectory(tmp_path / "long").metrics.read_text().splitlines()]
    assert steps == [10, 20]


@pytest.mark.slow
def test_four_processes_give_the_result_of_one(shallow: Path, mixed: Path, tmp_path: Path) -> None:
    """Padded and packed, over a global batch of four rows, or of four packs; by plain descent, whose steps are the gradients.

    No padded row of the second step can train, and in the third one process has none.
    """
    rows = json.loads(mixed.read_text(encoding="utf-8"))
    for number in (4, 5, 6, 7, 9):
        rows[number] = {**rows[number], "image": "gone.png"}
    spoilt = tmp_path / "mixed.json"
    spoilt.write_text(json.dumps(rows), encoding="utf-8")
    kinds: dict[str, Any] = {"padded": {"check_rows": 0, "max_bad_fraction": 0.5}, "packed": {"packing": True, "max_tokens": 256}}
    keys = [(kind, strategy) for kind in kinds for strategy in ("DDP", "ZeRO-3")]
    descent = {"max_steps": 3, "gradient_accumulation_steps": 4, "optim": "sgd", "learning_rate": 0.3}
    alone, jobs = {}, []
    for kind, data in kinds.items():
        sequential = {"train_sampling_strategy": "sequential"} if kind == "padded" else {}
        path = recipe(tmp_path, shallow, spoilt if kind == "padded" else mixed, kind, data=data, train=descent | sequential)
        plain = json.loads(path.read_text(encoding="utf-8"))
        plain["tune"]["language"]["lora_dropout"] = 0.0  # each process draws its own
        if kind == "packed":
            del plain["train"]["per_device_train_batch_size"]
        path.write_text(json.dumps(plain), encoding="utf-8")
        train(load_recipe(path), ["test"])
        alone[kind] = plain
    for kind, strategy in keys:
        settings = {**alone[kind]["train"], "gradient_accumulation_steps": 1}
        path = tmp_path / f"{kind}_{strategy}.yaml"
        path.write_text(json.dumps({**alone[kind], "train": settings, "output_dir": str(path.with_suffix(""))}), encoding="utf-8")
        jobs.append((path, LAYOUTS[strategy]))
    assert launch(jobs, tmp_path, processes=4) == [True] * len(jobs)
    for kind, strategy in keys:
        runs = [RunDirectory(tmp_path / kind), RunDirectory(tmp_path / f"{kind}_{strategy}")]
        one, four = ([json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()] for run in runs)
        assert [(step["step"], step["learning_rate"]) for step in four] == [(step["step"], step["learning_rate"]) for step in one]
        assert len(four) == (2 if kind == "padded" else 3)
        assert [step["loss"] for step in four] == pytest.approx([step["loss"] for step in one], abs=1e-5)
        assert [step["grad_norm"] for step in four] == pytest.approx([step["grad_norm"] for step in one], rel=1e-4)
        expected, actual = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
        assert max((expected[name] - actual[name]).abs().max() for name in expected) < 1e-5


PROGRAM = """
import importlib, sys
from mmtune.console.library_output import configure_console
configure_console()
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as in helpers/preloaded.py
from mmtune.cli.main import entry_point
sys.exit(entry_point(["train", *sys.argv[1:]]))
"""


def private_peaks(command: list[str], log: Path) -> list[int]:
    """The largest private memory of each process that trains, in bytes: what is mapped from files is the machine's own."""
    peaks: dict[int, int] = {}
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # or what is freed in between would still be counted
    with log.open("w") as output:
        started = subprocess.Popen(command, env={**os.environ, **returned}, stdout=output, stderr=output)
    while started.poll() is None:
        for process in (psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_info()
                peaks[process.pid] = max(peaks.get(process.pid, 0), memory.rss - memory.shared)
        time.sleep(0.05)
    assert started.returncode == 0, log.read_text()
    return sorted(peaks.values())


@pytest.mark.slow
def test_a_process_at_zero_3_never_holds_the_whole_model(tmp_path: Path) -> None:
    """300 million parameters that are bf16 on disk and fp32 here, so that no process can use the file's own pages."""
    few_words = [{"from": "human", "value": "one and one"}, {"from": "gpt", "value": "two"}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": few_words}] * 2), encoding="utf-8")
    model, processor = build_untrained(seed=0)
    text = model.config.text_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 6, 2048, 5632
    text.num_attention_heads = text.num_key_value_heads = 16
    text.head_dim = 128
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(model.config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    save_checkpoint(model, processor, tmp_path / "large")
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    del model
    path = recipe(
        tmp_path, tmp_path / "large", tmp_path / "rows.json", "run", train={"max_steps": 1, "gradient_accumulation_steps": 1}
    )
    few = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"), 20_000_000)
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, **few}}), encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    program = [str(tmp_path / "program.py"), str(path), "--overwrite"]
    [*_, alone] = private_peaks([sys.executable, *program], tmp_path / "one.log")
    torchrun = [*launcher("torchrun"), *program, f"train.deepspeed={settings}"]
    [*_, first, second] = private_peaks(torchrun, tmp_path / "two.log")
    assert max(first, second) < alone - 0.3 * whole
    shutil.rmtree(tmp_path / "large")
