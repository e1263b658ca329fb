"""Scores by a field of the rows: each is the score of those rows alone; the gap and its interval; the field in rows and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples
from mmtune.evaluation.answers import Answer, group_scores, score_answers
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.comparison import tuning_metrics
from mmtune.evaluation.evaluate import check_questions, unanswered
from mmtune.evaluation.field_groups import field_groups
from mmtune.evaluation.scores import gap_line, group_rows
from mmtune.recipe.recipe import EvaluateSection, Source
from mmtune.utils.errors import UserError


def _answers(rights: dict[str, str], metric: str = "exact_match") -> list[Answer]:
    """Answers by language, each of an image of its own: 1 is right, 0 wrong."""
    answer = Answer("", None, "q", (), ("x",), "", "", metric)
    return score_answers(
        [
            dataclasses.replace(
                answer,
                id=f"{name}{number}",
                cluster=f"{name}{number}",
                prediction="x" if right == "1" else "y",
                groups={"language": name},
            )
            for name, text in rights.items()
            for number, right in enumerate(text)
        ]
    )


def test_the_score_of_a_group_is_that_of_its_rows_alone() -> None:
    answers = _answers({"en": "1110", "de": "1000", "fr": "11"})
    [groups] = field_groups(answers)
    assert [score["task"] for score in groups["scores"]] == ["en", "de", "fr"]
    for score in groups["scores"]:
        [alone] = group_scores([answer for answer in answers if answer.groups["language"] == score["task"]])
        assert (score["score"], score["interval"], score["questions"]) == (alone.score, alone.interval, alone.questions)
    assert (groups["gap"]["lowest"], groups["gap"]["highest"], groups["gap"]["difference"]) == ("de", "fr", 0.75)


def test_the_interval_of_a_gap_is_newcombes() -> None:
    """The first example of Newcombe (1998), table II: 56/70 - 48/80 is 0.2000, 0.0524 to 0.3339 by method 10."""
    [groups] = field_groups(_answers({"a": "1" * 56 + "0" * 14, "b": "1" * 48 + "0" * 32}))
    assert groups["gap"]["difference"] == pytest.approx(0.2)
    assert groups["gap"]["interval"] == pytest.approx((0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize(
    ("sizes", "shares"), [((100, 1), (0.5, 0.5)), ((100, 5), (0.5, 0.9)), ((30, 30, 30, 30, 30), (0.5,) * 5)]
)
def test_the_interval_covers_the_difference_of_small_and_chosen_groups(sizes: tuple[int, ...], shares: tuple[float, ...]) -> None:
    generator = np.random.default_rng(0)
    truth = {str(number): share for number, share in enumerate(shares)}
    covered = []
    for _ in range(60):
        draws = [generator.binomial(1, share, size) for size, share in zip(sizes, shares, strict=True)]
        [groups] = field_groups(_answers({str(number): "".join(map(str, each)) for number, each in enumerate(draws)}))
        if (gap := groups["gap"]) is not None:
            low, high = gap["interval"]
            assert -1 <= low <= high <= 1
            covered.append(low - 1e-9 <= truth[gap["highest"]] - truth[gap["lowest"]] <= high + 1e-9)
    assert sum(covered) / len(covered) >= 0.9


def test_a_field_with_one_value_has_no_gap_and_a_metric_its_own_groups() -> None:
    assert field_groups(_answers({"en": "10"}))[0]["gap"] is None
    assert field_groups(_answers({"en": "10", "de": "01"}))[0]["gap"] is None
    assert gap_line(field_groups(_answers({"en": "10"}))[0]) is None
    assert field_groups([dataclasses.replace(answer, groups={}) for answer in _answers({"en": "10"})]) == []
    mixed = [*_answers({"en": "10", "de": "11"}), *_answers({"it": "10"}, "cer")]
    by_metric = {each["metric"]: [score["task"] for score in each["scores"]] for each in field_groups(mixed)}
    assert by_metric == {"exact_match": ["en", "de"], "cer": ["it"]}


def test_groups_are_printed_and_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = _answers({"en": "1111", "[b]de": "1000"})
    file = tmp_path / "answers.jsonl"
    write_answers(answers, file)
    assert read_answers(file) == answers
    assert tuning_metrics([], answers)["groups"] == field_groups(answers)
    assert entry_point(["score", str(file), "--metric", "exact_match"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match by language" in printed and "[b]de" in printed
    assert "exact_match by language: en minus [b]de: +75.0 pp, 95% interval" in printed
    assert group_rows(field_groups(answers)[0])[1]["group"] == "[b]de"
    file.write_text('{"prediction": "x", "references": ["x"], "groups": {"language": 3}}\n')
    assert entry_point(["score", str(file), "--metric", "exact_match"]) == 2
    assert 'groups: expected an object of texts, got {"language": 3}' in capsys.readouterr().err


def test_many_groups_and_markup_are_printed_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        dataclasses.replace(answer, groups={"id[/b]": answer.id if number else "x" * 500})
        for number, answer in enumerate(_answers({"en": "10" * 100}))
    ]
    file = tmp_path / "answers.jsonl"
    write_answers(answers, file)
    assert entry_point(["score", str(file), "--metric", "exact_match"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match by id[/b], the 20 largest of 200 groups" in printed
    assert len(printed.splitlines()) < 60 and "x" * 61 not in printed


def _section(tmp_path: Path, rows: list[dict[str, Any]], groups: tuple[str, ...]) -> EvaluateSection:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": "q", "input": "", "output": "a", **row}) + "\n" for row in rows))
    return EvaluateSection(data=(Source(path=str(file), template="alpaca"),), groups=groups)


def test_fields_of_rows_are_the_groups(tmp_path: Path) -> None:
    section = _section(tmp_path, [{"language": "en", "meta": {"year": 2020}}, {"language": None}], ("language", "meta.year"))
    check_questions(section)
    rows = IndexedSamples(section.sources)
    groups = [dict(answer.groups) for index in range(2) for answer in unanswered(rows, index, rows[index], section)]
    assert groups == [{"language": "en", "meta.year": "2020"}, {"language": "(none)", "meta.year": "(none)"}]


def test_a_field_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    section = _section(tmp_path, [{"language": "en"}], ("langauge",))
    with pytest.raises(UserError, match=r"evaluate\.groups.*no held-out row has langauge; the first one has instruction, input,"):
        check_questions(section)
    section = _section(tmp_path, [{"language": ["en"]}], ("language",))
    with pytest.raises(UserError, match="language: expected a text or a number, got list"):
        check_questions(section)
