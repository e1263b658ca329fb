"""`mmtune serve --check` against `transformers serve`: a good release passes, and each fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtune.cli.main import entry_point
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.serving.engine_process import EngineProcess

pytestmark = pytest.mark.slow

QUESTIONS = ["What is it?", "How many are there?", "Which color?", "Is it large?", "Where is it?", "Who made it?"]
ANSWERS = ["a red cat", "two dogs", "blue", "no", "on the mat", "the first one"]
SIZES = [(90, 70), (40, 120), (64, 64), (200, 60), (150, 150), (56, 28)]


def write_run(folder: Path, base: Path) -> Path:
    """A finished run whose answers depend on the image and differ from the base's, and its merge."""
    tensors = load_file(base / "model.safetensors")
    larger = {name: tensor * (20 if "lm_head" in name else 1) for name, tensor in tensors.items()}
    save_file(larger, base / "model.safetensors", {"format": "pt"})  # answers of small random weights are all the same
    random = np.random.default_rng(0)
    rows = []
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [{"role": "user", "content": f"<image>{QUESTIONS[number]}"}, {"role": "assistant", "content": ANSWERS[number]}]
        rows.append({"images": [f"{number}.png"], "messages": turns})
    rows.append({"messages": [{"role": "user", "content": "Say a word"}, {"role": "assistant", "content": "a word"}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    recipe = {
        "model": {"base": str(base)},
        "tune": {"language": {"method": "lora", "r": 8, "lora_alpha": 64, "target_modules": "all-linear"}},
        "data": {"train": [{"path": str(folder / "rows.json"), "template": "messages"}]},
        "evaluate": {
            "data": [{"path": str(folder / "rows.json"), "template": "messages"}],
            "leakage": "warn",
            "max_new_tokens": 12,
            "before": False,
        },
        "train": {
            "max_steps": 60,
            "learning_rate": 0.01,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 4,
            "use_cpu": True,
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert entry_point(["train", str(folder / "recipe.yaml")]) == 0
    assert entry_point(["merge", str(folder / "run"), str(folder / "run" / "merged"), "--dtype", "fp32"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    return write_run(folder, write_tiny_base(BASES["qwen2_5_vl"], folder / "base"))


def check(engine: EngineProcess, run: Path, model: Path) -> int:
    return entry_point(["serve", "--check", f"{engine.address}/v1", "--run", str(run), "--model-name", str(model)])


def test_a_good_release_passes(engine: EngineProcess, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(engine, run, run / "merged") == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "prompt tokens: 7 of 7" in printed and "answers: 7 of 7" in printed and "check passed" in printed
    [*_, result] = json.loads((run / "serving.json").read_text())["checks"]  # which the report shows
    assert (result["same prompt tokens"], result["same answers"], result["result"]) == ("7 of 7", "7 of 7", "passed")
    assert f'<td data-column="engine">{run / "merged"} at {engine.address}</td>' in (run / "report.html").read_text()


def test_rounding_is_a_warning(engine: EngineProcess, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one step is uncertain of its answers, so that computing in bf16 changes some."""
    uncertain = tmp_path / "run"
    assert entry_point(["train", str(run.parent / "recipe.yaml"), "train.max_steps=1", f"output_dir={uncertain}"]) == 0
    assert entry_point(["merge", str(uncertain), str(uncertain / "merged"), "--dtype", "bf16"]) == 0
    capsys.readouterr()
    assert check(engine, uncertain, uncertain / "merged") == 0, capsys.readouterr()
    printed = capsys.readouterr().out
    assert "answers: 7 of 7" not in printed
    assert "warning: rounding: every differing answer departs" in printed and "check passed" in printed


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_template(old: str, new: str) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        template = (model / "chat_template.jinja").read_text()
        assert old in template, template
        (model / "chat_template.jinja").write_text(template.replace(old, new))

    return edit


def system_last(model: Path) -> None:
    template = (model / "chat_template.jinja").read_text()
    turns, end = template.index("{% for m in"), template.index("{% if add_generation_prompt")
    (model / "chat_template.jinja").write_text(template[turns:end] + template[:turns] + template[end:])


def other_bounds(model: Path) -> None:
    edit_json(model / "processor_config.json", lambda config: config["image_processor"]["size"].update(shortest_edge=12544))


def other_mean(model: Path) -> None:
    edit_json(model / "processor_config.json", lambda config: config["image_processor"].update(image_mean=[0.0, 0.0, 3.0]))


def truncation(model: Path) -> None:
    limit = {"direction": "Right", "max_length": 60, "strategy": "LongestFirst", "stride": 0}
    edit_json(model / "tokenizer.json", lambda tokenizer: tokenizer.update(truncation=limit))


def other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] += torch.randn(tensors["lm_head.weight"].shape, generator=torch.manual_seed(0)) * 0.2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def penalty(model: Path) -> None:
    edit_json(model / "generation_config.json", lambda config: config.update(repetition_penalty=1.05))


def base_weights(model: Path) -> None:
    shutil.copy(model.parent / "base.safetensors", model / "model.safetensors")


ROLE = "'<|im_start|>' + m.role"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another chat template": (
        edit_template(ROLE, "'<|im_start|>the ' + m.role"),
        "the chat template: the engine's prompt of a short",
    ),
    "a template of as many tokens": (system_last, "the chat template: it has as"),
    "another default system prompt": (edit_template("You are a helpful", "You are a very helpful"), "the default system prompt"),
    "other pixel bounds": (other_bounds, "the image size"),
    "the weights of the base": (base_weights, "the weights: the engine answers as the untuned base"),
    "a truncated context": (truncation, "a truncated context"),
    "other weights": (other_weights, "the weights: an answer departs"),
    "another mean": (other_mean, "the images"),
    "a penalty": (penalty, "generation settings: the engine applies repetition_penalty 1.05"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(
    fault: str, engine: EngineProcess, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "merged", tmp_path / "model")
    shutil.copy(run.parent / "base" / "model.safetensors", tmp_path / "base.safetensors")
    change, cause = FAULTS[fault]
    change(tmp_path / "model")
    assert check(engine, run, tmp_path / "model") == 1, capsys.readouterr()
    assert f": {cause}" in capsys.readouterr().err
