"""Trackers: what a run sends to those of its recipe, read back from their files, and how their runs end and continue."""

from __future__ import annotations

import json
import socket
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from markdown import markdown
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from transformers import TrainingArguments
from wandb.proto import wandb_internal_pb2

from mmtune.data.data_report import DataReport, RowIssue
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.trackers import run_trackers
from mmtune.training.trackers.tensorboard_tracker import markdown_table
from mmtune.training.trainer import TuningTrainer
from mmtune.training.training_arguments import build_training_arguments
from mmtune.utils.errors import UserError

ANSWERS = {"row", "question", "reference", "base answer", "answer", "right or wrong", "score"}


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wandb_records(file: Path) -> list[Any]:
    """The records of a W&B file: a 7-byte header, then LevelDB's log format, a record in one or several chunks of a block."""
    wandb.teardown()  # its process writes the rest
    data, at, body, records = file.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        body += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            records.append(wandb_internal_pb2.Record.FromString(body))
            body = b""
    return records


def wandb_items(records: list[Any], kind: str) -> list[dict[str, Any]]:
    """The history, summary or config of W&B records, each record as a dictionary by dotted key."""
    chosen = [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]
    values = [each.item if kind == "history" else each.update for each in chosen]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in each} for each in values]


def trackio_rows(folder: Path, project: str) -> list[dict[str, Any]]:
    database = sqlite3.connect(folder / f"{project}.db")
    rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
    database.close()
    return rows


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All trackers in a folder of the test, and no connection to the network."""

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"{address} was called"  # W&B speaks to a process of its own
        connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    folders = {"TRACKIO_DIR": "trackio", "WANDB_CACHE_DIR": "cache", "WANDB_CONFIG_DIR": "config", "WANDB_DATA_DIR": "data"}
    for variable, folder in {**folders, "HOME": "home"}.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # its settings are read once
    yield tmp_path
    wandb.teardown()


def held_out(rows: Path, more: str = "") -> str:
    return f"evaluate={{data: [{{path: {rows}, template: llava, limit: 3}}], leakage: warn{more}}}"


@pytest.mark.slow
def test_each_tracker_has_what_the_run_has(
    make_recipe: Callable[..., Recipe], rows: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer's log, the evaluations, the scores before and after, sample answers, the recipe and the summary."""
    trackers = ("train.report_to=[tensorboard, wandb, trackio]", "train.project=reading", "train.run_name=first")
    evaluates = (
        "train.eval_strategy=steps",
        "train.eval_steps=1",
        held_out(rows, ", while_training: {answers: true}, track_answers: 2, groups: [image]"),
    )
    recipe = make_recipe(*trackers, *evaluates)
    summary = train(recipe, ["test"])
    both = metrics(recipe)
    records, evaluated = ([record for record in both if name in record] for name in ("loss", "eval_loss"))
    assert len(records) == len(evaluated) == 3
    names = records[0].keys() - {"step", "epoch"}
    expected = [{name: pytest.approx(record[name], rel=1e-5) for name in names} for record in records]
    scores = {"eval_loss": "eval/loss", "eval_exact_match": "eval/exact_match"}
    expected_scores = [{name: pytest.approx(record[name], rel=1e-5) for name in scores} for record in evaluated]
    low, high = summary["base_interval"]
    results = {"scores/exact_match": summary["base_score"], "scores_95_low/exact_match": low, "scores_95_high/exact_match": high}
    results = {name: pytest.approx(value) for name, value in results.items()}
    group = f"scores/by_image/exact_match/{summary['groups'][0]['scores'][0]['task']}"
    run = Path(recipe.output_dir)
    steps = [1, 2, 3, 3]  # of the sample answers: those of each evaluation, and those after tuning

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    board.Reload()
    for name in names:
        values = [(event.step, event.value) for event in board.Scalars(f"train/{name}")]
        assert values == [(record["step"], pytest.approx(record[name], rel=1e-5)) for record in records]
    board_scores = zip(*([event.value for event in board.Scalars(scores[name])] for name in scores), strict=True)
    assert [dict(zip(scores, values, strict=True)) for values in board_scores] == expected_scores
    before = {name: [event.value for event in board.Scalars(name) if event.step == 0] for name in results}
    assert before == {name: [value] for name, value in results.items()}
    assert [(event.step, event.value) for event in board.Scalars("scores/exact_match")][1:] == [(3, summary["tuned_score"])]
    assert [event.step for event in board.Scalars(group)] == [3]
    texts = {
        name: [str(make_ndarray(event.tensor_proto)[0], "utf-8") for event in board.Tensors(f"{name}/text_summary")]
        for name in ("answers", "recipe", "summary", "scores/table")
    }
    assert "| trainable&#95;parameters | " in texts["summary"][0] and "method: lora" in texts["recipe"][0]
    assert [event.step for event in board.Tensors("answers/text_summary")] == steps
    assert texts["answers"][0].count("\n") == 3  # two rows below the names of the columns
    images = [name for name in board.Tags()["images"] if name.startswith("answers/")]
    assert len(images) == 2 and all([event.step for event in board.Images(name)] == steps for name in images)
    assert not list((run / "checkpoints").rglob("*tfevents*"))

    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    sent = wandb_records(file)
    written = wandb_items(sent, "history")
    assert [{name: row[scores[name]] for name in scores} for row in written if "eval/loss" in row] == expected_scores
    history = [row for row in written if "train/loss" in row]
    assert [row["train/global_step"] for row in history] == [1, 2, 3]
    assert [{name: row[f"train/{name}"] for name in names} for row in history] == expected
    base, tuned = [row for row in written if "scores/exact_match" in row]
    assert {name: base[name] for name in results} == results and base["train/global_step"] == 0
    assert (tuned["scores/exact_match"], tuned["train/global_step"]) == (summary["tuned_score"], 3) and group in tuned
    tables = [(row["answers.path"], row["train/global_step"]) for row in written if "answers.path" in row]
    assert [step for _, step in tables] == steps
    table = json.loads((file.parent / "files" / tables[-1][0]).read_text(encoding="utf-8"))
    assert set(table["columns"]) == {*ANSWERS, "image"} and len(table["data"]) == 2
    staged = [path for path in (offline / "data").rglob("*") if path.is_file() and path.read_bytes().startswith(b"\x89PNG")]
    assert len(staged) == 8  # two rows, four times
    config = {name: value for each in wandb_items(sent, "config") for name, value in each.items()}
    assert config["recipe"]["tune"]["language"]["method"] == "lora"
    final = {name: value for each in wandb_items(sent, "summary") for name, value in each.items()}
    assert final["base_score"] == summary["base_score"] and final["quarantined"] == 0
    assert (final["tuned_interval_low"], final["tuned_interval_high"]) == tuple(summary["tuned_interval"])
    assert [record.exit.exit_code for record in sent if record.WhichOneof("record_type") == "exit"] == [0]

    stored = trackio_rows(offline / "trackio", "reading")
    assert [{name: row[scores[name]] for name in scores} for row in stored if "eval/loss" in row] == expected_scores
    logged = [row for row in stored if "train/loss" in row]
    assert [{name: row[f"train/{name}"] for name in names} for row in logged] == expected
    base, tuned = [row for row in stored if "scores/exact_match" in row]
    assert {name: base[name] for name in results} == results and tuned["scores/exact_match"] == summary["tuned_score"]
    answers = [row["answers"]["_value"] for row in stored if "answers" in row]
    assert len(answers) == 4 and set(answers[-1][0]) == {*ANSWERS, "images"}
    assert len(list((offline / "trackio" / "media").rglob("*.png"))) == 8  # two rows, four times
    assert [row["summary/tuned_score"] for row in stored if "summary/tuned_score" in row] == [summary["tuned_score"]]

    out = capsys.readouterr().out
    assert f"wandb: {file.parent / 'files'}; to upload it: wandb sync {file.parent}" in out
    assert f"trackio: {offline / 'trackio'}; to view it: trackio show --project reading" in out and "\x1b" not in out
    assert "gets no answers" not in out
    assert "Held-out exact_match" in out and "Uploading" not in out  # nothing is sent
    assert wandb.run is None
    assert not [path for path in (offline / "home").rglob("*") if "wandb" in path.name or "trackio" in path.name]


@pytest.mark.slow
def test_answers_and_images_stay_on_this_machine_by_default(
    make_recipe: Callable[..., Recipe], rows: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("train.report_to=[wandb, tensorboard]", held_out(rows))
    train(recipe, ["test"])
    run = Path(recipe.output_dir)
    [file] = run.glob("wandb/offline-run-*/run-*.wandb")
    written = wandb_items(wandb_records(file), "history")
    assert [row for row in written if "scores/exact_match" in row] and not [
        row for row in written if any(name.startswith("answers") for name in row)
    ]
    questions = {answer["question"] for answer in map(json.loads, RunDirectory(run).answers("after").read_text().splitlines())}
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in file.parent.rglob("*") if path.is_file()]
    assert questions and not [question for question in questions for text in texts if question in text]
    assert not list(file.parent.rglob("*.png"))
    assert (
        "wandb: gets no answers and no images of held-out rows; to send those of 8 rows: evaluate.track_answers: 8"
        in capsys.readouterr().out
    )
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert "answers/text_summary" in board.Tags()["tensors"]


@pytest.mark.slow
def test_a_resumed_run_continues_in_its_trackers(
    make_recipe: Callable[..., Recipe], offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error in step 3 ends the run in the trackers as failed. Training resumes after step 1; W&B's server is down then."""
    trackers = ("train.report_to=[tensorboard, wandb, trackio]", "train.project=reading")
    recipe = make_recipe(*trackers, "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=3")
    run, step, init, calls = RunDirectory(Path(recipe.output_dir)), TuningTrainer.training_step, wandb.init, []

    def fail(self: TuningTrainer, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 2:
            raise UserError("the step fails")
        return step(self, *arguments, **more)

    def recorded(**arguments: Any) -> Any:
        calls.append(arguments)
        return init(**arguments)

    monkeypatch.setattr(TuningTrainer, "training_step", fail)
    with pytest.raises(UserError, match="the step fails"):
        train(recipe, ["test"])
    assert wandb.run is None
    wandb.teardown()
    ids = json.loads(run.trackers.read_text())
    assert list(ids) == ["trackio"]  # not of W&B: `wandb sync` of a second offline run with one id replaces the first
    run.trackers.write_text(json.dumps({**ids, "wandb": "online17"}))
    for name, value in {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": "a" * 40, "INIT_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(TuningTrainer, "training_step", step)
    monkeypatch.setattr(wandb, "init", recorded)
    train(recipe, ["test"], resume=run.checkpoints / "checkpoint-1")

    assert [(call.get("id"), call.get("resume"), call.get("mode")) for call in calls] == [
        ("online17", "allow", None),
        (None, None, "offline"),
    ]
    files = sorted(run.path.glob("wandb/offline-run-*/run-*.wandb"))
    parts = [wandb_records(file) for file in files]
    steps = [[row["train/global_step"] for row in wandb_items(part, "history") if "train/loss" in row] for part in parts]
    exits = [record.exit.exit_code for part in parts for record in part if record.WhichOneof("record_type") == "exit"]
    assert (steps, exits) == ([[1, 2], [2, 3]], [1, 0])
    out = capsys.readouterr().out
    assert "wandb: the server does not answer (" in out
    assert f"the run is kept in {files[1].parent / 'files'}; to upload it: wandb sync {files[1].parent}" in out
    database = sqlite3.connect(offline / "trackio" / "reading.db")
    assert len(database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()) == 1
    database.close()
    logged = [row for row in trackio_rows(offline / "trackio", "reading") if "train/loss" in row]
    assert [row["train/global_step"] for row in logged] == [1, 2, 2, 3]
    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]  # step 2 of the failed part is hidden


def test_an_error_before_the_first_step_leaves_no_run(
    make_recipe: Callable[..., Recipe], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: TuningTrainer, *arguments: Any, **more: Any) -> Any:
        raise UserError("the step fails")

    monkeypatch.setattr(TuningTrainer, "training_step", fail)
    recipe = make_recipe("train.report_to=[tensorboard, wandb]")
    with pytest.raises(UserError, match="the step fails"):
        train(recipe, ["test"])
    assert wandb.run is None and not Path(recipe.output_dir).exists()


def test_an_answer_in_tensorboard_loads_nothing_from_another_machine() -> None:
    answer = "![x](https://example.com/x.png) <img src=https://example.com/y.png> | `a` *b* _c_\nnext"
    page = markdown(markdown_table([{"answer": answer}]), extensions=["tables"])
    assert "<img" not in page and "<em>" not in page and "<code>" not in page
    assert page.count("<td>") == 1 and "<br>next" in page


def test_a_tracker_gets_counts_of_the_data_report_but_no_row() -> None:
    report = DataReport(rows=9)
    report.quarantined = [RowIssue(f"train.json:{number}", "image", "secret.png", "image_unreadable") for number in range(2)]
    report.dropped_over_length = [RowIssue("train.json:7", "messages", "5000 tokens")]
    issues = run_trackers.issue_rows(report)
    assert {row["issue"]: row["rows"] for row in issues} == {"quarantined: image_unreadable": "2", "dropped as too long": "1"}
    assert "train.json" not in str(issues) and "secret" not in str(issues)


def test_wandb_without_a_login_is_rejected_before_weights_load(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # its settings are read once
    monkeypatch.setattr("mmtune.train.load_base", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"train.report_to: wandb: no login on this machine: .*WANDB_MODE=offline"):
        train(make_recipe("train.report_to=wandb"), ["test"])
    wandb.teardown()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_reporter_that_is_not_installed_is_named_before_weights_load(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mmtune.recipe.train_rules.find_spec", lambda module: None)
    monkeypatch.setattr("mmtune.train.load_base", lambda *arguments: pytest.fail("weights were loaded"))
    with pytest.raises(
        UserError, match=f"train.report_to={name}: {name} needs a library that is not installed: pip install {name}"
    ):
        train(make_recipe(f"train.report_to={name}"), ["test"])


def test_a_misspelt_reporter_is_a_recipe_error(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"train\.report_to.*did you mean 'tensorboard'"):
        make_recipe("train.report_to=tensorbord")


def test_no_tracker_gets_a_run_by_default(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """With TensorBoard installed, the hub within reach, and where transformers adds a reporter by itself."""
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://127.0.0.1:9")
    assert TrainingArguments(output_dir="unused", use_cpu=True).report_to == ["kubeflow"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    reached, callbacks = [], []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: reached.append(arguments) or [])
    plain = TuningTrainer.train

    def spied(self: TuningTrainer, **settings: Any) -> Any:
        callbacks.extend(self.callback_handler.callbacks)
        return plain(self, **settings)

    monkeypatch.setattr(TuningTrainer, "train", spied)
    train(make_recipe(), ["test"])
    assert callbacks
    assert not [each for each in callbacks if type(each).__module__.startswith("transformers.integrations")]
    assert reached == []
    assert build_training_arguments(make_recipe("train.report_to=all")).report_to[-1] == "kubeflow"
