"""`capabilities.json` agrees with real runs: some cells of every method are run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measure_capabilities import VARIANTS, measure, measure_zero, names

from mmtune.methods.capability_table import CAPABILITIES, PRECISIONS, capabilities, incompatibility
from mmtune.methods.method_table import METHODS


def works(cell: dict[str, object]) -> dict[str, bool]:
    return {what: value is True for what, value in cell.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", names())
def test_the_capabilities_of_a_method_agree_with_real_runs(name: str, rows: Path, shallow: Path, tmp_path: Path) -> None:
    """In the least exact precision in which it trains, and LoRA in all; measure.py runs every cell."""
    expected = {precision: works(cell) for precision, cell in capabilities()[name].items()}
    precisions = PRECISIONS if name == "lora" else [next(p for p in reversed(PRECISIONS) if expected[p]["train"])]
    for precision in precisions:
        actual = works(measure(name, precision, rows, shallow, tmp_path))
        assert actual == {what: expected[precision][what] for what in actual}, precision


def test_every_method_is_in_the_file_and_merges_as_the_table_says() -> None:
    assert set(capabilities()) == set(METHODS) | set(VARIANTS)
    assert set(json.loads(CAPABILITIES.read_text())["versions"]) == {
        *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")
    }
    for name, method in METHODS.items():
        for precision, cell in capabilities()[name].items():
            assert works(cell)["merge"] == (method.mergeable and works(cell)["train"]), (name, precision)


@pytest.mark.slow
def test_methods_train_in_two_processes_as_they_do_in_one(rows: Path, shallow: Path, tmp_path: Path) -> None:
    """One of each kind at ZeRO-3, where the most differs; measure.py runs every cell."""
    cells = [(name, "fp32", 3) for name in ("boft", "shira", "ln_tuning", "bottleneck", "gated_prefix", "prefix_tuning")]
    cells += [("lora", "nf4", 3), ("lora", "int8", 2), ("dora", "nf4", 3)]
    actual = measure_zero(cells, rows, shallow, tmp_path)
    expected = [capabilities()[name][precision][f"zero{stage}"] is True for name, precision, stage in cells]
    assert [outcome is True for outcome in actual] == expected, actual


def test_zero_is_rejected_by_the_measured_capabilities() -> None:
    assert "use ZeRO-2, or lora" in str(incompatibility("lora", {"use_dora": True}, precision="nf4", zero_stage=3))
    assert "launch with DDP, or use lora" in str(incompatibility("adalora", {}, zero_stage=2))
    assert incompatibility("adalora", {}) is None
    assert incompatibility("lora", {}, precision="nf4", zero_stage=3) is None


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_rejects_exactly_the_failing_combinations(name: str) -> None:
    for precision, cell in capabilities()[name].items():
        assert (incompatibility(name, {}, precision=precision) is None) == (cell["train"] is True)
        both = cell["train"] is True and cell["checkpointing"] is True
        message = incompatibility(name, {}, precision=precision, checkpointing=True)
        assert (message is None) == both
        assert message is None or "use " in message


def test_prompt_methods_are_rejected_where_positions_have_three_parts() -> None:
    assert "use gated_prefix or lora" in str(incompatibility("prefix_tuning", {}, model_type="qwen2_5_vl"))
    assert incompatibility("gated_prefix", {}, model_type="qwen2_5_vl") is None
