"""The fixture of benchmarks/peers: the same files from the same seed, and rows and a recipe that mmtune takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaForConditionalGeneration

from mmtune.cli.main import entry_point

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"


@pytest.fixture
def fixture(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module("fixture")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_writes_the_same_files(fixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        fixture.write_model(tmp_path / name / "model_60m", "tiny", seed)
        fixture.write_rows(tmp_path / name / "rows_single_256", "mixed", 6, "tiny", seed)
    first, second, other = (files(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert {name for name in first if other.get(name) != first[name]} >= {
        "model_60m/model.safetensors",
        "rows_single_256/trl.jsonl",
    }

    _, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path / "first" / "model_60m", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]

    rows = tmp_path / "first" / "rows_single_256"
    turns = [[turn["value"] for turn in row["conversations"]] for row in json.loads((rows / "mmtune.json").read_text())]
    swift = [json.loads(line)["messages"] for line in (rows / "swift.jsonl").read_text().splitlines()]
    assert turns == [[turn["content"] for turn in messages] for messages in swift]

    # The recipe's paths begin in the working directory.
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "peers").symlink_to(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    assert entry_point(["data", "check", str(PEERS / "mmtune.yaml")]) == 0
