"""`mmtune serve --check` against `transformers serve` on conversations of every kind, for runs of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dialects.tool_dialects import HERMES, SAID_OR_TEXT
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.serving.engine_process import EngineProcess
from mmtune.serving.released_model import released_model
from tests.serving.test_serving_check import other_bounds

pytestmark = pytest.mark.slow

TEMPLATE = (SAID_OR_TEXT + HERMES).replace("IMAGE", repr("<|vision_start|><|image_pad|><|vision_end|>"))
SCHEMA = {"name": "find", "parameters": {"type": "object", "properties": {"it": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": SCHEMA}]
CALL = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"it": "cat"}'}}]
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "on the mat"}


def turn(role: str, content: str, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def row(*turns: dict[str, Any], images: tuple[int, ...] = (), **keys: Any) -> dict[str, Any]:
    return {"messages": list(turns), "images": [f"{number}.png" for number in images], **keys}


SEARCH = turn("user", "<image>Find it.")
ROWS = {
    "several images": row(turn("user", "<image><image>Which is larger?"), turn("assistant", "the first one"), images=(0, 1)),
    "in another order": row(turn("user", "<image><image>Which is larger?"), turn("assistant", "the second"), images=(1, 0)),
    "images in two turns": row(
        turn("user", "<image>What is it?"),
        turn("assistant", "a cat"),
        turn("user", "Is <image> also one, and <image>?"),
        turn("assistant", "two dogs"),
        images=(0, 2, 1),
    ),
    "a system message": row(
        turn("system", "Answer in one word."), turn("user", "<image>What is it?"), turn("assistant", "bird"), images=(2,)
    ),
    "text in three turns": row(
        *(turn("user", "Hello"), turn("assistant", "hi"), turn("user", "What is two?"), turn("assistant", "one and one")),
        *(turn("user", "And three?"), turn("assistant", "two and one")),
    ),
    "a tool result": row(
        SEARCH, turn("assistant", "", tool_calls=CALL), RESULT, turn("assistant", "It is on the mat"), images=(0,), tools=TOOLS
    ),
    "tools and a system message": row(
        turn("system", "Be short."), SEARCH, turn("assistant", "which one?"), images=(2,), tools=TOOLS
    ),
}
A_CALL = row(SEARCH, turn("assistant", "", tool_calls=CALL), images=(1,), tools=TOOLS)
TEXT_BESIDE_A_CALL = row(
    SEARCH, turn("assistant", "I look.", tool_calls=CALL), RESULT, turn("assistant", "yes"), images=(1,), tools=TOOLS
)
LORA = {"language": {"method": "lora", "r": 8, "lora_alpha": 64, "target_modules": "all-linear"}}
ALL = {"vision": "full", "projector": "full", "language": "full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_base(BASES["qwen2_5_vl"], tmp_path_factory.mktemp("conversations") / "base")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_images(folder.parent)
    return folder


def write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate([(90, 70), (40, 120), (64, 64)]):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def train(base: Path, name: str, rows: list[dict[str, Any]], tune: dict[str, Any], **changes: Any) -> Path:
    """A run that has learned its rows."""
    folder = base.parent
    (folder / f"{name}.json").write_text(json.dumps(rows))
    source = {"path": str(folder / f"{name}.json"), "template": "messages"}
    recipe = {
        "model": {"base": str(base), "precision": "fp32"},
        "tune": tune,
        "data": {"train": [source]},
        "evaluate": {"data": [source], "leakage": "warn", "max_new_tokens": 12, "before": False},
        "train": {
            "max_steps": 150,
            "learning_rate": 0.003,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 3,
            "use_cpu": True,
        },
        "output_dir": str(folder / name),
    }
    for section, settings in changes.items():
        recipe[section] = settings and {**recipe[section], **settings}
    (folder / f"{name}.yaml").write_text(json.dumps({key: value for key, value in recipe.items() if value}))
    assert entry_point(["train", str(folder / f"{name}.yaml")]) == 0
    return folder / name


def check(engine: EngineProcess, run: Path, release: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The result of a check that passes, with the printed lines as `lines`."""
    model = released_model(release)
    capsys.readouterr()
    command = ["serve", "--check", engine.address, "--run", str(run), "--model-name", model.path, "--json"]
    assert entry_point(command) == 0, capsys.readouterr()
    out, lines = capsys.readouterr()
    return {**json.loads(out), "lines": lines}


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """A run of all weights that can call a function."""
    return train(base, "all", [*ROWS.values(), TEXT_BESIDE_A_CALL, A_CALL], ALL, evaluate=None)


def test_conversations_are_answered_as_trained(engine: EngineProcess, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that the engine leaves out, and a call that it takes out of the text, are no difference."""
    result = check(engine, run, run, capsys)
    assert result["same_prompt_tokens"] == result["same_answers"] == len(ROWS) + 2 and not result["rounding"]
    assert len({answer["answer"] for answer in result["answers"]}) > 6
    assert result["unread_parts"] == {"leaves out the text beside a tool call": 1} and not result["failed_answers"]
    assert "warning: the engine leaves out the text beside a tool call (1 question)" in result["lines"]
    assert result["answers"][-1]["engine_answer"] == 'find({"it": "cat"})'


def test_a_call_that_ends_too_early_is_not_compared(
    engine: EngineProcess, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.models.generation.DEFAULT_MAX_NEW_TOKENS", 12)
    result = check(engine, run, run, capsys)
    assert result["failed_answers"] == 1 and result["same_answers"] == len(ROWS) + 1
    assert result["same_prompt_tokens"] == len(ROWS) + 2
    assert "warning: 1 answers are not compared, because the engine fails at them" in result["lines"]


def test_other_pixel_bounds_are_named_beside_a_part_that_is_left_out(
    engine: EngineProcess, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run / "merged", tmp_path / "model")
    other_bounds(tmp_path / "model")
    command = ["serve", "--check", engine.address, "--run", str(run), "--model-name", str(tmp_path / "model")]
    assert entry_point(command) == 1
    assert ": the image size: questions of text alone agree" in capsys.readouterr().err


def test_a_checkpoint_of_a_quantized_run_answers_as_trained(
    engine: EngineProcess, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained model is compared without quantization, as a merge is; another checkpoint gives other answers."""
    steps = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20}
    run = train(base, "nf4", list(ROWS.values())[:4], LORA, model={"precision": "nf4"}, train=steps)
    checkpoint = run / "checkpoints" / "checkpoint-10"
    for trained in (run, checkpoint):
        result = check(engine, trained, trained, capsys)
        assert result["same_prompt_tokens"] == 4 and (result["same_answers"] == 4 or result["rounding"])
    model = released_model(checkpoint).path
    assert entry_point(["serve", "--check", engine.address, "--run", str(run), "--model-name", model]) == 1
