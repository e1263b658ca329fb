"""The HTML report is self-contained, escapes hostile text, and shows wrong answers."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from mmtune.evaluation.answers import Answer
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.scores import metric_lines, print_scores, score_rows
from mmtune.methods.method_table import METHODS
from mmtune.methods.show_methods import print_methods
from mmtune.recipe.recipe import Recipe
from mmtune.report.answer_cards import BLUE, ORANGE, YELLOW, select_answers
from mmtune.report.run_report import rewrite_report, stops_reported
from mmtune.run_directory import RunDirectory
from mmtune.tuning.apply import ComponentCount, print_parameters, print_trained_modules

HOSTILE = "<script>alert('&')</script><img src=https://evil.example/x.png onerror=alert(1)>"


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def _answer(number: int, correct: bool, **changes: Any) -> Answer:
    answer = Answer(f"r[{number}]", "t", "?", (), ("x",), "y", cluster=str(number), metric="exact_match", score=float(correct))
    return dataclasses.replace(answer, **changes)


SCORE = {
    "metric": "exact_match",
    "questions": 4,
    "score": 0.25,
    "interval": (0.05, 0.7),
    "unparsed": 0,
    "missing_markers": (),
    "clusters": 4,
    "baseline": 0.5,
    "further": {},
}
SUMMARY = {
    "trainable_parameters": 1234567,
    "total_parameters": 7654321,
    "train_seconds": 12.5,
    "rows": 12,
    "quarantined": 1,
    "dropped_over_length": 2,
    "peak_memory_mb": 1500.4,
    "tuned_scores": [{"task": HOSTILE, **SCORE}, {"task": "overall", **SCORE, "score": 0.75}],
    "base_scores": [{"task": "overall", **SCORE}],
}

MakeRecipe = Callable[..., Recipe]


def _run(recipe: Recipe, answers: list[Answer], before: list[Answer]) -> tuple[RunDirectory, _Page]:
    run = RunDirectory(Path(recipe.output_dir))
    run.path.mkdir()
    run.recipe.write_text(recipe.to_yaml())
    run.update_summary(SUMMARY if answers else {name: value for name, value in SUMMARY.items() if "scores" not in name})
    write_answers(answers, run.answers("after"))
    write_answers(before, run.answers("before"))
    run.environment.write_text('{"command": ["mmtune", "train", "<b>&x</b>"], "versions": {"mmtune": "1"}}')
    run.metrics.write_text('{"step": 1, "loss": 2.0, "loss/<i>a</i>": 2.5}\n{"step": 2, "loss": 1.0, "loss/<i>a</i>": 1.5}\n')
    rewrite_report(run)
    return run, _Page(run.report.read_text(encoding="utf-8"))


def test_the_page_is_self_contained_and_shows_hostile_text_as_text(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1000, 500), (10, 200, 30)).save(tmp_path / "wide.png")
    images = (str(tmp_path / "wide.png"), str(tmp_path / "wide.png"))
    hostile = _answer(
        0, False, question=HOSTILE, prediction=HOSTILE, references=(HOSTILE,), id=HOSTILE, task=HOSTILE, images=images
    )
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.samples=8")
    _, page = _run(recipe, [hostile, _answer(1, True, prediction="")], [hostile, _answer(1, False, prediction="before all")])

    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"link", "iframe", "object", "base", "i", "form"}
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]  # values of two plots, then the page's own
    assert scripts == [{"type": "application/json"}] * 2 + [{}]
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
        assert "style" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", (Path(recipe.output_dir) / "report.html").read_text(), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    shown = page.text[page.text.index("</style>") + 1 :] if "</style>" in page.text else page.text
    assert shown.count(HOSTILE) == 8  # a score, question, reference, both predictions, id, task, a choice of the filter

    # On a narrow page each text stands beside the name of its column.
    columns = [attributes["data-column"] for tag, attributes in page.tags if "data-column" in attributes]
    assert columns[: 2 * len(score_rows(SUMMARY)[0])] == [*score_rows(SUMMARY)[0]] * 2

    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2
    decoded = [Image.open(io.BytesIO(base64.b64decode(str(picture).partition("base64,")[2]))) for picture in pictures]
    assert [image.size for image in decoded] == [(320, 160), (320, 160)]
    assert decoded[1].convert("RGB").getpixel((5, 5)) == (10, 200, 30)
    for text in ("1,500 MB", "in 12.5 s", "(empty answer)", "before all", "5.0% to 70.0%", "75.0%", "mmtune train <b>&x</b>"):
        assert text in " ".join(page.text.split())


def test_the_report_of_a_run_without_evaluation(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    assert recipe.evaluate is None
    _, page = _run(recipe, [], [])
    assert [tag for tag, _ in page.tags].count("img") == 0 and "Answers" not in page.text


def test_the_report_of_a_run_without_answers(make_recipe: MakeRecipe, rows: Path) -> None:
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.before=false")
    _, page = _run(recipe, [], [])
    assert "Answers" not in page.text


def test_the_page_of_a_finished_run_stays_when_a_tracker_fails(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    run, _ = _run(recipe, [], [])
    before = run.report.read_text()
    with pytest.raises(KeyboardInterrupt), stops_reported(run, recipe, is_main_process=True):
        raise KeyboardInterrupt
    assert run.report.read_text() == before


def test_answers_that_tuning_changed_come_first(make_recipe: MakeRecipe, rows: Path) -> None:
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.samples=8")
    after = [_answer(number, number % 3 == 0) for number in range(30)]
    before = [_answer(number, number % 2 == 0) for number in range(30)]
    _, page = _run(recipe, after, before)
    headings = [page.text.index(title) for title in ("Worse than the base", "Better than the base", "Other answers")]
    assert headings == sorted(headings)
    parts = [page.text[start:end] for start, end in zip(headings, [*headings[1:], None], strict=True)]
    ids = [[int(number) for number in re.findall(r"r\[(\d+)\]", part)] for part in parts]
    assert [len(part) for part in ids] == [2, 2, 4]
    assert all(number % 2 == 0 and number % 3 for number in ids[0])
    assert all(number % 2 and number % 3 == 0 for number in ids[1])
    assert len({number for part in ids for number in part}) == 8


# --------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    ("correct", "wrong", "count", "selected_correct", "selected_wrong"),
    [
        (90, 10, 24, 18, 6),
        (99, 1, 24, 23, 1),
        (100, 0, 24, 24, 0),
        (0, 100, 24, 0, 24),
        (10, 90, 24, 10, 14),
        (3, 2, 24, 3, 2),
        (9, 9, 2, 1, 1),
        (9, 9, 1, 0, 1),
        (9, 9, 0, 0, 0),
        (0, 0, 24, 0, 0),
    ],
)
def test_a_quarter_of_the_selected_answers_is_wrong(
    correct: int, wrong: int, count: int, selected_correct: int, selected_wrong: int
) -> None:
    answers = [_answer(n, True) for n in range(correct)] + [_answer(n + correct, False) for n in range(wrong)]
    answers.sort(key=_shuffled)
    selected = select_answers(answers, count)
    assert [sum(a.score == 1 for a in selected), sum(a.score == 0 for a in selected)] == [selected_correct, selected_wrong]
    assert selected == [answer for answer in answers if answer in selected] == select_answers(answers, count)


def _shuffled(answer: Answer) -> int:
    return int(answer.id[2:-1]) * 37 % 101


def test_selected_answers_are_evenly_spaced() -> None:
    selected = select_answers([_answer(n, True) for n in range(100)], 4)
    assert [answer.id for answer in selected] == ["r[0]", "r[25]", "r[50]", "r[75]"]


# ---------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("columns", [20, 60, 120])
def test_tables_do_not_truncate_numbers_or_names(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    print_parameters([ComponentCount("language", "lora", "nf4, in blocks of 64", 70_553_706_496, 123_456_789, 0.00012345)])
    print_trained_modules({"model.language_model.layers.*.self_attn.q_proj": (1_280, 123_456_789)})
    shown = capsys.readouterr().out
    for cell in ("language", "lora", "70,553,706,496", "123,456,789", "(0.17%)", "0.00012345", "1,280"):
        assert cell in shown
    print_methods()
    shown = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"│ {name} " in shown and f" {method.learning_rate:g} │" in shown
    assert "Error:" not in shown and "it ends in an error of a library" in " ".join(shown.split())


def test_score_rows_have_base_and_tuned_scores(capsys: pytest.CaptureFixture[str]) -> None:
    lines = score_rows(SUMMARY)
    assert lines[1] == {
        "task or source": "overall",
        "questions": "4",
        "majority-class baseline": "50.0%",
        "base": "25.0%",
        "tuned": "75.0%",
        "95% interval": "5.0% to 70.0%",
    }
    assert lines[0]["base"] == "" and score_rows({}) == []
    print_scores({"tuned_scores": [{"task": "[bold]x[/bold]", **SCORE}]})
    assert "[bold]x[/bold]" in capsys.readouterr().out
    print_scores({})
    assert capsys.readouterr().out == ""


def test_the_table_shows_metrics_unparsed_answers_and_further_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    further = {"f1": 0.5, "confusion": {"a": {"a": 1}}}
    yes_no = {**SCORE, "task": "overall", "metric": "yes_no", "unparsed": 3, "clusters": 2, "further": further}
    caption = {**SCORE, "task": "overall", "metric": "cider_d", "score": 1.1634, "interval": (1.0, 1.25), "baseline": None}
    tuned = score_rows({"tuned_scores": [yes_no, caption]})
    assert [row["metric"] for row in tuned] == ["yes_no", "cider_d"]
    assert [row["unparsed"] for row in tuned] == ["3", ""]
    assert [row["images or documents"] for row in tuned] == ["2", ""]
    assert tuned[1]["majority-class baseline"] == ""
    print_scores({"tuned_scores": [yes_no, caption]})
    shown = capsys.readouterr().out
    assert "Held-out yes_no, cider_d" in shown and "yes_no: f1 50.0%\n" in shown and "confusion" not in shown
    assert "yes_no: 3 of 4 answers are unparsed (neither begins with yes or no, nor ends with it after " in shown
    assert "doubts it) and count as 0\n" in shown
    lacking = {**yes_no, "metric": "numeric", "missing_markers": ("Answer:",), "further": {"mean_absolute_error": 4 / 3}}
    print_scores({"tuned_scores": [lacking, {**lacking, "metric": "cer", "further": {}}]})
    shown = capsys.readouterr().out
    assert "numeric: mean_absolute_error 1.333 over the parsed answers\n" in shown
    assert "or in arithmetic; or lacks 'Answer:') and count as 0\n" in shown
    assert "cer: 3 of 4 answers are unparsed (lacks 'Answer:') and count as 1\n" in shown
    [about, _] = metric_lines({"tuned_scores": [yes_no, caption]})
    assert about == "`yes_no`: yes or no; with precision, recall and F1 of yes, and the share of yes (POPE (arXiv 2305.10355))."


def test_regions_of_references_and_predictions_are_drawn(make_recipe: MakeRecipe, rows: Path, tmp_path: Path) -> None:
    """Each in the coordinates of its answer; answers without known coordinates, or without regions, change no pixel."""
    Image.new("RGB", (200, 100), "white").save(tmp_path / "a.png")
    changes: dict[str, Any] = {"images": (str(tmp_path / "a.png"),), "references": ("[100, 200, 500, 800]",), "metric": "iou"}
    drawn = _answer(0, False, **changes, prediction='{"bbox_2d": [600, 200, 900, 800]} 1e30', extent=(1000.0, 1000.0))
    base = dataclasses.replace(drawn, prediction="(160, 70)", extent=(200.0, 100.0))
    unknown = _answer(1, False, **changes, prediction="[600, 200, 900, 800]")
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]", "evaluate.samples=8")
    run, page = _run(recipe, [drawn, unknown], [base, dataclasses.replace(unknown, prediction="left")])
    assert read_answers(run.answers("after"))[0].extent == (1000, 1000)
    assert page.text.count("drawn: reference blue, base yellow, tuned orange") == 1 and page.text.count("drawn:") == 1
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    images = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB") for source in sources]
    image, other = [each for each in images if each.size == (200, 100)]
    if image.getcolors() == [(20000, (255, 255, 255))]:
        image, other = other, image
    assert other.getcolors() == [(20000, (255, 255, 255))]
    edges = {BLUE: [(20, 50), (99, 50), (60, 20), (60, 79)], ORANGE: [(120, 50), (179, 50), (150, 20), (150, 79)]}
    for color, places in edges.items():
        for x, y in places:
            area = image.crop((x - 1, y - 1, x + 2, y + 2))
            assert ImageColor.getrgb(color) in {pixel for _, pixel in area.getcolors()}, (color, x, y)
    assert ImageColor.getrgb(YELLOW) in {pixel for _, pixel in image.crop((150, 60, 172, 80)).getcolors()}
