"""An assembled model gives the same answers in plain transformers and with the OpenAI-compatible API of `transformers serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.cli.main import entry_point
from mmtune.models.assemble import assemble
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision
from mmtune.serving.engine_client import EngineAnswer, EngineClient
from mmtune.serving.engine_process import EngineProcess

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize("vision", [vision for vision, _ in PAIRS])
def test_served_answers_equal_those_of_plain_transformers(
    vision: str, models: dict[str, Path], engine: EngineProcess, tmp_path: Path
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(models[vision])
    processor = AutoProcessor.from_pretrained(models[vision])
    client = EngineClient(engine.address, str(models[vision]))
    answers = []
    for image in IMAGES:
        turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}
        inputs = processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answers.append(processor.decode(output[0, length:], skip_special_tokens=True))
        image.save(tmp_path / "image.png")
        blocks = [{"type": "image", "image": tmp_path / "image.png"}, {"type": "text", "text": "What is it?"}]
        assert client.ask([{"role": "user", "content": blocks}], 12) == EngineAnswer(answers[-1], length)
    assert answers[0] != answers[1] and all(answers)


def test_a_judge_replies_the_same_from_an_engine_as_here(models: dict[str, Path], engine: EngineProcess, tmp_path: Path) -> None:
    script, judge = tmp_path / "script.yaml", str(models["clip"])
    turns = ["{user: Name it., expect: [{judge: A cat.}]}", "{user: Again., expect: [{judge: A dog.}, {contains: cat}]}"]
    script.write_text(f"max_new_tokens: 8\nconversations:\n  - id: a\n    turns: [{', '.join(turns)}]\n")
    replies = []
    for arguments in (["--judge", judge], ["--judge", engine.address, "--judge-model", judge]):
        out = tmp_path / f"{len(replies)}.jsonl"
        entry_point(["eval", str(models["siglip"]), "--conversation", str(script), "--out", str(out), *arguments])
        results = [result for line in out.read_text().splitlines() for result in json.loads(line)["results"]]
        replies.append([result["judgement"]["replies"] for result in results if result["judgement"]])
    assert replies[0] == replies[1]
    assert len(replies[0]) == 2 and all(reply for pair in replies[0] for reply in pair)
