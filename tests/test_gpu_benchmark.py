"""benchmarks/gpu.py at tiny sizes on the CPU: mmtune and plain transformers with PEFT train the same rows to the same loss."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("part", ["qwen2_5", "llava", "qwen2_5_vl_qlora"])
def test_both_ways_train_the_same_rows(part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the script extends
    gpu = importlib.import_module("gpu")
    options = ["--size", "tiny", "--device", "cpu", "--tokens", "1024", "--rows", "4", "--workers", "0", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", part, *options, *(["--checkpointing"] if "qlora" in part else [])])
    gpu.main()
    lines = re.findall(r"^(mmtune|plain) .* tokens/s .* TFLOP/s ours .* loss ([\d.]+)$", capsys.readouterr().out, re.M)
    assert [way for way, _ in lines] == ["mmtune", "plain"]
    assert float(lines[0][1]) == pytest.approx(float(lines[1][1]), abs=1e-3)


def test_wheels_are_divided_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    divide = importlib.import_module("gpu_wheels").divide
    assert divide({"a": 5, "b": 40, "c": 30, "d": 25, "e": 70}, 60) == [["e"], ["b", "a"], ["c", "d"]]
