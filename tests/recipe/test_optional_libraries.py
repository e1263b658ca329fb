"""Optional libraries: a command without one reports its name in one line, or does not need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers as tf

from mmtune.cli.main import entry_point
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.utils.errors import missing_library

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys; from mmtune.cli.main import entry_point; sys.exit(entry_point(sys.argv[1:]))"


def _recipe(folder: Path, base: Path | str, template: str = "", more: str = "", evaluate: bool = False) -> Path:
    folder.mkdir()
    tf.image_utils.PIL.Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]}
    (folder / "rows.json").write_text(json.dumps([row] * 2))
    (folder / "recipe.yaml").write_text(
        f"""
        model: {{base: {base}{template}}}
        tune: {{language: {{method: lora, r: 2}}}}
        data: {{train: [{{path: {folder / "rows.json"}, template: llava}}]}}
        train: {{max_steps: 1, use_cpu: true, per_device_train_batch_size: 1{more}}}
        output_dir: {folder / "run"}
        """
    )
    if evaluate:
        with (folder / "recipe.yaml").open("a") as file:
            file.write(f"evaluate: {{data: [{{path: {folder / 'rows.json'}, template: llava}}]}}\n")
    return folder / "recipe.yaml"


NEEDS = """
import json, sys
from pathlib import Path
from mmtune.console.library_output import configure_console
configure_console()
from mmtune.utils.errors import UserError
from mmtune.models.processors.processor import read_processor
needs = []
for base in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_processor(str(base), trust_remote_code=False)
    except UserError as error:
        assert "pip install 'mmtune[vision]'" in str(error), error
        needs.append(base.name)
print(json.dumps(needs))
"""


@pytest.mark.slow
def test_the_docs_name_the_families_that_need_torchvision(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_broken_torchvision(tmp_path))}
    for family, base in BASES.items():  # without weights
        processor = base.processor()
        processor.save_pretrained(tmp_path / "bases" / family)
        base.config(processor).save_pretrained(tmp_path / "bases" / family)
    command = [sys.executable, "-c", NEEDS, str(tmp_path / "bases")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    table = [
        line.split("|")[1:4] for line in (ROOT / "docs" / "models.md").read_text().splitlines() if "/" in line and "| `" in line
    ]
    named = {name.strip(" `").replace("` (Pixtral)", "_pixtral"): "torchvision" in needs for name, _, needs in table}
    assert set(named) == set(BASES)
    assert sorted(family for family, needs in named.items() if needs) == json.loads(done.stdout.splitlines()[-1])


def _broken_torchvision(folder: Path) -> Path:
    (folder / "broken" / "torchvision").mkdir(parents=True)
    (folder / "broken" / "torchvision" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open it')")
    return folder / "broken"


@pytest.mark.slow
def test_a_torchvision_that_cannot_be_imported_counts_as_absent(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_broken_torchvision(tmp_path))}

    def run(recipe: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMMAND, "train", str(recipe)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    needs = run(_recipe(tmp_path / "qwen", write_tiny_base(BASES["qwen2_5_vl"], tmp_path / "qwen_base")))
    assert needs.returncode == 2 and "Traceback" not in needs.stderr
    assert "torchvision is installed, but it cannot be imported: libcudart.so.13: cannot open it" in needs.stderr
    assert "pip install 'mmtune[vision]'" in needs.stderr
    does_not = run(_recipe(tmp_path / "llava", "builtin:tiny-llava"))
    assert does_not.returncode == 0, does_not.stderr
    assert json.loads((tmp_path / "llava" / "run" / "environment.json").read_text())["image_backend"] == "pil"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (", optim: lomo", "recipe.yaml:5: train.optim: lomo needs a library that is not installed: pip install lomo-optim"),
        (", optim: adamw_torch_4bit", "is not installed: pip install torchao"),
        (
            ", use_liger_kernel: true",
            "train.use_liger_kernel: true needs a library that is not installed: pip install liger-kernel",
        ),
    ],
)
def test_a_missing_library_is_one_line(settings: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _recipe(tmp_path / "case", "builtin:tiny-llava", more=settings)
    assert entry_point(["train", str(recipe)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_import_errors_of_our_own_keep_their_traceback() -> None:
    assert missing_library(ImportError("x", name="mmtune.data")) is None
    assert missing_library(ModuleNotFoundError("x", name="mmtune.nothing")) is None
    assert missing_library(ImportError("cannot import name 'x' from 'torch'", name="torch")) is None
    assert missing_library(ModuleNotFoundError("No module named 'timm'", name="timm")) == "No module named 'timm'"
    wrapped = ModuleNotFoundError("Could not import module 'X'. Are this object's requirements defined correctly?")
    wrapped.__cause__ = OSError("libcudart.so.13: cannot open it\nmore")
    assert missing_library(wrapped) == f"{wrapped} (libcudart.so.13: cannot open it)"
    assert missing_library(ImportError("\nX requires the\ntimm library")) == "X requires the timm library"


@pytest.mark.parametrize(
    "command", [("recipe", "check"), ("data", "check"), ("plan",), ("train",), ("train", "--rehearse"), ("chat",), ("eval",)]
)
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.LlamaConfig(), "a language model without a vision tower; set model.language: {base} and model.vision"),
        (tf.CLIPVisionConfig(), "a vision encoder without a language model; set model.vision: {base} and model.language"),
        (tf.EvollaConfig(), "'evolla' is not supported as a base: it reads proteins; docs/families.md lists"),
    ],
    ids=["text", "vision", "proteins"],
)
def test_a_base_of_another_family_is_rejected_by_every_command(
    config: tf.PreTrainedConfig, reason: str, command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    config.save_pretrained(base)
    recipe = str(_recipe(tmp_path / "case", base, evaluate=True))
    asked = {("chat",): [str(base), "--prompt", "What?"], ("eval",): [str(base), "--recipe", recipe]}
    assert entry_point([*command, *asked.get(command, [recipe])]) == 2
    message = capsys.readouterr().err
    assert reason.format(base=base) in message and "chat_template" not in message
    assert ("model.base: " in message) == (command not in asked)
    assert not (tmp_path / "case" / "run").exists()


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (
            {"model_type": "tomorrow_vl"},
            "'tomorrow_vl' does not exist in transformers {version}: check config.json, or install a newer",
        ),
        ({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "c.C"}}, "use the release converted for transformers"),
    ],
)
def test_a_model_type_that_transformers_lacks_is_an_error(
    config: dict[str, object], advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert entry_point(["recipe", "check", str(_recipe(tmp_path / "case", tmp_path / "base"))]) == 2
    assert advice.format(version=tf.__version__) in capsys.readouterr().err


@pytest.mark.parametrize("command", [("data", "check"), ("plan",), ("train",)])
def test_a_structure_without_its_parts_is_rejected_before_weights_load(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmtune.families.structure._outside", lambda model, claimed: [])
    monkeypatch.setattr("mmtune.models.load.load_weights", None)
    monkeypatch.setattr("mmtune.models.processors.feature_counter._KEPT", {})  # of an earlier test
    assert entry_point([*command, str(_recipe(tmp_path / "case", "builtin:tiny-llava"))]) == 2
    assert "LlavaForConditionalGeneration (model_type 'llava') has no projector" in capsys.readouterr().err
