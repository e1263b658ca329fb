"""Evaluation tasks: the benchmarks' files, the official prompts, and the scores of the benchmarks' own code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import BENCHMARKS, CAPTIONS

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples
from mmtune.data.media.media import MediaRules
from mmtune.data.templates.template import load_data_template
from mmtune.evaluation.answers import Answer, group_scores, score_answers
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.evaluate import check_questions, clusters_of, unanswered
from mmtune.evaluation.tasks import Task, load_task, read_task, shipped_tasks
from mmtune.rehearse import draw_picture, example_images
from mmtune.utils.errors import UserError

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "fixtures" / "task_scores.json").read_text(encoding="utf-8"))
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."

# The prompts of the first rows, and the paths of their images.
PROMPTS: dict[str, list[tuple[str, str]]] = {
    "pope": [(f"Is there a snowboard in the image?\n{SHORT}", "val2014/COCO_val2014_000000310196.jpg")],
    "textvqa": [(f"What is the brand of this camera?\n{SHORT}", "train_images/0000000000000000.jpg")],
    "textvqa_ocr": [
        (
            f"What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL, Single-Use\n{SHORT}",
            "train_images/0000000000000000.jpg",
        ),
        (f"What does the small white text spell?\nReference OCR token: \n{SHORT}", "train_images/0000000000000001.jpg"),
    ],
    "vqa_v2": [(f"What is this photo taken looking through?\n{SHORT}", "val2014/COCO_val2014_000000458752.jpg")],
    "chartqa": [("How many food items are shown?\nAnswer the question with a single word.", "png/human_0.png")],
    "docvqa": [
        (f"What is the 'actual' value per 1000, during the year 1975?\n{SHORT}", "documents/pybv0228_81.png"),
        (f"What is name of university?\n{SHORT}", "documents/pybv0228_81.png"),
    ],
    "scienceqa_img": [
        (
            f"Which of these states is farthest north?\nA. Ohio\nB. Utah\nC. Maine\nD. Texas\n{LETTER}",
            "images/test/4/image.png",
        ),
        (f"Context: Select one.\nWhich material?\nA. metal\nB. wool\nC. glass\n{LETTER}", "images/test/16/image.png"),
    ],
    "mmbench_en": [
        (f"Which river is shown? There are several options:\nA. Rhine\nB. Seine\nC. Thames\n\n{LETTER}", ""),
        (
            "The table is set. What is on the left? There are several options:\nA. a cup\nB. a plate\nC. a fork\nD. a knife\n\n"
            f"{LETTER}",
            "",
        ),
    ],
    "refcoco": [
        (
            "Please provide the bounding box coordinate of the region this sentence describes: the red part",
            "data/coco/train2014/COCO_train2014_000000581857.jpg",
        ),
    ],
    "mmmu": [
        (f" Who painted it?\n(A) Klee\n(B) Klimt\n(C) Manet\n(D) Monet\n\n{LETTER}", ""),
    ],
    "coco_caption": [(CAPTION, "val2014/COCO_val2014_000000000000.jpg")],
    "flickr30k": [(CAPTION, "flickr30k-images/1000090000.jpg")],
}
REFERENCES = {
    "coco_caption": tuple(CAPTIONS[0]),
    "docvqa": ("0.28",),
    "mmbench_en": ("B",),
    "mmmu": ("B",),
    "pope": ("yes",),
    "refcoco": ("[100, 100, 500, 500]",),  # until the convention of a model's family is known
    "scienceqa_img": ("C",),
    "textvqa": ("dakota",) * 7 + ("dakota digital",) * 2 + ("clos culombu",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of each benchmark."""
    paths = {name: tmp_path_factory.mktemp(name) for name in BENCHMARKS}
    for name, path in paths.items():
        BENCHMARKS[name](path)
    return paths


def _questions(task: Task) -> list[Answer]:
    rows = IndexedSamples(task.section.sources)
    samples = [rows[number] for number in range(len(rows))]
    clusters = clusters_of(samples, [rows.source_of(number) for number in range(len(rows))])
    numbered = enumerate(zip(samples, clusters, strict=True))
    return [answer for number, (each, name) in numbered for answer in unanswered(rows, number, each, task.section, name)]


def test_every_shipped_task_has_files_here_and_recorded_scores() -> None:
    assert shipped_tasks().keys() == BENCHMARKS.keys() == {*PROMPTS, "digits"} == {*RECORDED, "digits"}


@pytest.mark.parametrize("name", shipped_tasks())
def test_a_task_reads_the_files_of_its_benchmark(name: str, folders: dict[str, Path]) -> None:
    task = load_task(name, folders[name])
    check_questions(task.section)
    questions = _questions(task)
    for (prompt, image), question in zip(PROMPTS.get(name, []), questions, strict=False):
        assert question.question == prompt
        if image:
            assert question.images == (str(folders[name].resolve() / image),)
    if name in REFERENCES:
        assert questions[0].references == REFERENCES[name]


def test_the_images_of_mmmu_stand_where_the_question_and_the_options_name_them(folders: dict[str, Path]) -> None:
    sample = IndexedSamples(load_task("mmmu", folders["mmmu"]).section.sources)[1]
    blocks = [block.get("text") or block["image"].name for block in sample.messages[0]["content"]]
    assert blocks == ["Which belongs to ", "60.png", "?\n(A) ", "180.png", "\n(B) ", "120.png", f"\n\n{LETTER}"]


@pytest.mark.parametrize("name", RECORDED)
def test_the_score_is_that_of_the_benchmark_code(name: str, folders: dict[str, Path]) -> None:
    questions = _questions(load_task(name, folders[name]))
    answers = [replace(each, prediction=text) for each, text in zip(questions, RECORDED[name]["answers"], strict=True)]
    scores = {each.task: {"score": each.score, **each.further} for each in group_scores(score_answers(answers))}
    for group, expected in RECORDED[name]["scores"].items():
        assert {key: scores[group][key] for key in expected} == pytest.approx(expected, abs=1e-4)
    wrong = score_answers([replace(each, prediction="Zzz") for each in answers])
    assert group_scores(wrong)[-1].score == 0


def test_a_question_of_mmbench_counts_once_and_needs_every_order_of_its_options(folders: dict[str, Path]) -> None:
    """All passes about one image: two questions with the same options stay apart."""
    questions = _questions(load_task("mmbench_en", folders["mmbench_en"]))
    right = score_answers([replace(each, prediction=each.references[0]) for each in questions])
    overall = group_scores(right)[-1]
    assert (overall.score, overall.further) == (1, {"circular_questions": 4, "single_pass": 1})
    [wrong] = [each for each in right if "on the right" in each.question and each.references[0] == "C"]
    for prediction in ("A", "I cannot see it."):
        others = score_answers([replace(each, prediction=prediction) if each is wrong else each for each in right])
        assert group_scores(others)[-1].score == 3 / 4
        assert group_scores(others)[-1].further["single_pass"] == 12 / 13


@pytest.mark.parametrize(
    ("name", "prediction", "right"),
    [  # of the first row: the answer of POPE is yes, that of ScienceQA is C
        ("pope", "Yes.", True),
        ("pope", "YES", True),
        ("pope", "No, there is a snowboard.", False),
        ("pope", "There is a snowboard.", None),
        ("pope", "Yes. The answer is no.", None),
        ("chartqa", "14.7", True),  # the reference is 14
        ("chartqa", "14.72", False),  # within 5% of the answer, not of the reference
        ("scienceqa_img", "The answer is C.", True),
        ("scienceqa_img", "(C) Maine", True),
        ("scienceqa_img", "C or D", None),
        ("scienceqa_img", "E", None),
        ("scienceqa_img", "A. Maine", None),
        ("refcoco", '[{"bbox_2d": [110, 90, 510, 480], "label": "the red part"}]', True),
        ("refcoco", "(110, 90), (510, 480)", True),
        ("refcoco", "in the upper left", None),
    ],
)
def test_an_answer_is_right_or_wrong_or_not_parsed(
    name: str, prediction: str, right: bool | None, folders: dict[str, Path]
) -> None:
    question = _questions(load_task(name, folders[name]))[0]
    [answer] = score_answers([replace(question, prediction=prediction)])
    assert (answer.score == 1 if answer.parsed else None) == right


def test_the_command_line_evaluates_tasks_and_compares_their_answers(
    tmp_path: Path, folders: dict[str, Path], base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine.yaml"
    shutil.copy(shipped_tasks()["pope"], own)
    tasks = [f"--task=digits={folders['digits']}", f"--task={own}={folders['pope']}"]
    assert entry_point(["eval", "builtin:tiny-llava", *tasks, "evaluate.max_new_tokens=2"]) == 0
    printed = capsys.readouterr().out
    assert "digits: exact_match" in printed and "mine: yes_no" in printed
    assert re.search(r"^coco_pope_random.json: precision .*, f1 .*, yes_ratio", printed, re.MULTILINE)
    answers = read_answers(tmp_path / "answers_tiny-llava_mine.jsonl")
    assert {answer.extra["benchmark"] for answer in answers} == {"mine"}
    assert [answer.source for answer in answers[3:5]] == ["coco_pope_random.json", "coco_pope_popular.json"]
    assert entry_point(["eval", str(base), *tasks, "evaluate.max_new_tokens=2", "--out", "others", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["task"] for each in result["tasks"]] == ["digits", "mine"]
    assert result["tasks"][1]["answers"] == "others/answers_model_mine.jsonl"
    assert entry_point(["compare", "answers_tiny-llava_mine.jsonl", result["tasks"][1]["answers"], "--json"]) == 0
    assert '"rows": 12' in capsys.readouterr().out


@pytest.mark.slow
def test_a_recipe_evaluates_its_tasks_before_and_after_tuning(
    tmp_path: Path, folders: dict[str, Path], rows: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    tasks = f"[{{name: pope, path: {folders['pope']}}}, {{name: digits, path: {folders['digits']}}}]"
    recipe.write_text(
        f"model: {{base: {base}}}\ntune: {{language: lora}}\ndata: {{train: [{{path: {rows}, template: llava, limit: 4}}]}}\n"
        f"evaluate:\n  data: [{{path: {folders['digits'] / 'eval.json'}, template: llava}}]\n  max_new_tokens: 1\n"
        f"  tasks: {tasks}\ntrain: {{max_steps: 1, per_device_train_batch_size: 1}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    assert entry_point(["train", str(recipe)]) == 0
    assert "pope: yes_no" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["tasks"]) == ["pope", "digits"]
    for name, questions in {"pope": 12, "digits": 4}.items():
        metrics = summary["tasks"][name]
        before, after = (read_answers(tmp_path / "run" / f"answers_{when}_{name}.jsonl") for when in ("before", "after"))
        assert len(before) == len(after) == metrics["questions"] == questions
        assert {answer.extra["benchmark"] for answer in (*before, *after)} == {name}
        assert metrics["base_scores"][-1]["questions"] == metrics["comparison"][-1]["rows"] == questions
    assert "pope: yes_no" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert entry_point(["eval", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["task"] for each in result["tasks"]] == ["pope", "digits"]
    assert result["tasks"][0]["answers"] == str(tmp_path / "run" / "answers_eval_pope.jsonl")
    again = (tmp_path / "run" / "answers_eval_pope.jsonl").read_text(encoding="utf-8")
    assert again == (tmp_path / "run" / "answers_after_pope.jsonl").read_text(encoding="utf-8")
    assert entry_point(["train", str(recipe), "--rehearse"]) == 0


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            "[{name: popp, path: POPE}]",
            "evaluate.tasks.0: unknown task 'popp'; expected a shipped one or a .yaml file; did you mean",
        ),
        ("[{name: pope, path: POPE}, {name: digits, path: nowhere}]", "evaluate.tasks.1: task digits: no such file or folder"),
        ("[{name: pope, path: POPE}, {name: pope, path: POPE}]", "evaluate.tasks.1: expected each task once, got pope again"),
        ("{pope: POPE}", "evaluate.tasks: expected a list, got"),
    ],
)
def test_wrong_tasks_of_a_recipe_are_errors(
    tasks: str, message: str, tmp_path: Path, folders: dict[str, Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, pope = tmp_path / "r.yaml", str(folders["pope"])
    recipe.write_text(
        f"model: {{base: builtin:tiny-llava}}\ndata: {{train: [{{path: {rows}, template: llava}}]}}\noutput_dir: run\n"
        f"evaluate:\n  data: [{{path: {rows}, template: llava}}]\n  tasks: {tasks.replace('POPE', pope)}\n"
    )
    assert entry_point(["recipe", "check", str(recipe)]) == 2
    assert f"{recipe}:6: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "pope"], "--task pope: expected NAME=DIR, such as pope=data/pope; `mmtune tasks` lists the names"),
        (["--task", "popee=x"], "unknown task 'popee'; expected a shipped one or a .yaml file; did you mean 'pope'?"),
        (["--task", "mine.yaml=x"], "mine.yaml: no such task file"),
        (["--task", "pope=x", "train.seed=1"], "train.seed=1: with --task, give keys of the tasks: evaluate.KEY=VALUE"),
        (["--task", "pope=POPE", "evaluate.batchsize=1"], "command line: evaluate.batchsize=1: unknown key; did you mean"),
        (["--task", "pope=POPE", "--task", "pope=POPE"], "expected each task once, got pope again"),
        (["--task", "pope=POPE", "--out", "file.jsonl"], "--out file.jsonl: with --task, expected a folder"),
    ],
)
def test_wrong_arguments_are_errors(
    arguments: list[str],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.jsonl").touch()
    replaced = [each.replace("POPE", str(folders["pope"])) for each in arguments]
    assert entry_point(["eval", "builtin:tiny-llava", *replaced]) == 2
    assert message in capsys.readouterr().err


def test_missing_files_are_one_error_with_where_they_come_from(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["pope"], tmp_path / "pope")
    (tmp_path / "pope" / "coco_pope_popular.json").unlink()
    shutil.rmtree(tmp_path / "pope" / "val2014")
    with pytest.raises(UserError) as error:
        load_task("pope", tmp_path / "pope")
    first, *paths = str(error.value).splitlines()
    assert "github.com/RUCAIBox/POPE" in first
    assert paths == [f"  {tmp_path}/pope/val2014", f"  {tmp_path}/pope/coco_pope_popular.json"]
    with pytest.raises(UserError, match=r"val_v1.0\*.json"):
        load_task("docvqa", tmp_path / "pope")


def test_a_faulty_row_is_an_error_of_its_task(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders["pope"], tmp_path / "pope")
    (tmp_path / "pope" / "coco_pope_popular.json").write_text('{"image": "x.jpg", "text": "?", "label": "maybe"}\n{"a": 1}\n')
    assert entry_point(["eval", "builtin:tiny-llava", "--task", f"pope={tmp_path / 'pope'}"]) == 2
    error = capsys.readouterr().err
    assert "error: task pope: " in error and "pope.yaml:" in error
    assert "2 of 11 rows cannot be evaluated" in error and "coco_pope_popular.json:1" in error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("url:", "addres:", "mine.yaml:3: addres: unknown key"),
        ("source: ", "source: # ", "mine.yaml:4: source: expected a string, got null"),
        ("  metric: yes_no", "  metric: os:system", "unknown metric 'os:system'"),
        ("  metric: yes_no", "  metrik: yes_no", "mine.yaml:9: template.metrik: unknown key"),
        ("max_new_tokens: 128", "max_new_tokens: none", "mine.yaml:16: evaluate.max_new_tokens: expected an integer, got 'none'"),
        ("{{ label }}", "{{ label", "not valid Jinja"),
        ("template:\n", "template: popp\ntemplate_of:\n", "template_of: unknown key"),
        (
            "template:\n",
            "template: [1]\ntemplate_of:\n",
            "template: expected the name of a data template, a .yaml file or the keys",
        ),
        ("evaluate:\n", "evaluate: {data: 5}\nx:\n", "evaluate.data: expected a list, got 5"),
        ("evaluate:\n", "evaluate: {}\nx:\n", "x: unknown key"),
        ("evaluate:\n", "evaluate:\n  before: false\n", "mine.yaml:12: evaluate.before: has no effect in a task; leave it out"),
        ("media_root: val2014}", "join: x.json}", "does not join a second file; remove the line"),
    ],
)
def test_a_faulty_file_of_a_task_is_an_error_with_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = shipped_tasks()["pope"].read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "mine.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_task(str(tmp_path / "mine.yaml"))
    if "metri" in new:  # in the template of three sources
        assert len(str(error.value).splitlines()) == 1


def test_an_unknown_template_is_an_error_at_its_line(tmp_path: Path) -> None:
    text = "description: d\nurl: u\nsource: s\ntemplate: chartqu\nevaluate: {data: [{path: a.json}, {path: b.json}]}\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_task(str(tmp_path / "mine.yaml"))
    assert str(error.value).startswith(f"{tmp_path}/mine.yaml:4: template: unknown data template 'chartqu'")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", shipped_tasks())
def test_the_example_of_a_task_is_a_row_that_its_template_reads(name: str, tmp_path: Path) -> None:
    _, file = read_task(name)
    template = load_data_template(file.evaluate.data[0].template)
    for image in example_images(template):
        draw_picture(tmp_path / image, seed=0)
    sample = template.sample("row", template.example, MediaRules(tmp_path))
    assert sample.messages[-1]["role"] == "assistant"


def test_the_listing_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["tasks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == list(shipped_tasks())
    assert rows[[*shipped_tasks()].index("vqa_v2")]["files"] == [
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014",
    ]
    assert entry_point(["tasks"]) == 0
    assert "textvqa_ocr (textvqa_accuracy): TextVQA with Rosetta's OCR tokens" in capsys.readouterr().out
