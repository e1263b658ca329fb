"""`mmtune compare`: rows joined by id and rows that are not, differences by task, the page of changes, the summary of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.evaluation.answers import Answer, score_answers
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.comparison import compare_answers, tuning_metrics, unmatched_lines
from mmtune.evaluation.scores import print_scores, score_rows
from mmtune.recipe.recipe import Recipe
from mmtune.utils.errors import UserError

HOSTILE = "<script>alert('&')</script>"


def _answer(number: int, score: float, **changes: Any) -> Answer:
    answer = Answer(
        f"r[{number}]",
        "color" if number % 2 else "count",
        f"question {number}",
        (),
        ("x",),
        "x" if score else "y",
        cluster=str(number // 2),
        metric="exact_match",
        score=score,
    )
    return dataclasses.replace(answer, **changes)


def _side(scores: str, start: int = 0, **changes: Any) -> list[Answer]:
    return [_answer(start + number, float(score), **changes) for number, score in enumerate(scores)]


def test_rows_are_joined_by_id_and_the_others_are_listed() -> None:
    first, second = _side("10101010"), _side("1111000011", start=2)[::-1]
    second[4] = dataclasses.replace(second[4], question="another")
    second[5] = dataclasses.replace(second[5], references=("z",))
    comparison = compare_answers(first, second)
    assert comparison.only_first == ["r[0]", "r[1]"]
    assert comparison.only_second == [f"r[{number}]" for number in (11, 10, 9, 8)]
    assert comparison.changed == {"r[6]": ["references"], "r[7]": ["question"]}
    assert unmatched_lines(comparison, ("a", "b"))[-1] == "not compared: 2 rows that differ in references, question: r[6], r[7]"
    assert [pair[0].id for pair in comparison.pairs] == ["r[2]", "r[3]", "r[4]", "r[5]"]
    [overall] = [each for each in comparison.tasks if each.task == "overall"]
    differences = [b.score - a.score for a, b in comparison.pairs]
    assert overall.result.difference == pytest.approx(sum(differences) / len(differences))
    assert (overall.better, overall.worse) == (differences.count(1), differences.count(-1))


def test_tasks_are_compared_and_the_worse_ones_named() -> None:
    first, second = _side("10" * 20), _side("01" * 19 + "11")
    comparison = compare_answers(first, second)
    count, color, overall = comparison.tasks
    assert (count.task, color.task, overall.task) == ("count", "color", "overall")
    assert (count.result.difference, color.result.difference) == pytest.approx((-0.95, 1.0))
    assert (count.is_regression, color.is_regression) == (True, False)
    assert count.result.clusters == 20
    assert count.adjusted_p >= count.result.p_value
    assert comparison.as_json()["regressions"] == ["count"]
    assert comparison.as_json()["worse"] == [f"r[{number}]" for number in range(0, 38, 2)]


def test_a_difference_of_one_row_is_no_regression() -> None:
    first, second = ([dataclasses.replace(side[0], task="overall"), *side[1:]] for side in (_side("1111"), _side("0111")))
    comparison = compare_answers(first, second)
    differences = [(each.task, each.result.difference) for each in comparison.tasks]
    assert differences == [("overall (task)", -1), ("color", 0), ("count", 0), ("overall", -0.25)]
    assert comparison.as_json()["regressions"] == []


def test_a_lower_error_rate_is_better() -> None:
    first = [_answer(number, 0.5, metric="cer", references=("abcd",), prediction="ab") for number in range(4)]
    second = [dataclasses.replace(answer, score=0.25, prediction="abc") for answer in first]
    comparison = compare_answers(first, second)
    assert comparison.tasks[-1].result.difference == pytest.approx(-0.25)
    assert (comparison.tasks[-1].better, comparison.tasks[-1].worse) == (4, 0)
    assert not comparison.tasks[-1].is_regression


@pytest.mark.parametrize(
    "change", [{"options": ("b", "a")}, {"choices": ("a",)}, {"images": ("other.png",)}, {"answer_after": ":"}]
)
def test_another_question_is_not_compared(change: dict[str, Any]) -> None:
    first = _side("11", references=("a: b",), options=("a", "b"), images=("here/a.png",))
    second = [first[0], dataclasses.replace(first[1], **change)]
    assert compare_answers(first, second).changed == {"r[1]": ["references" if "answer_after" in change else next(iter(change))]}
    moved = [dataclasses.replace(answer, images=("there/a.png",)) for answer in first]
    assert compare_answers(first, moved).changed == {}


def test_headline_numbers_are_those_of_the_scores_also_with_answer_after(files: list[str]) -> None:
    answers = _side("0" * 24, metric="wer", answer_after="Answer:", references=("So. Answer: a cat",), prediction="Answer: a cat")
    thought = [dataclasses.replace(answer, prediction="I see fur. Answer: a cat") for answer in answers]
    for path, side in zip(files, (answers, thought), strict=False):
        write_answers(score_answers(side), Path(path))
    overall = compare_answers(*(read_answers(Path(path)) for path in files[:2])).tasks[-1]
    assert (overall.result.first, overall.result.second) == (0, 0)


def test_an_answers_file_runs_no_code(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(*_): return 1\n")
    for path in files[:2]:
        answers = read_answers(Path(path))
        write_answers([dataclasses.replace(answer, metric=f"{tmp_path}/own.py:score") for answer in answers], Path(path))
    assert entry_point(["compare", *files[:2], "--json", "--html", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out)["comparisons"][0]["tasks"][-1]["second"] == pytest.approx(13 / 24)
    assert not (tmp_path / "ran").exists()


def test_an_unparsed_answer_counts_as_wrong() -> None:
    first, second = _side("1111"), _side("1111", parsed=False)
    assert compare_answers(first, second).tasks[-1].result.second == 0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (_side("11"), _side("11", start=5), r"no row id is in both; the first ids are r\[0\] and r\[5\]"),
        (
            _side("11"),
            _side("11", metric="cer"),
            r"2 rows differ in metric: metric of r\[0\] is 'exact_match' against 'cer'",
        ),
        (_side("1") * 2, _side("11"), r"row r\[0\]: expected one answer for each row, got 2"),
        ([], _side("11"), "the first ids are no row and"),
    ],
)
def test_what_cannot_be_compared_is_an_error(first: list[Answer], second: list[Answer], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare_answers(first, second)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files of answers to 24 rows, of which the first has an image and a hostile text; then one of fewer rows."""
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "a.png")
    first, second = _side("10" * 12), _side("01" * 11 + "11")
    hostile = {"images": (str(tmp_path / "a.png"),), "question": HOSTILE}
    first[0], second[0] = (dataclasses.replace(side[0], **hostile) for side in (first, second))
    paths = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "three")]
    for path, answers in zip(paths, (first, second, second[:4]), strict=True):
        write_answers(answers, path)
    return [str(path) for path in paths]


def test_several_files_are_compared_with_the_first(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point(["compare", *files, "--json"]) == 0
    output = capsys.readouterr()
    comparisons = json.loads(output.out)["comparisons"]
    assert [(each["first"], each["second"], each["rows"]) for each in comparisons] == [
        (files[0], files[1], 24),
        (files[0], files[2], 4),
    ]
    assert comparisons[1]["only_first"] == [f"r[{number}]" for number in range(4, 24)]
    assert comparisons[0]["tasks"][-1]["test"] == "exact sign-flip permutation test"
    assert f"not compared: 20 rows only in {files[0]}: r[4], r[5], r[6], r[7], r[8], ..." in output.err
    assert "worse by task at 5%: count -91.7 pp" in output.err


def test_answers_of_an_earlier_version_have_the_defaults_of_new_keys(files: list[str]) -> None:
    rows = map(json.loads, Path(files[0]).read_text(encoding="utf-8").splitlines())
    old = [{name: value for name, value in row.items() if name not in ("choices", "options")} for row in rows]
    Path(files[1]).write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    assert read_answers(Path(files[1])) == read_answers(Path(files[0]))


def test_the_page_shows_what_became_worse_and_better(files: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert entry_point(["compare", *files[:2], "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert "Worse: 11 rows" in html
    assert "Better: 12 rows" in html
    assert html.count("data:image/png") == 1
    assert HOSTILE not in html
    assert "&lt;script&gt;" in html
    assert "http:" not in html and "https:" not in html


def test_an_image_that_cannot_be_read_is_named_on_the_page(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<no image>")
    second = read_answers(Path(files[1]))
    write_answers([dataclasses.replace(second[0], prediction="half of \ud83d"), *second[1:]], Path(files[1]))
    assert entry_point(["compare", *files[:2], "--html", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a.png: unknown image format" in html and "half of \\ud83d" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none.jsonl", "{first}"], "none.jsonl"),
        (["{first}"], "expected a second run or file of answers"),
        (["{folder}/held"], "no such run or file of answers"),
        (["{folder}", "{first}"], "has no answers (answers_after.jsonl); `mmtune eval` writes them"),
        (["{folder}"], "has no answers (answers_before.jsonl); set evaluate.before: true"),
        (["{folder}/broken.jsonl", "{first}"], "broken.jsonl:2: references: expected a list of texts, got no such key"),
        (["{first}", "{first}", "--html", "{first}/page.html"], "--html"),
    ],
)
def test_mistakes_are_errors(
    files: list[str], tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jsonl").write_text(Path(files[0]).read_text().splitlines()[0] + '\n{"id": "x"}\n')
    words = [each.format(folder=tmp_path, first=files[0]) for each in arguments]
    assert entry_point(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_one_run_compares_its_base_with_its_tuned_model(
    make_recipe: Callable[..., Recipe], tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(f"evaluate.data=[{{path: {rows}, template: llava}}]")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_answers(_side("1010"), run / "answers_before.jsonl")
    write_answers(_side("1111"), run / "answers_after.jsonl")
    assert entry_point(["compare", str(run), "--json"]) == 0
    output = capsys.readouterr()
    [comparison] = json.loads(output.out)["comparisons"]
    assert (comparison["first"], comparison["second"]) == ("base", "tuned")
    assert comparison["tasks"][-1]["difference"] == pytest.approx(0.5)
    assert "tuned against base" in output.err


def test_a_run_shows_its_difference_from_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = _side("10" * 10), _side("11" * 10)
    summary = tuning_metrics(before, after)
    assert summary["comparison"][-1]["difference"] == pytest.approx(0.5)
    assert json.loads(json.dumps(summary["comparison"]))[-1]["interval"] is None  # every image has the same difference
    assert [row["difference"] for row in score_rows(summary)] == ["+0.0 pp", "+100.0 pp", "+50.0 pp"]
    print_scores(summary)
    printed = " ".join(capsys.readouterr().out.split())
    assert "exact_match: +50.0 pp, p = 0.00195 (exact sign-flip permutation test; 20 rows of 10 images or documents)" in printed
    assert "comparison" not in tuning_metrics([], after)
    assert "difference" not in score_rows(tuning_metrics([], after))[0]
