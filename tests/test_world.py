"""Several processes give what one gives, and what was asked for is what comes to be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import launch
from safetensors.torch import load_file

from mmtune.errors import UserError
from mmtune.recipe import Recipe, load_recipe
from mmtune.run_directory import RunDirectory, new_run
from mmtune.train import train
from mmtune.world import World, check_launch

ROOT = Path(__file__).parent.parent
LAYOUTS = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp2"}
"""What a run calls a layout, and the shipped configuration that makes it."""
OTHER_WAYS = {
    "DDP, two machines": "multi_node",
    "ZeRO-3, offloaded": "zero3_offload",
    **{f"ZeRO-{name.removeprefix('zero')}, by the recipe": name for name in ("zero1", "zero2", "zero3", "zero3_offload")},
}
"""The second half of them by `train.deepspeed` under torchrun."""
CELLS = [*((kind, layout) for kind in ("text", "mixed", "towers") for layout in LAYOUTS), *(("text", way) for way in OTHER_WAYS)]


def document(data: Path, base: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Three steps of a global batch of four."""
    return {
        "model": {"base": str(base), "precision": "fp32"},
        "tune": {
            "projector": {"method": "full", "learning_rate": 1e-4},
            "language": {"method": "lora", "r": 4, "learning_rate": 2e-4},
        },
        "data": {"train": [{"path": str(data), "template": "llava"}]},
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0, "disable_tqdm": True},
        "output_dir": str(run),
        **changes,
    }


def halved(recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """The same global batch in two processes: two halves of each half."""
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    return {**recipe, "train": {**recipe["train"], **halves}, "output_dir": str(run)}


def write(recipe: dict[str, Any]) -> Path:
    path = Path(recipe["output_dir"]).with_suffix(".yaml")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kinds(rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A recipe for each kind of data and of tuning."""
    folder = tmp_path_factory.mktemp("alone")
    images = json.loads(rows.read_text(encoding="utf-8"))
    for row in images:
        row["image"] = str(rows.parent / row["image"])
    text = [
        {"id": f"t{n}", "conversations": [{"from": "human", "value": "count " * n}, {"from": "gpt", "value": f"{n} words"}]}
        for n in range(1, 13)
    ]
    picture = Path(images[0]["image"]).read_bytes()
    (folder / "cut.png").write_bytes(picture[: len(picture) // 2])
    broken = [{**row, "id": f"cut{number}", "image": str(folder / "cut.png")} for number, row in enumerate(images[:6])]
    mixed = [row for pair in zip(images, text, strict=True) for row in pair] + broken
    recipes = {}
    for kind, chosen in {"text": text, "mixed": mixed}.items():
        data = folder / f"{kind}.json"
        data.write_text(json.dumps(chosen), encoding="utf-8")
        recipes[kind] = document(data, base, folder / f"{kind}_run")
        recipes[kind]["data"]["train"][0]["media_root"] = "/"
    # Rows that fail while they are trained on, and questions that do not divide by two.
    questions = folder / "questions.json"
    questions.write_text(json.dumps(images[:5]), encoding="utf-8")
    recipes["mixed"]["data"]["max_bad_fraction"] = 0.5
    recipes["mixed"]["evaluate"] = {
        "data": [{"path": str(questions), "template": "llava", "media_root": "/"}],
        "max_new_tokens": 4,
        "batch_size": 5,
    }
    recipes["towers"] = document(folder / "mixed.json", base, folder / "towers_run")
    recipes["towers"]["data"] = {"train": [{**recipes["text"]["data"]["train"][0], "path": str(folder / "towers.json")}]}
    (folder / "towers.json").write_text(json.dumps(mixed[:-6]), encoding="utf-8")
    recipes["towers"]["tune"] = {"vision": "full", "projector": "full", "language": "full"}
    recipes["towers"]["train"] = {**recipes["towers"]["train"], "learning_rate": 1e-5}
    return recipes


@pytest.fixture(scope="module")
def runs(
    kinds: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[bool | str, Path]]:
    folder = tmp_path_factory.mktemp("together")
    paths = [folder / f"{kind}_{layout}" for kind, layout in CELLS]
    jobs: list[tuple[Path, str]] = []
    for (kind, layout), run in zip(CELLS, paths, strict=True):
        recipe, config = halved(kinds[kind], run), {**LAYOUTS, **OTHER_WAYS}[layout]
        if layout.endswith("by the recipe"):
            recipe["train"]["deepspeed"], config = str(ROOT / "recipes" / "deepspeed" / f"{config}.json"), "torchrun"
        jobs.append((write(recipe), config))
    return dict(zip(CELLS, zip(launch(jobs, folder), paths, strict=True), strict=True))


@pytest.fixture(scope="module")
def alone(kinds: dict[str, dict[str, Any]]) -> dict[str, Path]:
    for recipe in kinds.values():
        train(load_recipe(write(recipe)), ["test"], overwrite=True)
    return {kind: Path(recipe["output_dir"]) for kind, recipe in kinds.items()}


def weights(run: Path) -> dict[str, Any]:
    """What the run trained, in fp32."""
    file = next(iter(run.glob("*/adapter_model.safetensors")), run / "model" / "model.safetensors")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines()]


def quarantined(run: RunDirectory) -> set[str]:
    return {fault["row"] for fault in json.loads(run.data_report.read_text(encoding="utf-8"))["quarantined"]}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CELLS)
def test_two_processes_train_what_one_does(
    kind: str, layout: str, alone: dict[str, Path], runs: dict[tuple[str, str], tuple[bool | str, Path]]
) -> None:
    done, run = runs[kind, layout]
    assert done is True, done
    assert RunDirectory(run).read_summary()["layout"] == f"2 processes, {layout.partition(',')[0].removesuffix('_offload')}"
    assert len(metrics(run)) == 3
    for one, two in zip(metrics(alone[kind]), metrics(run), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5
        assert abs(one["grad_norm"] - two["grad_norm"]) < 1e-4 * one["grad_norm"]
    one, two = RunDirectory(alone[kind]), RunDirectory(run)
    if kind == "mixed":
        assert len(quarantined(one)) > 0
        assert quarantined(one) == quarantined(two)
        assert one.answers("before").read_text() == two.answers("before").read_text()
        assert len(one.answers("after").read_text().splitlines()) == len(two.answers("after").read_text().splitlines()) == 5
    expected, found = weights(alone[kind]), weights(run)
    assert expected.keys() == found.keys()
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-5


@pytest.mark.parametrize(
    ("environment", "precision", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "bf16", "launched with FSDP"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "bf16", "parallelism config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16", "mixed precision fp16, and the recipe's model.precision is bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", "mixed precision bf16, and the recipe's model.precision is fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "fp32", "switches it off"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "fp32", "several processes and started one"),
    ],
)
def test_a_launch_that_contradicts_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], precision: str, told: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        check_launch(precision)


def test_mixed_precision_of_the_launcher_may_be_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch("nf4")


@pytest.mark.parametrize("key", ["average_tokens_across_devices=false", "accelerator_config={even_batches: false}"])
def test_how_batches_are_divided_is_not_a_recipes_to_set(make_recipe: Callable[..., Recipe], key: str) -> None:
    with pytest.raises(UserError, match="every layout trains the same"):
        make_recipe(f"train.{key}")


def test_an_earlier_run_is_back_when_another_process_fails(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the first process with SIGTERM, which would leave things as they are."""
    monkeypatch.setattr(World, "wait", lambda self: None)
    recipe = make_recipe()
    run = RunDirectory(Path(recipe.output_dir))
    run.path.mkdir()
    run.recipe.write_text("an earlier run")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), new_run(recipe, ["test"], overwrite=True, world=World(size=2)):
        assert run.recipe.read_text() != "an earlier run"
        os.kill(os.getpid(), signal.SIGTERM)
    assert run.recipe.read_text() == "an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_layouts_have_names() -> None:
    assert World().layout == "one process"
    assert World(size=2).layout == "2 processes, DDP"
    assert World(size=1, zero_stage=2).layout == "1 process, ZeRO-2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "enables bf16; leave it out"),
        ({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}, "a section `optimizer`"),
        (
            {"gradient_clipping": 0.5, "zero_optimization": {"stage": 2}},
            "gradient_clipping is 0.5, and the recipe's max_grad_norm is 1",
        ),
    ],
)
def test_a_deepspeed_configuration_that_contradicts_is_refused(
    kinds: dict[str, dict[str, Any]], tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    recipe = write({**kinds["mixed"], "output_dir": str(tmp_path / "run")})
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", **settings}), encoding="utf-8")
    program = str(Path(__file__).parent.parent / "mmtune" / "train.py")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", str(file)]
    launcher += ["--num_processes", "1", "--num_machines", "1", "--main_process_port", "0", "--dynamo_backend", "no"]
    done = subprocess.run([*launcher, program, str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert told in done.stderr
    assert not (tmp_path / "run").exists()
