"""The commands of docs/serving.md: an engine for a run, questions to it, the check, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtune.cli.main import entry_point
from mmtune.serving.engine_process import free_port

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
TIMEOUT_S = 120.0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def photos(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of the built-in model as `runs/photos`, and a photo, in the working directory."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")  # larger than an argument of a command may be
    source = {"path": str(rows), "template": "llava"}
    recipe = {
        "model": {"base": "builtin:tiny-llava"},
        "tune": {"language": {"method": "lora", "r": 4, "target_modules": "all-linear"}},
        "data": {"train": [source]},
        "evaluate": {"data": [source], "leakage": "warn", "before": False, "max_new_tokens": 8},
        "train": {"max_steps": 3, "learning_rate": 3e-3, "per_device_train_batch_size": 12, "use_cpu": True},
        "output_dir": "runs/photos",
    }
    (tmp_path / "photos.yaml").write_text(json.dumps(recipe))
    assert entry_point(["train", "photos.yaml"]) == 0
    return tmp_path


def in_shell(command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_of_the_page(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    serve, curl, check = (block.strip().replace("8000", port) for block in blocks("bash"))
    command = [sys.executable, "-m", "mmtune.cli.main", *shlex.split(serve)[1:], "--port", port, "--", "--device", "cpu"]
    with (photos / "log").open("w") as log:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert started.stdout is not None
    printed = ""
    while "serve --check" not in printed:
        line = started.stdout.readline()
        assert line, (photos / "log").read_text()
        printed += line
    assert re.search(r"runs/photos: engines load no adapter with modules that were trained in full \(.*projector", printed)
    assert "merged: runs/photos/merged: " in printed and f"serving: runs/photos/merged at http://127.0.0.1:{port}/v1" in printed
    assert "client = OpenAI(" in printed and f"curl -s http://127.0.0.1:{port}/v1/chat/completions" in printed
    of_curl = json.loads(in_shell(curl))["choices"][0]["message"]["content"]
    python = blocks("python")[0].replace("8000", port)
    assert in_shell(f"{sys.executable} -c {shlex.quote(python)}").strip() == of_curl.strip() != ""
    [printed_curl] = [line for line in printed.splitlines() if line.startswith("echo ")]
    (photos / "image.png").write_bytes((photos / "photo.png").read_bytes())
    assert json.loads(in_shell(printed_curl))["choices"][0]["message"]["content"] == of_curl
    capsys.readouterr()
    assert entry_point(shlex.split(check)[1:]) == 0, capsys.readouterr()
    assert "answers: 12 of 12 are the trained model's" in capsys.readouterr().out

    engines = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == 130 and engines
    assert not psutil.wait_procs(engines, timeout=5)[1]


def test_a_merge_of_other_weights_is_not_served(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        entry_point(
            ["merge", "runs/photos", "runs/photos/merged"],
        )
        == 0
    )
    weights = photos / "runs" / "photos" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + torch.ones_like(tensor) for name, tensor in tensors.items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert entry_point(["serve", "runs/photos", "--port", str(free_port())]) == 2
    message = "runs/photos/merged: expected the merge of runs/photos/adapter, got other weights; replace them with `mmtune merge "
    assert message in capsys.readouterr().err
