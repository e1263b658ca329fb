"""`mmtune serve --engine vllm` and its check with a vLLM of another environment, which MMTUNE_VLLM names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mmtune.cli.main import entry_point
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision
from mmtune.serving.engine_process import free_port
from tests.serving.test_served_conversations import A_CALL, ALL, ROWS, TEMPLATE, TEXT_BESIDE_A_CALL, train, write_images
from tests.serving.test_serving_check import write_run

VLLM = os.environ.get("MMTUNE_VLLM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not VLLM, reason="needs a vLLM: MMTUNE_VLLM names its command (CONTRIBUTING.md, Tests)"),
]
OPTIONS = ("--dtype", "float32", "--enforce-eager")
FAMILIES = ("assembled", "internvl", "qwen2_5_vl")


def write_base(family: str, folder: Path) -> Path:
    """A base whose heads have 32 values, the fewest that vLLM's attention takes on a CPU."""
    if family != "assembled":
        base = write_tiny_base(BASES[family], folder / "base")
        config = json.loads((base / "config.json").read_text())
        text = config["text_config"]
        text.update(head_dim=32, num_attention_heads=2, num_key_value_heads=1)
        if "mrope_section" in text["rope_parameters"]:
            text["rope_parameters"]["mrope_section"] = [4, 6, 6]
        (base / "config.json").write_text(json.dumps(config))
        return base
    (folder / "empty.json").write_text(json.dumps([{"messages": [{"role": "assistant", "content": ""}]}]))
    recipe = {
        "model": {
            "vision": str(write_tiny_vision("clip", folder / "vision")),
            "language": str(write_tiny_language("qwen2", folder / "language", num_attention_heads=1, head_dim=32)),
        },
        "tune": {"projector": "full"},
        "data": {"train": [{"path": str(folder / "empty.json"), "template": "messages"}]},
        "output_dir": str(folder / "unused"),
    }
    (folder / "assemble.yaml").write_text(json.dumps(recipe))
    assert entry_point(["assemble", str(folder / "assemble.yaml"), str(folder / "base")]) == 0
    return folder / "base"


@pytest.fixture(scope="module", params=FAMILIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write_run(folder, write_base(request.param, folder))


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """The address of `mmtune serve --engine vllm`; at its end, Ctrl-C leaves no process."""
    port = str(free_port())
    command = [sys.executable, "-m", "mmtune.cli.main", "serve", str(model), "--engine", "vllm", "--engine-command", VLLM]
    log = model.parent / f"log-{port}"
    with log.open("w") as errors:
        started = subprocess.Popen(
            [*command, "--port", port, "--", *OPTIONS, *options], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert started.stdout is not None
    engines: list[psutil.Process] = []
    try:
        line = ""
        while not line.startswith("serving:"):
            line = started.stdout.readline()
            assert line, log.read_text()[-3000:]
        engines = psutil.Process(started.pid).children(recursive=True)
        assert len(engines) > 1
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        started.send_signal(signal.SIGINT)
        status = started.wait(300)
    assert status == 130
    assert not psutil.wait_procs(engines, timeout=5)[1]


def test_a_good_release_passes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(run) as address:
        assert entry_point(["serve", "--check", address, "--run", str(run), "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["same_prompt_tokens"] == result["same_answers"] == result["questions"] == 7
    assert result["largest_log_probability_difference"] < 1e-3


def test_conversations_are_answered_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schema that the engine writes otherwise, and a call that it takes out of the text, are no difference."""
    base = write_base("qwen2_5_vl", tmp_path)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    write_images(tmp_path)
    run = train(base, "all", [*ROWS.values(), TEXT_BESIDE_A_CALL, A_CALL], ALL, evaluate=None)
    capsys.readouterr()
    with served(run, "--enable-auto-tool-choice", "--tool-call-parser", "hermes") as address:
        assert entry_point(["serve", "--check", address, "--run", str(run), "--json"]) == 0, capsys.readouterr()
    result = json.loads(capsys.readouterr().out)
    assert result["same_prompt_tokens"] == result["same_answers"] == len(ROWS) + 2 and not result["rounding"]
    assert list(result["unread_parts"].values()) == [4] and 'writes "description": null' in next(iter(result["unread_parts"]))
    assert result["largest_log_probability_difference"] < 1e-3
