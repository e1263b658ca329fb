"""Startup of the command line: help and invalid commands import no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mmtune.recipe.pass_through import library_facts
from mmtune.recipe.pass_through.arguments import train_arguments
from mmtune.recipe.pass_through.library_facts import FACTS, library_fact
from mmtune.recipe.recipe import load_recipe
from mmtune.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
model: {base: "builtin:tiny-llava"}
data:
  train: [{path: rows.json, template: llava}]
evaluate:
  data: [{path: rows.json, template: llava}]
train: {max_steps: 2, lr_scheduler_type: cosine}
output_dir: run
"""
VERBS = ["train", "plan", "eval", "merge", "push", "chat", "report", "methods", "assemble", "data", "recipe"]
VERBS += ["data check", "data show", "data digits", "recipe check", "recipe schema", "recipe list", "recipe copy"]
SPLITS = "{vision: openai/clip-vit-large-patch14, language: lmsys/vicuna-7b-v1.5}"
COMMANDS = [
    # exit code, command line
    *((0, f"{verb} --help".strip()) for verb in ["", *VERBS]),
    (0, "--version"),
    (0, "recipe list"),
    (0, "recipe schema"),
    (0, "recipe copy quickstart copied.yaml"),
    (0, "methods"),
    (0, "recipe check x.yaml"),
    (0, "recipe check x.yaml model.base=builtin:tiny-llava-untrained"),
    (0, "recipe check x.yaml model.base=nobody/nothing"),
    (0, "recipe check parts.yaml"),
    # mistakes on the command line
    (2, ""),
    (2, "trian x.yaml"),
    (2, "train x.yaml --train.max_steps=3"),
    (2, "recipe copy quickstrat"),
    (2, "plan x.yaml --memory lots"),
    (2, "merge --adapter run:much out"),
    (2, "chat ./gone --window 5 1"),
    (2, "train x.yaml --resume --overwrite"),
    # in a path
    (2, "train gone.yaml"),
    (2, "train x.yaml output_dir=taken"),
    (2, "train x.yaml output_dir=rows.json/run"),
    (2, "train x.yaml data.train.0.path=gone.json"),
    (2, "plan x.yaml model.base=./gone"),
    (2, "data check gone.json"),
    (2, "data check rows.json --template lava"),
    (2, "data check x.yaml data.train.0.media_root=gone"),
    (2, "data show x.yaml data.train.0.path=gone.json"),
    (2, "eval ./gone"),
    (2, "chat ./gone"),
    (2, "chat builtin:tiny-llava --image gone.png --prompt hello"),
    (2, "merge ./gone out"),
    (2, "merge language taken"),
    (2, "merge language rows.json/out"),
    (2, "report ./gone"),
    (0, "report done"),
    # in a recipe
    *((2, f"{verb} x.yaml train.learning_rte=1e-4") for verb in ("train", "plan", "recipe check", "data check", "data show")),
    (2, "eval builtin:tiny-llava --recipe x.yaml evaluate.scroe=choices"),
    (2, "train x.yaml --rehearse train.learning_rte=1e-4"),
    (2, "assemble x.yaml out train.learning_rte=1e-4"),
    (2, "train x.yaml tune.language.target_moduls=q_proj"),
    (2, "train x.yaml train.lr_scheduler_type=warmup_stable_decay"),
    (2, "train x.yaml train.optim=grokadamw"),
    (2, "train x.yaml data.train.0.template=lava"),
    (2, "plan x.yaml model.base=language"),
    (2, "recipe check x.yaml model.base=unknown"),
    (2, "recipe check x.yaml model.base=qwen tune.language=prefix_tuning"),
    (2, "recipe check x.yaml model.base=paligemma data.packing=true data.max_tokens=64"),
]
CHILD = """
import json, sys
from mmtune.cli.main import entry_point

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "sklearn", "trl", "torchvision", "bitsandbytes")
for command in json.load(sys.stdin):
    try:
        code = entry_point(command)
    except SystemExit as ended:
        code = ended.code
    print(json.dumps([command, code, [name for name in HEAVY if name in sys.modules]]), file=sys.stderr)
    if any(name in sys.modules for name in HEAVY):
        break
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": turns}]), encoding="utf-8")
    (tmp_path / "x.yaml").write_text(RECIPE, encoding="utf-8")
    (tmp_path / "parts.yaml").write_text(RECIPE.replace('{base: "builtin:tiny-llava"}', SPLITS), encoding="utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    figures = {"trainable_parameters": 1, "total_parameters": 2, "train_seconds": 3.0, "peak_memory_mb": 4.0}
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "summary.json").write_text(json.dumps(figures), encoding="utf-8")
    for base, model_type in {"language": "llama", "unknown": "own", "qwen": "qwen2_5_vl", "paligemma": "paligemma"}.items():
        (tmp_path / base).mkdir()
        (tmp_path / base / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return tmp_path


def test_no_library_is_imported_for_help_or_for_a_mistake(folder: Path) -> None:
    commands = [line.split() for _, line in COMMANDS]
    # In one process after the other: the first command that imports a library ends it, and names itself.
    done = subprocess.run(
        [sys.executable, "-c", CHILD], cwd=folder, input=json.dumps(commands), capture_output=True, text=True, check=False
    )
    reports = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[[")]
    assert [report for report in reports if report[2]] == [], done.stderr[-2000:]
    assert [(code, " ".join(command)) for command, code, _ in reports] == COMMANDS, done.stderr[-2000:]


SLOW = ("model_types",)  # reads the configuration classes of every family


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FACTS])
def test_stored_library_facts_equal_the_installed_library(name: str) -> None:
    library, read = FACTS[name]
    stored = json.loads(library_facts.STORED.read_text(encoding="utf-8"))[name]
    again = "python tests/helpers/write_library_facts.py"
    assert (stored["library"], stored["version"]) == (library, metadata.version(library)), again
    assert stored["value"] == json.loads(json.dumps(read())), again


@pytest.mark.parametrize("version", ["installed", "another"])
def test_the_library_is_imported_if_another_version_is_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """A key that is not stored is unknown, unless what is stored is of another version: then the library knows it."""
    facts: dict[str, Any] = json.loads(library_facts.STORED.read_text(encoding="utf-8"))
    del facts["training_arguments"]["value"]["weight_decay"]
    if version == "another":
        facts["training_arguments"]["version"] = "5.0.0"
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    monkeypatch.setattr(library_facts, "STORED", folder / "facts.json")
    caches = (library_facts._stored, library_fact, train_arguments)
    for cache in caches:
        cache.cache_clear()
    try:
        recipe = load_recipe(folder / "x.yaml", ["train.weight_decay=0.1"])
    except UserError as error:
        assert version == "installed"
        assert "train.weight_decay=0.1: unknown key" in str(error)
    else:
        assert version == "another"
        assert recipe.train["weight_decay"] == 0.1
    finally:
        for cache in caches:
            cache.cache_clear()
