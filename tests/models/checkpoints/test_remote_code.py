"""Code that comes with a run, a model, an adapter or a base runs only for whoever allows it on the command line."""

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
Path({mark!r}).touch()
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
class OwnConfig(LlavaConfig): pass
class OwnModel(LlavaForConditionalGeneration): config_class = OwnConfig
class OwnProcessor(LlavaProcessor): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnImageProcessor(CLIPImageProcessor): pass
"""
BROUGHT: dict[str, dict[str, Any]] = {
    "config.json": {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "own.OwnProcessor"}, "processor_class": "OwnProcessor"},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"},
}


@pytest.fixture(autouse=True)
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the code makes; standard input agrees to whatever is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)  # as transformers has it
    return tmp_path / "ran"


def with_code(base: Path, out: Path, ran: Path, *files: str) -> Path:
    """A copy of a checkpoint whose files name classes of code beside them."""
    shutil.copytree(base, out)
    (out / "own.py").write_text(CODE.format(mark=str(ran)), encoding="utf-8")
    for name in files:
        content = json.loads((out / name).read_text(encoding="utf-8")) | BROUGHT[name]
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return out


@pytest.fixture
def run(make_recipe: Callable[..., Recipe], base: Path, rows: Path, tmp_path: Path, ran: Path) -> Path:
    """What somebody hands on as a finished run, with code beside the weights and a recipe that trusts it."""
    evaluate = f"evaluate={{data: [{{path: {rows}, template: llava, limit: 1}}], max_new_tokens: 1}}"
    tune = "tune={projector: {method: full, learning_rate: 1e-3}}"
    recipe = make_recipe("model.trust_remote_code=true", evaluate, tune)
    with_code(base, tmp_path / "run" / "model", ran, "config.json")
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return tmp_path / "run"


COMMANDS = {
    "chat": ["chat", "{run}", "--prompt", "what?", "--max-new-tokens", "1"],
    "eval": ["eval", "{run}"],
    "merge": ["merge", "{run}", "{run}-out", "--samples", "1"],
}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_runs_recipe_cannot_allow_its_own_code(run: Path, ran: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    arguments = [part.format(run=run) for part in COMMANDS[command]]
    assert entry_point(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "--trust-remote-code" in errors[-1]
    assert not ran.exists()


def test_who_runs_the_command_can_allow_it(run: Path, ran: Path) -> None:
    assert entry_point([*(part.format(run=run) for part in COMMANDS["chat"]), "--trust-remote-code"]) == 0
    assert ran.exists()


def test_a_run_that_trusted_a_base_without_code_needs_no_permission(run: Path, ran: Path, base: Path) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(base, run / "model")
    assert entry_point([part.format(run=run) for part in COMMANDS["chat"]]) == 0


def test_an_attention_kernel_of_a_runs_recipe_is_code_too(run: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "model")
    shutil.copytree(base, run / "model")
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    changed = recipe.replace("attn_implementation: null", "attn_implementation: someone/kernel")
    assert changed != recipe
    (run / "recipe.yaml").write_text(changed, encoding="utf-8")
    assert entry_point([part.format(run=run) for part in COMMANDS["chat"]]) == 2
    assert "someone/kernel, which runs only with --trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_nothing_is_asked_on_standard_input(
    base: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    model = with_code(base, tmp_path / "model", ran, file)
    entry_point(["chat", str(model), "--prompt", "what?", "--max-new-tokens", "1"])
    captured = capsys.readouterr()
    assert "Do you wish to run" not in captured.out + captured.err
    assert sys.stdin.read() == "y\n" * 50
    assert not ran.exists()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_recipe_that_does_not_allow_code_is_not_asked(
    make_recipe: Callable[..., Recipe], base: Path, tmp_path: Path, ran: Path, verb: str
) -> None:
    model = with_code(base, tmp_path / "model", ran, "processor_config.json", "tokenizer_config.json")
    make_recipe()
    entry_point([verb, str(tmp_path / "recipe.yaml"), f"model.base={model}", "train.max_steps=1"])
    assert sys.stdin.read() == "y\n" * 50
    assert not ran.exists()


def test_what_peft_loads_by_itself_is_not_asked_for_either(base: Path, tmp_path: Path, ran: Path) -> None:
    tokenizer = with_code(base, tmp_path / "model", ran, "tokenizer_config.json")
    unknown = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tokenizer / "config.json").write_text(json.dumps(unknown), encoding="utf-8")
    configure_console()
    settings = {"num_virtual_tokens": 2, "token_dim": 4, "num_transformer_submodules": 1}
    settings |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}
    with pytest.raises(ValueError, match="trust_remote_code"):
        PromptEmbedding(PromptTuningConfig(tokenizer_name_or_path=str(tokenizer), **settings), torch.nn.Embedding(10, 4))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "SHADOW"}, "peft_type 'SHADOW' is no method that mmtune loads; expected one of lora"),
        ({"peft_type": None}, "peft_type None is no method"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}}, "megatron_config: mmtune does not run Megatron models"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path: expected a name or a path, got None"),
    ],
)
def test_an_adapter_configuration_that_is_not_ours_is_one_message(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(base, adapter)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)} | changes
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert entry_point(["chat", str(adapter), "--prompt", "what?"]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_cannot_name_a_base_that_runs_code(base: Path, tmp_path: Path, ran: Path) -> None:
    other = with_code(base, tmp_path / "other", ran, "config.json", "tokenizer_config.json")
    adapter = tmp_path / "adapter"
    shutil.copytree(base, adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(other)}), encoding="utf-8"
    )
    assert entry_point(["chat", str(adapter), "--prompt", "what?"]) == 2
    assert not ran.exists()


class Runs:
    """What a pickle of it does when it is loaded: makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (self._mark,)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_pickle_that_runs_code_is_one_message(
    base: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"weight": Runs(ran)}, model / "pytorch_model.bin")
    if damaged:
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04garbage")
    assert entry_point(["chat", str(model), "--prompt", "what?"]) == 2
    assert "a file that is a pickle is refused" in capsys.readouterr().err
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    torch.save({"weight": Runs(ran)}, model / "adapter_model.bin")
    assert entry_point(["chat", str(model), "--prompt", "what?"]) == 2
    assert "expected its weights in adapter_model.safetensors" in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_runs_code_is_not_gone_on_from(
    make_recipe: Callable[..., Recipe], tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    make_recipe()
    command = ["train", str(tmp_path / "recipe.yaml"), "train.save_strategy=steps", "train.save_steps=1"]
    assert entry_point(command) == 0
    (tmp_path / "run" / "summary.json").unlink()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    shutil.rmtree(checkpoint.with_name("checkpoint-3"))
    torch.save(Runs(ran), checkpoint / file)
    write_manifest(checkpoint)
    assert entry_point([*command, "--resume"]) == 2
    assert f"resume: {checkpoint}: a file that is a pickle is refused" in capsys.readouterr().err
    assert not ran.exists()
