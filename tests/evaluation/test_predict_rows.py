"""`mmtune predict`: rows without answers in every shipped template, a file that trains, resuming, several processes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launcher
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, prompt_messages
from mmtune.data.templates.prompts import PromptSettings
from mmtune.data.templates.template import load_data_template, shipped_templates
from mmtune.data.templates.unanswered import without_answers
from mmtune.evaluation.predictions import predict_rows
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.recipe.recipe import Source

torch.set_num_threads(1)

ANSWERS = {
    "alpaca": ["output"],
    "audio_caption": ["caption"],
    "aokvqa": ["correct_choice_idx", "direct_answers", "rationales"],
    "chartqa": ["label"],
    "classification": ["label"],
    "coco_caption": ["caption"],
    "conceptual_captions": ["txt"],
    "docvqa": ["answers"],
    "flickr30k": ["sentences"],
    "gqa": ["answer", "fullAnswer"],
    "image_text_match": ["label"],
    "prompt_completion": ["completion"],
    "query_response": ["response"],
    "scienceqa": ["answer", "solution"],
    "textvqa": ["answers"],
    "video_qa": ["answer"],
    "vqa": ["answer"],
    "vqa_v2": ["joined"],
}
"""By template, the fields of its example that say the answer."""
REPEATED = {"digit_boxes", "ocr_vqa", "refcoco", "visual_genome_qa", "visual_genome_regions"}
"""Templates that repeat a question: the earlier ones need their answers."""


@pytest.mark.parametrize("name", sorted(shipped_templates()))
def test_the_question_of_a_row_without_its_answer_is_that_of_the_row(name: str, tmp_path: Path) -> None:
    template = load_data_template(name)
    row = json.loads(json.dumps(template.example))
    for path in ("images/example.png", "image.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / path)
    rules, prompting = MediaRules(tmp_path), PromptSettings(values={})
    try:
        expected = template.sample("r", row, rules, prompting)
    except RowError as error:  # the files of its example have other names
        [missing] = map(Path, re.findall(r"no such file: (\S+)", str(error)))
        missing.parent.mkdir(parents=True, exist_ok=True)
        if missing.suffix in (".jpg", ".png"):
            Image.new("RGB", (64, 48)).save(missing)
        missing.touch()
        expected = template.sample("r", row, rules, prompting)
    if template.conversation is not None and template.conversation.field is not None:
        row[template.conversation.field].pop()
    elif name not in REPEATED:
        row = {key: value for key, value in row.items() if key not in ANSWERS[name]}
        assert len(row) < len(template.example)
    sample = without_answers(template).sample("r", row, rules, prompting)
    assert prompt_messages(sample) == prompt_messages(expected)
    answered = without_answers(template).sample("r", template.example, rules, prompting)
    assert prompt_messages(answered) == prompt_messages(expected)


@pytest.fixture
def questions(tmp_path: Path, rows: Path) -> Path:
    """Seven rows without their last answers, in a folder with the images; one is of two turns."""
    content = json.loads(rows.read_text())[:7]
    first, second = content[0]["conversations"][:2]
    content[3]["conversations"] = [first, second, {"from": "human", "value": "And again?"}, second]
    for row in content:
        row["conversations"].pop()
    (tmp_path / "data").symlink_to(rows.parent)
    (tmp_path / "questions.json").write_text(json.dumps(content))
    return tmp_path / "questions.json"


def _predict(base: Path, questions: Path, out: Path, *arguments: str) -> int:
    paths = ["--media-root", str(questions.parent / "data"), "--out", str(out)]
    return entry_point(["predict", str(base), str(questions), "--template", "llava", "--max-new-tokens", "4", *paths, *arguments])


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_predicted_rows_have_the_answers_of_the_model_and_train(
    answering_llava: tuple[Any, Any], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

    base, out = tmp_path / "base", tmp_path / "out.jsonl"
    save_checkpoint(*answering_llava, base)
    assert _predict(base, questions, out) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    [media_root] = re.findall(r"train on them with \{path: \S+out.jsonl, template: messages, media_root: (\S+)\}", printed)
    source = Source(path=str(out), template="messages", media_root=media_root)
    samples = list(iterate_rows(IndexedSamples([source])))
    expected = generate_answers(*answering_llava, samples, max_new_tokens=4, batch_size=1)
    assert [line["messages"][-1]["content"] for line in _lines(out)] == [answer.strip() for answer in expected]
    assert [line["id"] for line in _lines(out)] == [f"questions.json[{number}]" for number in range(7)]
    assert [len(line["messages"]) for line in _lines(out)] == [2, 2, 2, 4, 2, 2, 2]
    assert [*tmp_path.glob(".out*")] == []

    assert entry_point(["data", "check", str(out), "--template", "messages", "--media-root", media_root]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
        model: {{base: {base}}}
        tune: {{language: {{method: lora, r: 2}}}}
        data: {{train: [{{path: {out}, template: messages, media_root: {media_root}}}]}}
        train: {{max_steps: 1, per_device_train_batch_size: 7, use_cpu: true}}
        output_dir: {tmp_path / "run"}
        """
    )
    assert entry_point(["train", str(recipe)]) == 0
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["quarantined"] == []
    assert _predict(base, questions, out) == 2
    assert "the file exists; give another one, or --overwrite" in capsys.readouterr().err


def test_an_interrupted_prediction_continues(
    base: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out[1].jsonl"  # a name that is a pattern too
    assert _predict(base, questions, whole) == 0
    monkeypatch.setattr(predict_rows, "BATCHES_AT_ONCE", 1)
    answered: list[int] = []
    generate = predict_rows.generate_predictions

    def stopped(model: Any, processor: Any, samples: Any, *arguments: Any) -> Any:
        if sum(answered) == 4:
            raise KeyboardInterrupt
        answered.append(len(samples))
        return generate(model, processor, samples, *arguments)

    monkeypatch.setattr(predict_rows, "generate_predictions", stopped)
    assert _predict(base, questions, out, "--batch-size", "2") == 130
    assert not out.exists()
    [part] = tmp_path.glob(".out*.part-*")
    part.write_text(part.read_text()[:-5])  # a line that a kill cut off
    assert _predict(base, questions, out, "--max-new-tokens", "5") == 2
    assert "an unfinished prediction with another max_new_tokens; finish it with the same command" in capsys.readouterr().err
    asked = questions.read_text()
    questions.write_text(asked.replace("And again?", "And now?"))
    assert _predict(base, questions, out) == 2
    assert "an unfinished prediction with another content" in capsys.readouterr().err
    questions.write_text(asked)
    answered.clear()
    assert _predict(base, questions, out, "--batch-size", "4") == 0
    assert "continues: 3 of 7 rows are answered" in capsys.readouterr().out
    assert sum(answered) == 4
    assert out.read_text() == whole.read_text()
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_the_content_of_rows_has_their_images(tmp_path: Path) -> None:
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>What?"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    contents = set()
    for color in ("red", "blue", "red"):
        Image.new("RGB", (32, 32), color).save(tmp_path / "a.png")
        contents.add(predict_rows.UnansweredRows(Source(path=str(tmp_path / "rows.json"), template="llava")).content)
    assert len(contents) == 2


def test_rows_that_cannot_be_answered_are_listed_before_weights_load(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(questions.read_text())
    content[2]["image"] = "missing.png"
    questions.write_text(json.dumps(content))
    assert _predict(tmp_path, questions, tmp_path / "out.jsonl") == 2
    assert "expected a finished run" in capsys.readouterr().err
    assert _predict(Path("builtin:tiny-llava"), questions, tmp_path / "out.jsonl") == 2
    assert re.search(r"1 of 7 rows cannot be answered:\n  questions\.json\[2\]: image: no such file: ", capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_give_the_rows_and_answers_of_one(base: Path, questions: Path, rows: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    data = f"[{{path: {rows}, template: llava, limit: 5}}]"
    recipe.write_text(
        f"""
        model: {{base: {base}}}
        data: {{train: {data}}}
        evaluate: {{data: {data}, max_new_tokens: 4, batch_size: 2, cache: false}}
        output_dir: {tmp_path / "run"}
        """
    )

    def commands(name: str) -> list[list[str]]:
        predict = ["predict", str(base), str(questions), "--template", "llava", "--media-root", str(questions.parent / "data")]
        return [
            [*predict, "--max-new-tokens", "4", "--out", str(tmp_path / f"{name}_rows.jsonl")],
            ["eval", str(base), "--recipe", str(recipe), "--out", str(tmp_path / f"{name}_answers.jsonl")],
        ]

    for command in commands("one"):
        assert entry_point(command) == 0
    program = tmp_path / "program.py"
    program.write_text(
        f"from mmtune.cli.main import entry_point\nassert [entry_point(each) for each in {commands('two')}] == [0, 0]\n"
    )
    done = subprocess.run([*launcher("torchrun"), str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for kind in ("rows", "answers"):
        assert (tmp_path / f"two_{kind}.jsonl").read_text() == (tmp_path / f"one_{kind}.jsonl").read_text()
    assert done.stdout.count("predicted: ") == done.stdout.count("answers: ") == 1
