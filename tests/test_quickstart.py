"""The README's commands and every shipped recipe."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.cli.main import entry_point
from mmtune.recipe.recipe import load_recipe
from mmtune.rehearse import rehearse
from mmtune.release.merge import parity_samples
from mmtune.release.parity import collect_outputs, compare, count_same_answers
from mmtune.serving.engine_process import EngineProcess, free_port
from mmtune.utils.shipped import shipped_recipes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


QUESTIONS = 100


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which `make quickstart` has run with few steps, in the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("a checkout") / "mmtune"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    recipe = (folder / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    shorter = {
        "max_steps: 640": "max_steps: 100",
        "save_steps: 160": "save_steps: 50",
        "eval.json,": f"eval.json, limit: {QUESTIONS},",
    }
    for setting, changed in shorter.items():
        assert recipe.count(setting) == 1
        recipe = recipe.replace(setting, changed)
    (folder / "recipes" / "quickstart.yaml").write_text(recipe, encoding="utf-8")
    (folder / ".venv").symlink_to(sys.prefix)
    # -o: this environment is set up already, whatever the time stamps say
    command = ["make", "-o", ".venv/.installed", "quickstart"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Held-out exact_match" in done.stdout
    data = folder / "data" / "digits"
    (data / "few.json").write_text(json.dumps(json.loads((data / "tune.json").read_text(encoding="utf-8"))[:100]))
    (folder / "recipes" / "few_rows.yaml").write_text(recipe.replace("tune.json", "few.json"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def summary(checkout: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((checkout / "runs" / "quickstart" / "summary.json").read_text())
    return figures


def test_the_quickstart_learns_and_merges(summary: dict[str, Any]) -> None:
    """benchmarks/quickstart.py has the accuracy after all steps."""
    assert summary["questions"] == QUESTIONS
    assert summary["tuned_interval"][0] > summary["base_interval"][1]
    assert summary["merge_max_logit_difference"] < 1e-4
    assert summary["merge_same_answers"] == summary["merge_samples"] == 32
    assert summary["peak_memory_mb"] < 3000
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"] < 2_500_000


def test_quickstart_metrics_are_recomputed_from_the_answers(checkout: Path, summary: dict[str, Any]) -> None:
    """Scored here in three lines of our own, and against the digits themselves, not against the file's reference."""
    held_out = json.loads((checkout / "data/digits/eval.json").read_text())[:QUESTIONS]
    rows = {f"eval.json[{i}]": row for i, row in enumerate(held_out)}
    for when, figure in (("before", "base_score"), ("after", "tuned_score")):
        lines = (checkout / "runs/quickstart" / f"answers_{when}.jsonl").read_text().splitlines()
        answers = {answer["id"]: answer["prediction"] for answer in map(json.loads, lines)}
        assert answers.keys() == rows.keys()
        expected = {row_id: row["conversations"][-1]["value"].split("Answer: ")[1] for row_id, row in rows.items()}
        # An answer without the mark is wrong.
        right = sum(answers[row_id].rpartition("Answer:")[1:] == ("Answer:", f" {expected[row_id]}") for row_id in rows)
        assert right / len(rows) == pytest.approx(summary[figure])


def test_the_merged_model_is_the_adapter_on_its_samples(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    run = Path("runs/quickstart")
    samples = parity_samples(load_recipe(run / "recipe.yaml"), 8)
    seen = []
    for part in ("adapter", "merged"):
        model = AutoModelForImageTextToText.from_pretrained(str(run / part), dtype=torch.float32)
        seen.append(collect_outputs(model, AutoProcessor.from_pretrained(str(run / part)), samples, 16))
    assert compare(seen[0].logits, seen[1].logits).largest < 1e-4
    assert count_same_answers(*seen) == 8


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme(
    checkout: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if command in ("make quickstart", "make test"):  # the fixture ran the first, and the second is what runs this
        return
    words = shlex.split(command)
    if words[0] == "accelerate":  # test_accelerate_launches_the_file_itself trains with it
        assert words[1:3] == ["launch", "mmtune/train.py"]
        words = ["mmtune", "train", *words[3:]]
    assert words[0] in ("mmtune", ".venv/bin/mmtune"), f"no test knows how to run: {command}"
    if words[1] == "train" and words[2] == f"recipes/{Path(words[2]).name}" and set(words[3:]) <= {"--rehearse"}:
        assert Path(words[2]).stem in shipped_recipes()  # test_every_recipe_is_rehearsed rehearses it as it stands
        return
    if words[1] == "train":
        words.append("--rehearse")  # the full size needs a GPU and the hub; the rehearsal runs the same code
    if words[1] in ("data", "plan"):  # LLaVA's data are not here
        assert [word.replace("llava_lora", "few_rows") for word in words[1:]] in table_commands()  # which are run
        return
    if words[1] == "merge":
        words = ["mmtune", "merge", "runs/quickstart", "models/llava"]
    monkeypatch.chdir(checkout)
    assert entry_point(words[1:]) == 0
    printed = capsys.readouterr().out
    if words[1] == "chat":
        assert re.fullmatch(r"(\d (yes|no) ?){4}\. Answer: \d\n", printed), printed


def table_commands() -> list[list[str]]:
    """The commands of the README's table, their words in capitals filled in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1]
    filled = {
        "RECIPE": "recipes/few_rows.yaml",
        "RECIPE_OR_FILE": "recipes/few_rows.yaml",
        "RUN": "runs/quickstart",
        "RUN_OR_MODEL": "runs/quickstart",
        "OUT": "models/out",
        "DIR": "data/more",
        "NAME": "llava_lora",
        "DEST": "mine.yaml",
        "FILE": "data/digits/few.json",
        "IMAGE": "data/digits/images/eval/00001.png",
        "FILE.jsonl": "runs/quickstart/answers_after.jsonl",
        "METRIC": "exact_match",
        "A": "runs/quickstart",
        "RELEASE": "runs/quickstart/merged",
    }
    commands = []
    for cell in re.findall(r"^\| `mmtune ([^`]*)`", text, flags=re.MULTILINE):
        words = [filled.get(word, word) for word in re.sub(r"\[.*?\]", "", cell).split()]
        first, *others = " ".join(words).split(" / ")  # `recipe check RECIPE / list` is two commands of one group
        commands += [first.split(), *([words[0], *other.split()] for other in others)]
    return commands


def interrupted(_: EngineProcess) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("words", table_commands(), ids=" ".join)
def test_every_command_of_the_table(
    checkout: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "train":
        words = [*words, "--rehearse"]
    if words[0] in ("merge", "assemble"):
        words = [*words, "--overwrite"]
    if words[0] == "predict":
        words = [*words, "--template", "llava"]
    if words[0] == "serve":
        words = [*words, "--port", str(free_port())]
        monkeypatch.setattr(EngineProcess, "wait", interrupted)
    if words[:2] == ["data", "digits"]:  # the fixture ran it
        assert (checkout / "data" / "digits" / "eval.json").exists()
        return
    monkeypatch.chdir(checkout)
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    if words[0] == "export":  # llama.cpp is not in this folder; tests/serving/test_gguf_export.py runs a real one where it is
        assert entry_point(words) == 2
        assert "convert_hf_to_gguf.py" in capsys.readouterr().err
        return
    assert entry_point(words) == (130 if words[0] == "serve" else 0)
    assert capsys.readouterr().out


def test_the_table_has_every_command() -> None:
    shown = subprocess.run([str(Path(sys.prefix) / "bin" / "mmtune"), "--help"], capture_output=True, text=True, check=True)
    verbs = set(re.findall(r"^    (\w+) ", shown.stdout, flags=re.MULTILINE))
    assert verbs == {words[0] for words in table_commands()}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_recipe_is_rehearsed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # uses no file of the checkout and leaves none behind
    summary = rehearse(load_recipe(shipped_recipes()[name]))
    assert summary["quarantined"] == 0
    if "merge_same_answers" in summary:
        assert summary["merge_same_answers"] == summary["merge_samples"]
    assert list(tmp_path.iterdir()) == []
