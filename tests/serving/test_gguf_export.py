"""`mmtune export gguf`: a converter that fails leaves nothing; the files of llama.cpp's own answer as trained."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mmtune.cli.main import entry_point
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.serving.engine_process import free_port, running_engine
from tests.serving.sentencepiece_tokenizer import character_tokenizer, write_sentencepiece
from tests.serving.test_served_conversations import ALL, row, train, turn

LLAMA_CPP = os.environ.get("MMTUNE_LLAMA_CPP", "")
INPUTS = ["input_ids", "attention_mask"]
BOUNDS = ["--image-min-tokens", "4", "--image-max-tokens", "64"]
WRITE = "import sys; file = sys.argv[sys.argv.index('--outfile') + 1]; open(file, 'wb').write(b'GGUF')\n"
FAILURES = {
    "a family that it does not take": (
        "print('ERROR:hf-to-gguf:Model FooForConditionalGeneration is not supported'); raise SystemExit(1)",
        "the vision part of qwen2_5_vl (Qwen2_5_VLForConditionalGeneration): Model FooForConditionalGeneration is not supported",
    ),
    "a full disk": (
        f"{WRITE}import os\nif '--mmproj' not in sys.argv: os.write(os.open('/dev/full', os.O_WRONLY), b'x')",
        "the language model of qwen2_5_vl (Qwen2_5_VLForConditionalGeneration): [Errno 28] No space left on device",
    ),
    "half a file": (f"{WRITE}open(file, 'wb').write(b'GG'); print('done')", "it wrote no GGUF file: done"),
    "its end by a signal": (f"{WRITE}import os; os.kill(os.getpid(), 9)", "it was ended by SIGKILL"),
    "a missing library": ("import sentencepiece_of_nobody", "pip install sentencepiece_of_nobody"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    config = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llama.cpp").mkdir()
    return tmp_path / "model"


def export(model: Path, *arguments: str) -> int:
    out, llama_cpp = model.parent / "out", model.parent / "llama.cpp"
    return entry_point(["export", "gguf", str(model), str(out), "--llama-cpp", str(llama_cpp), *arguments])


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_a_converter_that_fails_leaves_nothing(failure: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, message = FAILURES[failure]
    (model.parent / "llama.cpp" / "convert_hf_to_gguf.py").write_text(program)
    before = sorted(model.parent.rglob("*"))
    assert export(model) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert sorted(model.parent.rglob("*")) == before


def test_wrong_arguments_are_named(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(model) == 2
    assert "llama.cpp: expected a checkout of llama.cpp with convert_hf_to_gguf.py, found no such file" in capsys.readouterr().err
    (model.parent / "llama.cpp" / "convert_hf_to_gguf.py").write_text("")
    (model.parent / "out").mkdir()
    assert export(model) == 2
    assert "out exists; give another path, or --overwrite to replace it" in capsys.readouterr().err


def write_base(family: str, folder: Path) -> Path:
    """A tiny base with a tokenizer that the converter takes, and as many layers as its names of tensors need."""
    written: list[str] = []

    def tokenizer(specials: tuple[str, ...], named: dict[str, str] | None = None, **names: Any) -> PreTrainedTokenizerFast:
        written[:] = [token for token in dict.fromkeys([*specials, *(named or {}).values()]) if token != "<unk>"]
        roles = {f"{name}_token": names[name] for name in ("bos", "eos", "pad") if name in names}
        # The converter lets Gemma put no space before a text.
        return character_tokenizer(
            written, prefix_space=family != "gemma3", extra_special_tokens=named or written, model_input_names=INPUTS, **roles
        )

    def config(processor: Any) -> Any:
        config = tiny.config(processor)
        if family != "gemma3":
            config.vision_config.depth, config.vision_config.fullatt_block_indexes = 4, [1, 3]
        return config

    tiny = BASES[family]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmtune.models.tiny.tiny_bases.tiny_tokenizer", tokenizer)
        base = write_tiny_base(replace(tiny, config=config), folder / "base")
    write_sentencepiece(written, base / "tokenizer.model")
    return base


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not LLAMA_CPP, reason="needs llama.cpp: MMTUNE_LLAMA_CPP names its directory (CONTRIBUTING.md, Tests)")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_llama_cpp_answers_as_trained(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(family, tmp_path)
    rows = []
    for number, answer in enumerate(("a red cat", "two dogs", "no")):
        noise = np.random.default_rng(number).integers(0, 256, (84, 84 + 28 * number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        rows.append(row(turn("user", "<image>What is it?"), turn("assistant", answer), images=(number,)))
    rows.append(row(turn("user", "Say a word"), turn("assistant", "a word")))
    run = train(base, "run", rows, ALL)
    assert (base / "tokenizer.model").is_file()
    capsys.readouterr()
    assert entry_point(["export", "gguf", str(run), str(tmp_path / "out"), "--llama-cpp", LLAMA_CPP, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    words = shlex.split(exported["server"])
    if family == "gemma3":  # llama.cpp 0.5 leaves out the blank lines before and after an image
        assert "other tokens around an image\nrun.json[0]: 37 prompt tokens" in check(run, words, capsys)
        return
    assert words[words.index("--image-min-tokens") : words.index("--host")] == BOUNDS
    assert "answers: 4 of 4 are the trained model's" in check(run, words, capsys)
    others = [str(int(word) * 4) if word.isdigit() else word for word in BOUNDS]
    assert ": the image size: " in check(run, [*words, *others], capsys)


def check(run: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the serving check of a server prints."""
    port = free_port()
    words = [str(port) if word == "8000" else word for word in words]
    with running_engine([*words, "--threads", "1"], {}, port) as process:
        process.wait_until_ready(60.0)
        capsys.readouterr()
        entry_point(["serve", "--check", process.address, "--run", str(run)])
    return "".join(capsys.readouterr())
