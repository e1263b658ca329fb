"""Several processes give the result of one process, and the requested strategy is the one that runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import DistributedType
from launched import CONFIGS, TIMEOUT_S, launch, launcher
from safetensors.torch import load_file
from torch import distributed

from mmtune import run_directory
from mmtune.distributed.context import DistributedContext, _check_backend, check_same, check_strategy
from mmtune.distributed.launch import DEEPSPEED, DEEPSPEED_CONFIG, RENDEZVOUS, check_launch
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.recipe import Recipe, check_files, load_recipe
from mmtune.rehearse import _shared_folder, rehearse
from mmtune.run_directory import RunDirectory, new_run
from mmtune.train import train
from mmtune.training.training_arguments import build_training_arguments
from mmtune.utils.errors import UserError

ROOT = Path(__file__).parents[2]
STRATEGIES = {"DDP": "ddp", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp2"}
"""Strategies by their name in a run, and the shipped configuration that launches each."""
OTHER_WAYS = {"ZeRO-3, offloaded": "zero3_offload", "ZeRO-1, by the recipe": "zero1"}
"""The second by `train.deepspeed` under torchrun."""
CELLS = [
    *(("mixed", strategy) for strategy in STRATEGIES),
    *(("text", way) for way in OTHER_WAYS),
    *(("towers", "ZeRO-3"), ("towers", "FSDP2"), ("bf16", "FSDP2")),
]
"""Packed rows are compared with one process in tests/training/test_together.py."""


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
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    return {**recipe, "train": {**recipe["train"], **halves}, "output_dir": str(run)}


def write(recipe: dict[str, Any]) -> Path:
    path = Path(recipe["output_dir"]).with_suffix(".yaml")
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kinds(rows: Path, shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
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
    for kind, chosen in {"text": text, "images": images, "mixed": mixed}.items():
        data = folder / f"{kind}.json"
        data.write_text(json.dumps(chosen), encoding="utf-8")
        recipes[kind] = document(data, shallow, folder / f"{kind}_run")
        recipes[kind]["data"]["train"][0]["media_root"] = "/"
    # Rows that fail while they are trained on, and questions that do not divide by two.
    questions = folder / "questions.json"
    questions.write_text(json.dumps([*images[:3], text[0], images[3]]), encoding="utf-8")
    recipes["mixed"]["data"]["max_bad_fraction"] = 0.5
    recipes["mixed"]["evaluate"] = {
        "data": [{"path": str(questions), "template": "llava", "media_root": "/"}],
        "leakage": "warn",
        "max_new_tokens": 4,
        "batch_size": 5,
        "while_training": {"answers": True},
    }
    recipes["mixed"]["train"] |= {"eval_strategy": "steps", "eval_steps": 1}
    recipes["bf16"] = {**recipes["mixed"], "output_dir": str(folder / "bf16_run")}
    recipes["bf16"]["model"] = {**recipes["mixed"]["model"], "precision": "bf16"}
    recipes["towers"] = document(folder / "mixed.json", shallow, folder / "towers_run")
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
    paths = [folder / f"{kind}_{strategy}" for kind, strategy in CELLS]
    jobs: list[tuple[Path, str]] = []
    for (kind, strategy), run in zip(CELLS, paths, strict=True):
        recipe, config = halved(kinds[kind], run), {**STRATEGIES, **OTHER_WAYS}[strategy]
        if strategy.endswith("by the recipe"):
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


def metrics(run: Path, name: str = "loss") -> list[dict[str, float]]:
    records = [json.loads(line) for line in RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if name in record]


def quarantined(run: RunDirectory) -> set[str]:
    return {fault["row"] for fault in json.loads(run.data_report.read_text(encoding="utf-8"))["quarantined"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first waits for all launches
@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_two_processes_give_the_result_of_one(
    kind: str, strategy: str, alone: dict[str, Path], runs: dict[tuple[str, str], tuple[bool | str, Path]]
) -> None:
    done, run = runs[kind, strategy]
    assert done is True, done
    assert RunDirectory(run).read_summary()["strategy"] == f"2 processes, {strategy.partition(',')[0]}"
    assert len(metrics(run)) == 3
    rounded = 1000 if kind == "bf16" else 1  # a batch of four and four of one are not rounded alike
    for one, two in zip(metrics(alone[kind]), metrics(run), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * rounded
        assert abs(one["grad_norm"] - two["grad_norm"]) < 1e-4 * rounded * one["grad_norm"]
        assert one["tokens"] == two["tokens"]  # those of rows alone, not of what stands in for an image
    for one, two in zip(metrics(alone[kind], "eval_loss"), metrics(run, "eval_loss"), strict=True):
        assert abs(one["eval_loss"] - two["eval_loss"]) < 1e-5 * rounded
        assert one["eval_exact_match"] == two["eval_exact_match"]
    one, two = RunDirectory(alone[kind]), RunDirectory(run)
    if kind == "mixed":
        assert len(metrics(run, "eval_loss")) == 3
        assert len(quarantined(one)) > 0
        assert quarantined(one) == quarantined(two)
        assert one.answers("before").read_text() == two.answers("before").read_text()
        assert len(one.answers("after").read_text().splitlines()) == len(two.answers("after").read_text().splitlines()) == 5
    expected, actual = weights(alone[kind]), weights(run)
    assert expected.keys() == actual.keys()
    assert max((expected[name] - actual[name]).abs().max() for name in expected) < 1e-5 * rounded


@pytest.mark.parametrize(
    ("environment", "precision", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "bf16", "FSDP version 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "bf16", "fsdp_offload_params"),
        ({"WORLD_SIZE": "2"}, "fp32", "has WORLD_SIZE and lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "fp32", "lacks WORLD_SIZE, MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "fp32", "8 copies of this program were started"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "bf16", "parallelism config"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16", "mixed precision fp16, and the recipe's model.precision is bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", "mixed precision bf16, and the recipe's model.precision is fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "fp32", "switches DeepSpeed off"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "fp32", "several processes and started one"),
    ],
)
def test_a_launch_that_contradicts_is_rejected(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], precision: str, message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launch(precision)


@pytest.fixture
def asked_by_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A DeepSpeed configuration, in an environment that is as it was when the test is over."""
    for name in (*RENDEZVOUS, DEEPSPEED, DEEPSPEED_CONFIG, "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "")  # which is undone, as what is set below is not
        monkeypatch.delenv(name)
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    return file


def test_a_recipe_enables_deepspeed_like_the_launcher(asked_by_recipe: Path) -> None:
    check_launch("fp32", str(asked_by_recipe))
    assert os.environ[DEEPSPEED] == "true"
    assert json.loads(os.environ[DEEPSPEED_CONFIG]) == {"zero_optimization": {"stage": 3}}
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


def test_one_process_does_not_take_one_of_several_gpus(asked_by_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    with pytest.raises(UserError, match="one process was started on a machine with 8 GPUs"):
        check_launch("fp32", {"zero_optimization": {"stage": 3}})


def test_deepspeed_of_launcher_and_recipe_must_be_one(asked_by_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEEPSPEED, "true")
    with pytest.raises(
        UserError, match="configured for DeepSpeed too, with other settings"
    ):  # its --zero_stage says less than a file
        check_launch("fp32", str(asked_by_recipe))
    monkeypatch.setenv(DEEPSPEED_CONFIG, str(asked_by_recipe))
    check_launch("fp32", {"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="configured for DeepSpeed too, with other settings"):
        check_launch("fp32", {"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="the launcher is configured for FSDP"):
        check_launch("fp32", str(asked_by_recipe))


def test_a_deepspeed_configuration_is_located_and_read(
    asked_by_recipe: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"command line: train.deepspeed=.*no such file: .*none.json"):
        check_files(make_recipe(f"train.deepspeed={tmp_path / 'none.json'}"))
    for text in ("stage: 3", "[" * 100_000, "9" * 5000):
        asked_by_recipe.write_text(text)
        with pytest.raises(UserError, match=r"zero\.json: not valid JSON"):
            check_launch("fp32", str(asked_by_recipe))
    recipe = make_recipe("train.deepspeed={zero_optimization: {stage: 2}}")
    assert recipe.train["deepspeed"]["zero_optimization"]["stage"] == 2
    assert build_training_arguments(recipe).deepspeed_plugin is None  # checks and plans start no DeepSpeed


def test_a_backend_of_several_processes_does_not_stop_one(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("train.ddp_backend=gloo")
    assert build_training_arguments(recipe).ddp_backend is None
    assert estimate_memory(recipe, tokens=64).peak > 0


@pytest.mark.parametrize(
    ("dist", "actual", "precision", "message"),
    [
        (DistributedContext(size=2), (2, DistributedType.MULTI_CPU, "no"), "fp32", None),
        (DistributedContext(), (1, DistributedType.MULTI_CPU, "no"), "fp32", None),  # torchrun --nproc-per-node 1
        (
            DistributedContext(size=2),
            (1, DistributedType.NO, "no"),
            "fp32",
            "expected 2 processes, DDP, got NO with 1 from accelerate",
        ),
        (
            DistributedContext(size=2, fsdp=True),
            (2, DistributedType.MULTI_CPU, "no"),
            "fp32",
            "got MULTI_CPU with 2 from accelerate; FSDP needs GPUs",
        ),
        (DistributedContext(size=2), (2, DistributedType.FSDP, "no"), "fp32", "got FSDP"),
        (
            DistributedContext(size=2),
            (2, DistributedType.MULTI_CPU, "no"),
            "bf16",
            "expected mixed precision bf16, got no",
        ),
    ],
)
def test_the_strategy_that_accelerate_configured_is_checked(
    dist: DistributedContext, actual: tuple[int, DistributedType, str], precision: str, message: str | None
) -> None:
    accelerator: Any = SimpleNamespace(num_processes=actual[0], distributed_type=actual[1], mixed_precision=actual[2])
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_strategy(accelerator, dist, precision)


def test_gloo_on_cuda_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "get_backend_config", lambda: "cpu:gloo,cuda:gloo")
    arguments: Any = SimpleNamespace(world_size=2, device=torch.device("cuda:0"), ddp_backend=None)
    with pytest.raises(UserError, match="expected the nccl backend on cuda, got gloo"):
        _check_backend(arguments)
    arguments.ddp_backend = "gloo"
    _check_backend(arguments)


def test_processes_with_different_recipes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"train.learning_rate": 0.2, "torch": "2.13.0"}
    monkeypatch.setattr(DistributedContext, "all_gather_object", lambda self, value: [value, value, theirs])
    check_same(DistributedContext(size=3), theirs)
    with pytest.raises(UserError, match=r"process 2 has train.learning_rate: 0.2, and process 0 0.1"):
        check_same(DistributedContext(size=3), {"train.learning_rate": 0.1, "torch": "2.13.0"})


def test_an_output_dir_that_is_not_shared_is_reported(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process finds an earlier run where the first has made a new one."""
    monkeypatch.setattr(run_directory, "VISIBLE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(DistributedContext, "broadcast_object", lambda self, value: "new")
    monkeypatch.setattr(DistributedContext, "all_gather_object", lambda self, value: [True, value])
    recipe = make_recipe()
    run = RunDirectory(Path(recipe.output_dir))
    run.path.mkdir()
    run.environment.write_text("earlier")
    second = new_run(recipe, ["test"], overwrite=True, dist=DistributedContext(rank=1, size=2))
    with pytest.raises(UserError, match="output_dir: process 1 does not see the files of process 0"), second:
        pass


def test_mixed_precision_of_the_launcher_may_be_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch("nf4")


@pytest.mark.parametrize("key", ["average_tokens_across_devices=false", "accelerator_config={even_batches: false}"])
def test_batch_splitting_settings_are_rejected_in_a_recipe(make_recipe: Callable[..., Recipe], key: str) -> None:
    with pytest.raises(UserError, match="every parallelism strategy gives the same result"):
        make_recipe(f"train.{key}")


@pytest.mark.parametrize("size", [1, 2])
def test_an_earlier_run_is_back_after_sigterm(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The signal by which a launcher ends the main process after another one failed; ignoring it would change nothing."""
    monkeypatch.setattr(DistributedContext, "broadcast_object", lambda self, value: value)
    monkeypatch.setattr(DistributedContext, "all_gather_object", lambda self, value: [value, value])
    recipe = make_recipe()
    run = RunDirectory(Path(recipe.output_dir))
    run.path.mkdir()
    run.recipe.write_text("an earlier run")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), new_run(recipe, ["test"], overwrite=True, dist=DistributedContext(size=size)):
        assert run.recipe.read_text() != "an earlier run"
        os.kill(os.getpid(), signal.SIGTERM)
    assert run.recipe.read_text() == "an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("end", [SystemExit, ZeroDivisionError, None])
def test_the_folder_of_a_rehearsal_is_always_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException] | None
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(end) if end else nullcontext(), _shared_folder(DistributedContext()) as place:
        (place / "file").write_text("x")
        assert place.parent == tmp_path
        if end is SystemExit:
            os.kill(os.getpid(), signal.SIGTERM)
        elif end is not None:
            raise end
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_on_two_machines_is_rejected(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(RENDEZVOUS, ("0", "0", "4", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="launch it on one machine"):
        rehearse(make_recipe())


def test_strategies_have_names() -> None:
    assert DistributedContext().strategy == "one process"
    assert DistributedContext(size=2).strategy == "2 processes, DDP"
    assert DistributedContext(size=1, zero_stage=2).strategy == "1 process, ZeRO-2"
    assert DistributedContext(size=2, fsdp=True).strategy == "2 processes, FSDP2"


CONTRADICTIONS = {
    "enables bf16; leave it out": {"bf16": {"enabled": True}},
    "a section `optimizer`": {"optimizer": {"type": "AdamW"}},
    "gradient_clipping is 0.5, and the recipe's max_grad_norm is 1": {"gradient_clipping": 0.5},
}


@pytest.mark.slow
def test_a_deepspeed_configuration_that_contradicts_is_rejected(kinds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    jobs = []
    for number, settings in enumerate(CONTRADICTIONS.values()):
        recipe = {**kinds["text"], "output_dir": str(tmp_path / f"run{number}")}
        asked = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}, **settings}
        recipe["train"] = {**recipe["train"], "deepspeed": asked}
        jobs.append((write(recipe), "torchrun"))
    for message, output in zip(CONTRADICTIONS, launch(jobs, tmp_path, processes=1), strict=True):
        assert message in str(output)
    assert not list(tmp_path.glob("run*/"))


@pytest.mark.slow
def test_the_launcher_of_one_gpu(alone: dict[str, Path], kinds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe = write({**kinds["text"], "output_dir": str(tmp_path / "run")})
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "one_gpu.yaml")]
    subprocess.run([*accelerate, str(ROOT / "mmtune" / "train.py"), str(recipe)], check=True, capture_output=True)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == [line["loss"] for line in metrics(alone["text"])]


@pytest.mark.slow
def test_two_launchers_are_two_machines(alone: dict[str, Path], kinds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe = write(halved(kinds["text"], tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    command = [*launcher("multi_node"), *place, "--machine_rank"]
    program = [str(ROOT / "mmtune" / "train.py"), str(recipe)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    second = subprocess.Popen([*command, "1", *program], env=environment)
    subprocess.run([*command, "0", *program], env=environment, check=True, capture_output=True)
    assert second.wait(TIMEOUT_S) == 0
    assert RunDirectory(tmp_path / "run").read_summary()["strategy"] == "2 processes, DDP"
    one, two = ([line["loss"] for line in metrics(run)] for run in (alone["text"], tmp_path / "run"))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
def test_fsdp_that_falls_back_to_ddp_is_reported(kinds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """accelerate does that to every machine without GPUs, and says nothing."""
    recipe = write(halved(kinds["text"], tmp_path / "run"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command = [*launcher("fsdp2"), str(ROOT / "mmtune" / "train.py"), str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = "error: expected 2 processes, FSDP2, got MULTI_CPU with 2 from accelerate; FSDP needs GPUs"
    assert done.stderr.count(message) == 2  # printed by one process, and the last that the launcher says
    root_cause = done.stderr.rpartition("Root Cause")[2]
    assert f"traceback : {message}" in root_cause
    assert "rank      : 0 " in root_cause
    assert "exitcode  : 2 " in root_cause


@pytest.mark.slow
@pytest.mark.timeout(600)  # one by one, and each starts its processes
def test_a_strategy_is_rehearsed(kinds: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """The whole job on the CPU, with what the main process does alone, after training a shard of a model."""
    saved = {**kinds["mixed"]["train"], "save_strategy": "epoch"}
    recipes = {
        "ddp": {**kinds["mixed"], "train": saved},
        "zero2": {**kinds["towers"], "train": {**kinds["towers"]["train"], "save_strategy": "epoch"}},
        "torchrun": {**kinds["mixed"], "train": {**saved, "deepspeed": str(ROOT / "recipes" / "deepspeed" / "zero3.json")}},
        "fsdp2": kinds["mixed"],
    }
    jobs = []
    for strategy, recipe in recipes.items():
        jobs.append((write({**recipe, "output_dir": str(tmp_path / strategy)}), strategy, "rehearse"))
    assert launch(jobs, tmp_path) == [True] * len(jobs)
    log = (tmp_path / "results.log").read_text(encoding="utf-8")
    for strategy in ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2"):
        assert f"training: 2 processes, {strategy}, cpu" in log
    assert log.count("loaded back and asked: 2 answers") == len(jobs)
    assert log.count("merged: largest logit difference") == len(jobs) - 1  # all weights trained leave no adapter
    assert log.count("rehearsal passed") == len(jobs)
    assert not any((tmp_path / strategy).exists() for strategy in recipes)


def test_shipped_configurations_set_no_recipe_settings() -> None:
    for path in CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert path.read_text(encoding="utf-8").startswith("# ")
        assert config["mixed_precision"] == "no"
    for path in (ROOT / "recipes" / "deepspeed").glob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        assert config.pop("_comment")
        zero = config.pop("zero_optimization")
        assert set(config.values()) == {"auto"}
        launched = yaml.safe_load((CONFIGS / f"{path.stem}.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
        offload = zero.get("offload_optimizer", {}).get("device", "none")
        assert (zero["stage"], offload) == (launched["zero_stage"], launched["offload_optimizer_device"])
