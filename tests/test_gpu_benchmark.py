"""benchmarks/gpu.py at tiny sizes on the CPU: mmtune and plain transformers with PEFT train the same rows to the same loss."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_flops_of_a_tower_are_those_of_torchs_counter(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eager attention, because torch counts no fused one on a CPU; windows and whole images of two sizes."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    gpu = importlib.import_module("gpu")
    config = gpu.config_of(name, "tiny", gpu.write_processor(name, "tiny", tmp_path))
    model = gpu.build(config, torch.device("cpu"), "eager", False).get_base_model()
    size = model.config.vision_config.image_size if name == "llava" else 0
    inputs = {"pixel_values": torch.randn(2, 3, size, size)}
    if name == "qwen2_5_vl":
        grid = torch.tensor([[1, 12, 20], [1, 8, 8]])
        inputs = {"pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14), "image_grid_thw": grid}
    counter = gpu.ProductFlops(model)
    with torch.no_grad(), FlopCounterMode(display=False) as expected:
        model.get_image_features(**inputs)
    assert counter.total == pytest.approx(expected.get_total_flops(), rel=1e-3)


def test_wheels_are_divided_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    divide = importlib.import_module("gpu_wheels").divide
    assert divide({"a": 5, "b": 40, "c": 30, "d": 25, "e": 70}, 60) == [["e"], ["b", "a"], ["c", "d"]]
