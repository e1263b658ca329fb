"""An assembled model gives the same answers in plain transformers and with the OpenAI-style API of `transformers serve`."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.models.assemble import assemble
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision

pytestmark = pytest.mark.slow

SERVE = """
import sys
sys.modules["torchvision"] = None
from transformers.cli.transformers import main
main()
"""
"""The server without torchvision: its compiled operators do not load with every build of torch."""
TIMEOUT_S = 120.0
PAIRS = (("clip", "llama"), ("siglip", "qwen3"))
TEMPLATES = {"llama": "vicuna_v1", "qwen3": "chatml"}
IMAGES = [Image.new("RGB", (90, 60), color) for color in ("teal", "orange")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models whose answers depend on the image."""
    folder = tmp_path_factory.mktemp("models")
    out = {}
    for vision, language in PAIRS:
        paths = write_tiny_vision(vision, folder / vision), write_tiny_language(language, folder / language)
        model, processor = assemble(*map(str, paths), chat_template=TEMPLATES[language])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and ("projector" in name or "layers" in name):
                    parameter.mul_(8)
        out[vision] = folder / f"{vision}-{language}"
        save_checkpoint(model, processor, out[vision])
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running `transformers serve`."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, "HF_HOME": str(folder)}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + TIMEOUT_S
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert started.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        started.terminate()
        started.wait()


def ask(address: str, model: Path, image: Image.Image) -> tuple[str, int]:
    """The served answer and the number of prompt tokens."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    url = "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"model": str(model), "messages": [{"role": "user", "content": content}], "max_tokens": 12}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        result = json.load(response)
    return result["choices"][0]["message"]["content"], result["usage"]["prompt_tokens"]


@pytest.mark.parametrize("vision", [vision for vision, _ in PAIRS])
def test_served_answers_equal_those_of_plain_transformers(vision: str, models: dict[str, Path], server: str) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(models[vision])
    processor = AutoProcessor.from_pretrained(models[vision], backend="pil")
    answers = []
    for image in IMAGES:
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
        inputs = processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers.append(processor.decode(output[0, length:], skip_special_tokens=True))
        assert ask(server, models[vision], image) == (answers[-1], length)
    assert answers[0] != answers[1] and all(answers)
