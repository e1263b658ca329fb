"""Report of a run, and the page of compared answers, with sample answers and their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.comparison import Comparison, column_names, difference_rows, differences_to_dicts, gain, unmatched_lines
from mmtune.evaluation.scores import (
    difference_lines,
    further_lines,
    gap_line,
    generation_line,
    group_rows,
    group_title,
    score_rows,
    score_title,
)
from mmtune.recipe.recipe import Recipe, Source
from mmtune.report.answer_cards import evenly_spaced, sample_cards, select_answers
from mmtune.report.pages import data_uri, render_page
from mmtune.run_directory import RunDirectory

CHANGED = 24
"""Maximum number of rows that a comparison shows as worse, and as better."""


@dataclass(frozen=True)
class ProfileSection:
    """The profile of a run in its report: a title, a table as text by column, and sentences."""

    title: str
    rows: list[dict[str, str]]
    lines: list[str]


def write_report(run: RunDirectory, recipe: Recipe, summary: dict[str, Any], profile: ProfileSection | None = None) -> None:
    """Write `report.html`: metrics, loss curve, and sample answers with their images, in one file.

    With answers of the base, rows on which tuning changed the score come first.

    Args:
        profile: of the run's steps; None where they were not profiled.
    """
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    if recipe.evaluate:
        count, sources = recipe.evaluate.samples, recipe.evaluate.sources
        after = read_answers(run.answers("after"))
        before = {answer.id: answer for answer in read_answers(run.answers("before"))} if recipe.evaluate.before else {}
        pairs = [(before.get(answer.id), answer) for answer in after]
        worse, better = (
            evenly_spaced([pair for pair in pairs if pair[0] and sign * gain(pair[0], pair[1]) > 0], count // 4)
            for sign in (-1, 1)
        )
        shown = {pair[1].id for pair in (*worse, *better)}
        rest = select_answers([answer for answer in after if answer.id not in shown], count - len(shown))
        titled = {
            "Worse than the base": worse,
            "Better than the base": better,
            "Other answers" if shown else "Answers": [(before.get(answer.id), answer) for answer in rest],
        }
        groups = [(title, sample_cards(chosen, ("base", "tuned"), sources)) for title, chosen in titled.items()]
    page_text = render_page(
        "report.html.jinja",
        title=run.path.name,
        summary=summary,
        scores=score_rows(summary),
        scores_title=score_title(summary) if recipe.evaluate else "",
        by_field=[(group_title(each), group_rows(each), gap_line(each)) for each in summary.get("groups", ())],
        further=further_lines(summary) + difference_lines(summary.get("comparison", [])),
        tasks=[
            (score_title(each, name), score_rows(each), further_lines(each, True) + difference_lines(each.get("comparison", [])))
            for name, each in summary.get("tasks", {}).items()
        ],
        generation=generation_line(summary),
        curve=data_uri(run.loss_curve.read_bytes(), "png"),
        profile=profile,
        groups=groups,
        recipe=run.recipe.read_text(encoding="utf-8"),
    )
    run.report.write_text(page_text, encoding="utf-8")


def write_comparison(comparisons: Sequence[tuple[tuple[str, str], Comparison]], path: Path, sources: Sequence[Source]) -> None:
    """Write a page with the differences of each comparison, and the rows that became worse and better with their images.

    Args:
        comparisons: the names of both models, and the comparison.
        path: the HTML file.
        sources: the sources of the rows, for images that are embedded in a file; without them such images are left out.
    """
    sections = []
    for names, comparison in comparisons:
        groups = []
        for title, sign in (("Worse", -1), ("Better", 1)):
            pairs = [pair for pair in comparison.pairs if sign * gain(*pair) > 0]
            chosen = evenly_spaced(pairs, CHANGED)
            count = f"{len(pairs):,} rows" + (f", {len(chosen)} of them" if len(chosen) < len(pairs) else "")
            groups.append((f"{title}: {count}", sample_cards(chosen, names, sources)))
        sections.append(
            {
                "title": f"{names[1]} against {names[0]}",
                "unmatched": unmatched_lines(comparison, names),
                "rows": difference_rows(comparison.tasks, column_names(names)),
                "lines": difference_lines(differences_to_dicts(comparison.tasks)),
                "groups": groups,
            }
        )
    path.write_text(render_page("comparison.html.jinja", title="Comparison", sections=sections), encoding="utf-8")
