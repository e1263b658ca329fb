"""`capabilities.json` says what runs: every cell of it is run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from measure import VARIANTS, measure, names

from mmtune.methods.table import CAPABILITIES, METHODS, PRECISIONS, capabilities, refusal


def works(cell: dict[str, object]) -> dict[str, bool]:
    return {what: value is True for what, value in cell.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", names())
def test_every_cell_is_what_happens(name: str, rows: Path, base: Path, tmp_path: Path) -> None:
    found = {precision: works(measure(name, precision, rows, base, tmp_path)) for precision in PRECISIONS}
    assert found == {precision: works(cell) for precision, cell in capabilities()[name].items()}


def test_every_method_is_in_the_file_and_folds_as_the_table_says() -> None:
    assert set(capabilities()) == set(METHODS) | set(VARIANTS)
    assert set(json.loads(CAPABILITIES.read_text())["versions"]) == {
        *("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")
    }
    for name, method in METHODS.items():
        for precision, cell in capabilities()[name].items():
            assert works(cell)["merge"] == (method.mergeable and works(cell)["train"]), (name, precision)


@pytest.mark.parametrize("name", METHODS)
def test_the_recipe_refuses_exactly_what_does_not_work(name: str) -> None:
    for precision, cell in capabilities()[name].items():
        assert (refusal(name, {}, precision=precision) is None) == (cell["train"] is True)
        both = cell["train"] is True and cell["checkpointing"] is True
        told = refusal(name, {}, precision=precision, checkpointing=True)
        assert (told is None) == both
        assert told is None or "use " in told


def test_prompt_methods_are_refused_where_positions_have_three_parts() -> None:
    assert "use gated_prefix or lora" in str(refusal("prefix_tuning", {}, model_type="qwen2_5_vl"))
    assert refusal("gated_prefix", {}, model_type="qwen2_5_vl") is None
