"""DeepSpeed ZeRO with one process, on the CPU and on CUDA: the losses of a run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from launched import launch

from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train

pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")


@pytest.mark.parametrize(
    ("device", "strategies"),
    [
        pytest.param("cpu", ["zero3"], marks=pytest.mark.slow),
        pytest.param("cuda", ["zero1", "zero2", "zero3"], marks=pytest.mark.gpu),
    ],
)
def test_zero_with_one_process_has_the_losses_of_a_run_without_it(
    make_recipe: Callable[..., Recipe], tmp_path: Path, device: str, strategies: list[str]
) -> None:
    def losses(name: str) -> list[float]:
        lines = RunDirectory(tmp_path / name).metrics.read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    use_cpu = f"train.use_cpu={json.dumps(device == 'cpu')}"
    train(make_recipe(use_cpu, f"output_dir={tmp_path / 'plain'}"), ["test"])
    files = []
    for strategy in strategies:
        files.append(tmp_path / f"{strategy}.yaml")
        files[-1].write_text(make_recipe(use_cpu, f"output_dir={tmp_path / strategy}").to_yaml())
    assert launch([*zip(files, strategies, strict=True)], tmp_path, processes=1) == [True] * len(strategies)
    for strategy in strategies:
        assert "ZeRO" in RunDirectory(tmp_path / strategy).read_summary()["strategy"]
        assert losses(strategy) == pytest.approx(losses("plain"), abs=1e-5)
