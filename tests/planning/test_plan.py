"""`mmtune plan` and `mmtune methods` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmtune.cli.main import entry_point
from mmtune.planning.memory import MemoryEstimate
from mmtune.planning.sharded_memory import BUCKETS, GATHERED, memory_by_strategy
from mmtune.recipe.recipe import Recipe


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> str:
    make_recipe()
    return str(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_a_plan_is_printed_with_suggestions(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["plan", recipe_file, "--no-data", "--tokens", "40", "--memory", "24GB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["suggestions"] == []
    assert plan["strategies"] == {}
    assert plan["limit"] == 24_000_000_000
    assert 7_900_000 < plan["weights"] + plan["trainable"] < plan["peak"] < 200_000_000
    least = plan["peak"] + plan["overhead"]
    assert (
        entry_point(
            ["plan", recipe_file, "--no-data", "--tokens", "40", "--memory", f"{least - 1}B", "--processes", "2", "--json"]
        )
        == 0
    )
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["strategies"]["ZeRO-2"]["optimizer"] < plan["optimizer"]
    assert "first strategy that fits" in captured.err
    assert plan["suggestions"][0].startswith("train.per_device_train_batch_size=")
    assert "fits" in plan["suggestions"][-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-data"], "give data.max_tokens in the recipe, or --tokens"),
        (["--tokens", "40", "--memory", "lots"], "lots"),
        (["--tokens", "0"], "tokens"),
        (["--tokens", "40", "model.base=nobody/nothing"], "nobody/nothing"),
    ],
)
def test_invalid_plan_commands_are_errors(
    recipe_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert entry_point(["plan", recipe_file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_methods_are_listed_with_their_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["methods", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    everything = ("train", "merge", "checkpointing", "zero1", "zero2", "zero3")
    assert rows["lora"]["precisions"]["nf4"] == dict.fromkeys(everything, True)
    assert rows["loha"]["precisions"]["nf4"]["train"] is not True
    assert entry_point(["methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "loha, nf4: no train" in shown
    assert "use bf16, or lora" in shown


def test_memory_per_device_by_strategy() -> None:
    """Mixed precision AdamW of Psi parameters over N devices: 16 Psi, 4 Psi + 12 Psi / N, 16 Psi / N (arXiv 1910.02054, §3.1),
    here all in fp32, with ZeRO's own copy of the trainable parameters."""
    psi, devices = 10**12, 4
    whole = MemoryEstimate(
        weights=0,
        quantization_constants=0,
        trainable=4 * psi,
        gradients=4 * psi,
        optimizer=8 * psi,
        activations=7,
        logits=3,
        phase="optimizer",
    )
    strategies = memory_by_strategy(whole, devices)
    assert list(strategies) == ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    assert strategies["DDP"].peak == (16 + 4) * psi + 10
    assert strategies["ZeRO-1"].peak == 8 * psi + (8 + 4) * psi // devices + BUCKETS + 10
    assert strategies["ZeRO-2"].peak == 4 * psi + (12 + 4) * psi // devices + BUCKETS + 10
    assert strategies["ZeRO-3"].peak == (16 + 4) * psi // devices + BUCKETS + GATHERED + 10
    assert set(memory_by_strategy(whole, 1).values()) == {whole}
