"""The command line: exit codes, one clear message for a user error, only JSON with --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmtune.cli import recipe_verbs
from mmtune.cli.main import entry_point
from mmtune.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    make_recipe()
    return tmp_path / "recipe.yaml"


def write_row(tmp_path: Path, **changes: object) -> str:
    """A file with one good row and one that `changes` spoil; returns the override that trains on it."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
    good = {"image": "a.png", "conversations": turns}
    (tmp_path / "spoilt.jsonl").write_text(json.dumps(good) + "\n" + json.dumps({**good, **changes}) + "\n")
    return f"data.train.0.path={tmp_path / 'spoilt.jsonl'}"


HUMAN = {"from": "human", "value": "<image>\nWhat is it?"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "gone.png"}, "spoilt.jsonl:2: image: no such file"),
        ({"image": "../a.png"}, "spoilt.jsonl:2: image: '../a.png' is outside media_root"),
        ({"conversations": [HUMAN]}, "spoilt.jsonl:2: messages: expected an answer as the last turn, got a turn of the user"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "spoilt.jsonl:2: messages[1]: the answer is empty"),
        (
            {"image": ["a.png", "a.png"]},
            "spoilt.jsonl:2: image: expected one '<image>' placeholder for each image, got 1 for 2",
        ),
        ({"image": None}, "spoilt.jsonl:2: image: expected one '<image>' placeholder for each image, got 1 for 0"),
        ({"conversations": [{"from": "humam", "value": ""}]}, "unknown role 'humam'; did you mean 'human'?"),
    ],
)
def test_a_bad_row_is_named_before_weights_are_loaded(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    base = tmp_path / "no_weights"  # loading it would be another error: the row's comes first
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llava"}')
    overrides = [write_row(tmp_path, **changes), f"model.base={base}"]
    assert entry_point(["train", str(recipe_file), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1e-4", "did you mean 'learning_rate'?"),
        ("train.learning_rate=fast", "train.learning_rate"),
        (
            "data.train.0.template=lava",
            "unknown data template 'lava'; expected a shipped one or a .yaml file; did you mean 'llava'",
        ),
        ("data.train.0.path=nowhere.json", "nowhere.json"),
        ("tune.language.target_modules=[q_prj]", "'q_prj' matches no module of the language component; did you mean 'q_proj'?"),
        ("model.base=builtin:tiny-lava", "builtin:tiny-llava"),
        ("model.chat_template=vicuna", "did you mean 'vicuna_v1'?"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_message(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert entry_point(["train", str(recipe_file), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_base_without_a_chat_template_is_rejected(
    recipe_file: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():  # no weights either: the refusal comes before they are missed
        if file.name not in ("chat_template.jinja", "model.safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
    assert entry_point(["train", str(recipe_file), f"model.base={bare}"]) == 2
    assert f"model.base={bare}: the model has no chat template; set model.chat_template to " in capsys.readouterr().err


def test_an_earlier_run_is_kept_unless_overwritten(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["train", str(recipe_file)]) == 0
    first = (tmp_path / "run" / "summary.json").read_bytes()
    assert entry_point(["train", str(recipe_file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").read_bytes() == first
    assert entry_point(["train", str(recipe_file), "--overwrite", "train.max_steps=1"]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert entry_point(["train", str(recipe_file), "--overwrite", f"output_dir={tmp_path / 'precious'}"]) == 2
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_a_run_directory_is_complete_and_machine_readable(
    recipe_file: Path, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "leakage: warn, max_new_tokens: 4, answer_after: 'Answer:'"
    evaluate = f"evaluate={{data: [{{path: {rows}, template: llava}}], {settings}}}"
    assert entry_point(["train", str(recipe_file), evaluate, "--json"]) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    run = tmp_path / "run"
    assert f"run: {run} (report.html, summary.json, adapter/)\n" in captured.err
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["questions"] == 12
    for key in ("base_score", "tuned_score", "baseline", "train_seconds", "peak_memory_mb"):
        assert isinstance(summary[key], float), key
    low, high = summary["tuned_interval"]
    assert low <= summary["tuned_score"] <= high
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.yaml", "environment.json", "data_report.json", "metrics.jsonl", "modules.json", "first_batch.json"}
    assert names >= {"report.html", "adapter"}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"][:2] == ["mmtune", "train"]
    assert environment["versions"]["transformers"]
    assert environment["seed"] == 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 3

    after = (run / "answers_after.jsonl").read_bytes()
    assert entry_point(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tuned_scores"] == summary["tuned_scores"]
    assert result["answers"] == str(run / "answers_eval.jsonl")
    assert (run / "answers_eval.jsonl").read_bytes() == (run / "answers_after.jsonl").read_bytes() == after
    assert entry_point(["report", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert entry_point(["merge", str(run), str(tmp_path / "merged"), "--samples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merge_same_answers"] == 2
    image = str(next((rows.parent / "images").rglob("*.png")))
    assert entry_point(["chat", str(run), "--image", image, "--prompt", "What?", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "What?"


def test_the_output_path_of_answers_is_checked_before_weights_load(
    recipe_file: Path, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.models.load.load_trained", None)
    recipe_file.write_text(recipe_file.read_text() + f"evaluate: {{data: [{{path: {rows}, template: llava}}]}}\n")
    (tmp_path / "answers_after.jsonl").write_text("the run's")  # the recipe's folder looks like a run's
    for out, message in {
        str(tmp_path / "answers_after.jsonl"): "this file holds the run's own answers and is not replaced; give another file",
        str(recipe_file): "expected a new file or a .jsonl file",
        str(recipe_file / "x.jsonl"): f"--out {recipe_file / 'x.jsonl'}: cannot write in {recipe_file}: ",
    }.items():
        assert entry_point(["eval", "builtin:tiny-llava", "--recipe", str(recipe_file), "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "answers_after.jsonl").read_text() == "the run's"


def test_skipped_evaluation_is_reported(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe()
    run = tmp_path / "finished"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    figures = {"trainable_parameters": 1, "total_parameters": 2, "train_seconds": 3.0, "peak_memory_mb": 4.0}
    (run / "summary.json").write_text(json.dumps(figures))
    assert entry_point(["report", str(run)]) == 0
    assert "no evaluation: the recipe has no evaluate section" in capsys.readouterr().out
    assert entry_point(["eval", str(run)]) == 2
    assert "has no evaluate section; give a recipe that has one: --recipe FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: mmtune [-h] [--version] VERB ...\n\nParameter-efficient"),
        (["data"], "write the data set of the quickstart"),
        (["trian", "x.yaml"], "; did you mean 'train'?"),
        (["recipe", "chek", "x.yaml"], "; did you mean 'check'?"),
        (["train"], "the following arguments are required: RECIPE\n"),
        (["train", "x.yaml", "--overwite"], "unrecognized arguments: --overwite; did you mean '--overwrite'?"),
        (["data", "check", "x.jsonl", "--templat", "llava"], "--templat llava; did you mean '--template'?"),
        (["recipe", "list", "--all"], "unrecognized arguments: --all\n"),
    ],
)
def test_mistakes_in_the_command_are_reported_with_a_suggestion(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        entry_point(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "no such run: nowhere"),
        (["merge", "nowhere", "out"], "no such run or model: nowhere"),
        *(
            (
                [*verb, "noeval.yaml", *rest],
                f"noeval.yaml is a file; expected a directory of a {what}; the run of a recipe is the directory",
            )
            for *verb, what, rest in (
                ("eval", "run or model", []),
                ("merge", "run or model", ["out"]),
                ("chat", "run or model", []),
                ("report", "run", []),
            )
        ),
        (["train", "quickstart"], "this is a shipped recipe: `mmtune recipe copy quickstart`, then give quickstart.yaml"),
        (["recipe", "check", "tab.yaml"], "tab.yaml:2: not valid YAML: "),
        (["recipe", "check", "tab.yaml"], "indent with spaces"),
        (
            ["eval", "builtin:tiny-llava", "--recipe", "empty/x.yaml"],
            "no such recipe file; the nearest existing folder is empty\n",
        ),
        (["chat", "./nowhere", "--prompt", "hello"], "no such run or model"),
        (["recipe", "copy", "quickstrat"], "did you mean 'quickstart'?"),
        (
            ["chat", "builtin:tiny-llava", "--chat-template", "nosuch", "--prompt", "?"],
            "error: --chat-template: unknown name 'nosuch'",
        ),
        (["recipe", "check", "nowhere.yaml"], "nowhere.yaml"),
        (["chat", "builtin:tiny-llava", "--image", "gone.png", "--prompt", "hello"], "gone.png"),
    ],
)
def test_other_mistakes_are_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noeval.yaml").touch()
    (tmp_path / "tab.yaml").write_text("tune:\n\tvision: full\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").touch()
    assert entry_point(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_verbs, "_recipe_list", interrupted)
    assert entry_point(["recipe", "list"]) == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(recipe_verbs, "_recipe_list", broken)
    with pytest.raises(ZeroDivisionError):
        entry_point(["recipe", "list"])


def test_processes_other_than_the_main_one_print_their_rank(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_verbs, "configure_console", lambda: None)
    monkeypatch.setenv("RANK", "3")
    assert entry_point(["train", str(recipe_file), "train.fsdp=true"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("[rank 3] error: ")
    assert "fsdp2.yaml" in output


@pytest.mark.slow
def test_accelerate_launches_the_file_itself(recipe_file: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    command = [*launch, "--mixed_precision", "no", "mmtune/train.py", str(recipe_file), "train.max_steps=1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_assemble_writes_a_checkpoint_that_plain_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision

    vision, language = write_tiny_vision("siglip", tmp_path / "vision"), write_tiny_language("qwen2", tmp_path / "language")
    overrides = [f"model.vision={vision}", f"model.language={language}", "model.chat_template=chatml", "model.projector=mlp"]
    recipe = ROOT / "recipes" / "llava_lora.yaml"
    command = ["assemble", str(recipe), str(tmp_path / "out"), *overrides, "model.vision_feature_select_strategy=full"]
    assert entry_point(command) == 0
    model = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "out"))
    processor = AutoProcessor.from_pretrained(str(tmp_path / "out"))
    inputs = processor(images=Image.new("RGB", (50, 80)), text="<image> a cat", return_tensors="pt")
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    assert entry_point(command) == 2


def test_a_recipe_is_checked_against_the_family_of_a_local_base(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "qwen"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    make_recipe()
    file, prefix = str(tmp_path / "recipe.yaml"), "tune.language={method: prefix_tuning}"
    assert entry_point(["recipe", "check", file, f"model.base={base}", prefix]) == 2
    assert "no position in qwen2_5_vl (mRoPE); use gated_prefix or lora" in capsys.readouterr().err
    assert entry_point(["recipe", "check", file, f"model.base={base}"]) == 0
    assert entry_point(["recipe", "check", file, "model.base=nobody/nothing", prefix]) == 0
    assert "not checked without a download: whether nobody/nothing exists" in capsys.readouterr().out


def test_a_tilde_is_the_home_directory_in_every_path(
    recipe_file: Path, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "base").symlink_to(base)
    (home / "rows").symlink_to(rows.parent)
    (home / "recipe.yaml").symlink_to(recipe_file)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    paths = ["model.base=~/base", "data.train.0.path=~/rows/rows.json", "data.train.0.media_root=~/rows"]
    train = ["train", "~/recipe.yaml", *paths, "train.max_steps=1", "output_dir=~/run"]
    assert entry_point(train) == 0, capsys.readouterr()
    assert (home / "run" / "adapter").is_dir() and not list(tmp_path.glob("**/~*"))
    image = f"~/rows/{next(rows.parent.glob('**/*.png')).relative_to(rows.parent)}"
    assert entry_point(["chat", "~/run", "--image", image, "--prompt", "~ what?", "--max-new-tokens", "1"]) == 0
    assert entry_point(["train", str(recipe_file), "output_dir=~nobody-of-that-name/run", "train.max_steps=1"]) == 0
    assert (tmp_path / "~nobody-of-that-name").is_dir()  # no such user: the text is a path like any other


def test_a_row_that_is_too_long_is_named_before_weights_are_loaded(
    recipe_file: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).symlink_to(file)
    command = ["train", str(recipe_file), f"model.base={bare}", "data.max_tokens=8", "data.over_length=error"]
    for _ in range(2):  # the first start leaves nothing that blocks the second
        assert entry_point(command) == 2
        error = capsys.readouterr().err
        assert "12 rows are too long, the first: rows.json[0]: messages: " in error and "more than data.max_tokens: 8" in error
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_trained_leaves_nothing(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stream is not counted beforehand, so its first long row ends the run in its first step."""
    command = ["train", str(recipe_file), "data.stream=true", "data.max_tokens=8", "data.over_length=error"]
    for _ in range(2):
        assert entry_point(command) == 2
        assert "more than data.max_tokens: 8" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
