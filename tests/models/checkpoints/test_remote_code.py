"""Code in a run, a model, an adapter or a base is executed only with permission on the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from peft.tuners.prompt_tuning import PromptEmbedding
from transformers import dynamic_module_utils

from mmtune.cli.main import entry_point
from mmtune.console.library_output import configure_console
from mmtune.recipe.recipe import Recipe
from mmtune.utils.manifest import write_manifest

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
class OwnConfig(LlavaConfig): pass
class OwnModel(LlavaForConditionalGeneration): config_class = OwnConfig
class OwnProcessor(LlavaProcessor): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnImageProcessor(CLIPImageProcessor): pass
"""
AUTO_MAPS: dict[str, dict[str, Any]] = {
    "config.json": {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "own.OwnProcessor"}, "processor_class": "OwnProcessor"},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"},
}


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code creates when it is executed; standard input answers "y" to every question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)  # transformers' default
    return tmp_path / "executed"


def with_code(base: Path, out: Path, marker: Path, *files: str) -> Path:
    """A copy of a checkpoint whose files name classes of its own code."""
    shutil.copytree(base, out)
    (out / "own.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    for name in files:
        content = json.loads((out / name).read_text(encoding="utf-8")) | AUTO_MAPS[name]
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return out


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], base: Path, rows: Path, tmp_path: Path, marker: Path) -> Path:
    """A finished run from someone else, with code in its model and a recipe that trusts it."""
    evaluate = f"evaluate={{data: [{{path: {rows}, template: llava, limit: 1}}], leakage: warn, max_new_tokens: 1}}"
    tune = "tune={projector: {method: full, learning_rate: 1e-3}}"
    recipe = make_recipe("model.trust_remote_code=true", evaluate, tune)
    with_code(base, tmp_path / "run" / "model", marker, "config.json")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return tmp_path / "run"


COMMANDS = {
    "chat": ["chat", "{run}", "--prompt", "what?", "--max-new-tokens", "1"],
    "eval": ["eval", "{run}"],
    "merge": ["merge", "{run}", "{run}-out", "--samples", "1"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_recipe_of_a_run_cannot_allow_code(run: Path, marker: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = [part.format(run=run) for part in COMMANDS[command]]
    assert entry_point(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "--trust-remote-code" in errors[-1]
    assert not marker.exists()


def test_code_is_executed_with_the_command_line_flag(run: Path, marker: Path) -> None:
    assert entry_point([*(part.format(run=run) for part in COMMANDS["chat"]), "--trust-remote-code"]) == 0
    assert marker.exists()


def test_a_run_without_code_needs_no_permission(run: Path, marker: Path, base: Path) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(base, run / "model")
    assert entry_point([part.format(run=run) for part in COMMANDS["chat"]]) == 0


def test_an_attention_kernel_in_the_recipe_of_a_run_needs_permission(
    run: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(base, run / "model")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    changed = recipe.replace("attn_implementation: null", "attn_implementation: someone/kernel")
    assert changed != recipe
    (run / "recipe.yaml").write_text(changed, encoding="utf-8")
    assert entry_point([part.format(run=run) for part in COMMANDS["chat"]]) == 2
    assert "someone/kernel, which is executed only with --trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_transformers_does_not_ask_for_permission_on_standard_input(
    base: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    model = with_code(base, tmp_path / "model", marker, file)
    entry_point(["chat", str(model), "--prompt", "what?", "--max-new-tokens", "1"])
    captured = capsys.readouterr()
    assert "Do you wish to run" not in captured.out + captured.err
    assert sys.stdin.read() == "y\n" * 50
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_train_and_plan_do_not_ask_for_permission_on_standard_input(
    make_recipe: Callable[..., Recipe], base: Path, tmp_path: Path, marker: Path, verb: str
) -> None:
    model = with_code(base, tmp_path / "model", marker, "processor_config.json", "tokenizer_config.json")
    make_recipe()
    entry_point([verb, str(tmp_path / "recipe.yaml"), f"model.base={model}", "train.max_steps=1"])
    assert sys.stdin.read() == "y\n" * 50
    assert not marker.exists()


def test_peft_does_not_ask_for_permission_on_standard_input(base: Path, tmp_path: Path, marker: Path) -> None:
    tokenizer = with_code(base, tmp_path / "model", marker, "tokenizer_config.json")
    unknown = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tokenizer / "config.json").write_text(json.dumps(unknown), encoding="utf-8")
    configure_console()
    settings = {"num_virtual_tokens": 2, "token_dim": 4, "num_transformer_submodules": 1}
    settings |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        PromptEmbedding(PromptTuningConfig(tokenizer_name_or_path=str(tokenizer), **settings), torch.nn.Embedding(10, 4))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "SHADOW"}, "peft_type: expected one of the methods lora"),
        ({"peft_type": None}, "got None"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}}, "megatron_config: Megatron models are not supported"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a hub id or a path, got None"),
    ],
)
def test_an_unsupported_adapter_configuration_is_an_error(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(base, adapter)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)} | changes
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert entry_point(["chat", str(adapter), "--prompt", "what?"]) == 2
    assert message in capsys.readouterr().err


def test_the_code_of_an_adapters_base_is_not_executed(base: Path, tmp_path: Path, marker: Path) -> None:
    other = with_code(base, tmp_path / "other", marker, "config.json", "tokenizer_config.json")
    adapter = tmp_path / "adapter"
    shutil.copytree(base, adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(other)}), encoding="utf-8"
    )
    assert entry_point(["chat", str(adapter), "--prompt", "what?"]) == 2
    assert not marker.exists()


class CreatesFile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self._path,)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_pickle_with_code_is_an_error(
    base: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"weight": CreatesFile(marker)}, model / "pytorch_model.bin")
    if damaged:
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04garbage")
    assert entry_point(["chat", str(model), "--prompt", "what?"]) == 2
    assert "expected a pickle file with tensors and numbers only" in capsys.readouterr().err
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    torch.save({"weight": CreatesFile(marker)}, model / "adapter_model.bin")
    assert entry_point(["chat", str(model), "--prompt", "what?"]) == 2
    assert "expected its weights in adapter_model.safetensors" in capsys.readouterr().err
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_from_a_checkpoint_with_code_is_an_error(
    make_recipe: Callable[..., Recipe], tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    make_recipe()
    command = ["train", str(tmp_path / "recipe.yaml"), "train.save_strategy=steps", "train.save_steps=1"]
    assert entry_point(command) == 0
    (tmp_path / "run" / "summary.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    shutil.rmtree(checkpoint.with_name("checkpoint-3"))
    torch.save(CreatesFile(marker), checkpoint / file)
    write_manifest(checkpoint)
    assert entry_point([*command, "--resume"]) == 2
    assert f"resume: {checkpoint}: expected a pickle file with tensors and numbers only" in capsys.readouterr().err
    assert not marker.exists()
