"""What several processes do beyond a few steps: they stop and go on, mix modalities for long, and share a model's memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from launched import launch
from safetensors.torch import load_file

from mmtune.recipe import load_recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train

STEPS = 5


def recipe(folder: Path, base: Path, rows: Path, name: str, **changes: Any) -> Path:
    """Written as JSON, which is YAML."""
    document = {
        "model": {"base": str(base), "precision": "fp32"},
        "tune": {"language": {"method": "lora", "r": 4, "lora_dropout": 0.2}},
        "data": {"train": [{"path": str(rows), "template": "llava", "media_root": "/"}], **changes.pop("data", {})},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            **changes.pop("train", {}),
        },
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mixed(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 rows, by chance with a picture or without."""
    pictures = json.loads(rows.read_text(encoding="utf-8"))
    draw = random.Random(0)
    made = []
    for number in range(400):
        row = draw.choice(pictures)
        turns = [{"from": "human", "value": f"count to {number}"}, {"from": "gpt", "value": f"{number} it is"}]
        with_picture = {"image": str(rows.parent / row["image"]), "conversations": row["conversations"]}
        made.append({"id": f"r{number}", **(with_picture if draw.random() < 0.5 else {"conversations": turns})})
    path = tmp_path_factory.mktemp("mixed") / "mixed.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


LAYOUTS: dict[str, int | None] = {"DDP": None, "ZeRO-2": 2, "ZeRO-3": 3}
READ = {"indexed": {}, "streamed": {"stream": True, "shuffle_window": 8}}


@pytest.fixture(scope="module")
def stopped(base: Path, mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """The outcomes of an unbroken run, of one that was stopped and of its going on, and the two runs."""
    folder = tmp_path_factory.mktemp("stopped")
    jobs: list[Any] = []
    keys = [(layout, read) for layout in LAYOUTS for read in READ]
    for layout, read in keys:
        whole, broken = (recipe(folder, base, mixed, f"{layout}_{read}_{name}", data=READ[read]) for name in ("whole", "broken"))
        jobs += [(whole, LAYOUTS[layout]), (broken, LAYOUTS[layout], 3), (broken, LAYOUTS[layout], "resume")]
    done = launch(jobs, folder)
    return {
        key: [*done[3 * number : 3 * number + 3], *(job[0].with_suffix("") for job in jobs[3 * number : 3 * number + 2])]
        for number, key in enumerate(keys)
    }


@pytest.mark.slow
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_go_on_bit_for_bit(layout: str, read: str, stopped: dict[tuple[str, str], list[Any]]) -> None:
    """The second process gets SIGTERM in the third step: both finish it and save."""
    whole, ended, resumed, unbroken, broken = stopped[layout, read]
    assert whole is True, whole
    assert "by SIGTERM after step 3" in str(ended)
    assert resumed is True, resumed
    runs = [RunDirectory(unbroken), RunDirectory(broken)]
    adapters = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    figures = [[json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()] for run in runs]
    assert [record["step"] for record in figures[1]] == list(range(1, STEPS + 1))
    for one, two in zip(*figures, strict=True):
        assert (one["loss"], one["grad_norm"], one["tokens"]) == (two["loss"], two["grad_norm"], two["tokens"])
    assert load_file(broken / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors").keys()  # an adapter as any other


@pytest.mark.slow
def test_modalities_that_differ_by_process_never_hang(base: Path, mixed: Path, tmp_path: Path) -> None:
    """200 steps at ZeRO-3, where a process that runs the tower waits for the others' part of it."""
    rows = json.loads(mixed.read_text(encoding="utf-8"))
    differing = sum(("image" in one) != ("image" in two) for one, two in zip(rows[::2], rows[1::2], strict=True))
    assert 50 < differing < 150
    settings = {"max_steps": 200, "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", "logging_steps": 50}
    path = recipe(tmp_path, base, mixed, "long", train=settings)
    assert launch([(path, 3)], tmp_path, patience_s=300.0) == [True]
    summary = RunDirectory(tmp_path / "long").read_summary()
    assert summary["layout"] == "2 processes, ZeRO-3"
    steps = [json.loads(line)["step"] for line in RunDirectory(tmp_path / "long").metrics.read_text().splitlines()]
    assert steps == [50, 100, 150, 200]


@pytest.mark.slow
def test_four_processes_train_what_one_does(base: Path, mixed: Path, tmp_path: Path) -> None:
    """Padded and packed, over a global batch of four rows, or of four packs."""
    kinds: dict[str, Any] = {"padded": {}, "packed": {"packing": True, "max_tokens": 256}}
    settings = {"max_steps": 3, "gradient_accumulation_steps": 1}
    jobs, alone = [], {}
    for kind, data in kinds.items():
        four = {"max_steps": 3, "gradient_accumulation_steps": 4}
        path = recipe(tmp_path, base, mixed, f"{kind}_alone", data=data, train=four)
        plain = json.loads(path.read_text(encoding="utf-8"))
        plain["tune"]["language"]["lora_dropout"] = 0.0  # each process draws its own
        path.write_text(json.dumps(plain), encoding="utf-8")
        train(load_recipe(path), ["test"])
        alone[kind] = RunDirectory(tmp_path / f"{kind}_alone")
        for layout, stage in LAYOUTS.items():
            together = {**plain, "train": {**plain["train"], **settings}, "output_dir": str(tmp_path / f"{kind}_{layout}")}
            jobs.append((tmp_path / f"{kind}_{layout}.yaml", stage))
            jobs[-1][0].write_text(json.dumps(together), encoding="utf-8")
    assert launch(jobs, tmp_path, processes=4) == [True] * len(jobs)
    for kind in kinds:
        for layout in LAYOUTS:
            run = RunDirectory(tmp_path / f"{kind}_{layout}")
            losses = [[json.loads(line)["loss"] for line in each.metrics.read_text().splitlines()] for each in (alone[kind], run)]
            assert losses[1] == pytest.approx(losses[0], abs=1e-5)
            one, other = (load_file(each.adapter / "adapter_model.safetensors") for each in (alone[kind], run))
            assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
