"""Comparison pages: the answers of models row by row, and runs by recipe, versions, curves and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.comparison import (
    Comparison,
    column_names,
    compare_answers,
    difference_rows,
    differences_to_dicts,
    gain,
    unmatched_lines,
)
from mmtune.evaluation.scores import difference_lines, format_score
from mmtune.recipe.recipe import Recipe, Source, load_recipe
from mmtune.report.answer_cards import evenly_spaced, sample_cards
from mmtune.report.curves import RunCurves
from mmtune.report.pages import render_page
from mmtune.report.plots import Plot, plot_values, run_plots
from mmtune.report.recipe_differences import NOT_SET, differences_between
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_record, replace_text

CHANGED = 24
"""Maximum number of rows that a comparison shows as worse, and as better."""
SHOWN_PLOTS = 24

Compared = tuple[tuple[str, str], Comparison]
"""The names of two models, and the comparison of the second one with the first."""


@dataclass(frozen=True)
class RunComparison:
    """Runs compared with the first of them.

    Attributes:
        names: of the runs.
        results: what each run reached, by column.
        recipe: the keys in which the recipes differ, with the value in each run.
        versions: the libraries whose versions differ.
        answers: of each run against the first, where both have answers to the same questions.
        notes: sentences on what could not be compared.
        plots: the curves of all runs.
        sources: those of the first run's held-out rows, for images that are embedded in a file.
    """

    names: list[str]
    results: list[dict[str, str]]
    recipe: list[dict[str, str]]
    versions: list[dict[str, str]]
    answers: list[Compared]
    notes: list[str]
    plots: list[Plot]
    sources: Sequence[Source]

    def as_json(self) -> dict[str, Any]:
        """The comparison as a JSON object."""
        return {
            "runs": self.names,
            "results": self.results,
            "recipe": self.recipe,
            "versions": self.versions,
            "answers": [{"first": names[0], "second": names[1], **each.as_json()} for names, each in self.answers],
            "notes": self.notes,
        }


def compare_runs(paths: Sequence[Path]) -> RunComparison:
    """Compare the recipes, versions, curves and answers of runs, finished or not.

    Raises:
        UserError: a path is not a run, or a record is damaged.
    """
    runs = dict(zip(_names(paths), map(RunDirectory, paths), strict=True))
    for run in runs.values():
        if not run.recipe.is_file():
            raise UserError(f"{run.path} is not a run: it has no {run.recipe.name}")
    recipes = {name: load_recipe(run.recipe) for name, run in runs.items()}
    curves = {name: RunCurves(run.metrics).update() for name, run in runs.items()}
    first, *others = runs
    answers, notes = [], []
    for other in others:
        try:
            sides = [_answers(runs[name], recipes[name]) for name in (first, other)]
            answers.append(((first, other), compare_answers(*sides)))
        except UserError as error:
            notes.append(f"{other} against {first}: the answers are not compared: {error}")
    return RunComparison(
        names=list(runs),
        results=_without_empty_columns([_result(name, run, curves[name]) for name, run in runs.items()]),
        recipe=differences_between(recipes),
        versions=_versions(runs),
        answers=answers,
        notes=notes,
        plots=_overlaid(curves),
        sources=section.sources if (section := recipes[first].evaluate) else (),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The names of the directories; the paths where two have the same name.

    Raises:
        UserError: a path is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"expected different runs, got {', '.join(map(str, paths))}")
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _answers(run: RunDirectory, recipe: Recipe) -> list[Any]:
    file = run.answers("after")
    if not file.is_file():
        why = "it is not finished" if recipe.evaluate else "its recipe has no evaluate section"
        raise UserError(f"{run.path} has no {file.name}: {why}")
    return read_answers(file)


def _result(name: str, run: RunDirectory, read: RunCurves) -> dict[str, str]:
    summary = run.read_summary() if run.summary.is_file() else {}
    metric = summary.get("metric")
    interval = summary.get("tuned_interval")

    def number(value: Any, text: str = ".4g") -> str:
        return f"{value:{text}}" if isinstance(value, (int, float)) else ""

    return {
        "run": name,
        "state": "finished" if summary else "not finished",
        "steps": number(summary.get("steps", read.step), ","),
        "training loss": number(read.last.get("loss")),
        "held-out loss": number(read.last.get("eval_loss")),
        "tuned score": f"{format_score(summary['tuned_score'], metric)} {metric}" if metric else "",
        "95% interval": " to ".join(format_score(limit, metric) for limit in interval) if metric and interval else "",
        "trainable": number(summary.get("trainable_parameters"), ","),
        "seconds": number(summary.get("train_seconds"), ",.1f"),
        "peak memory, MB": number(summary.get("peak_memory_mb"), ",.0f"),
    }


def _without_empty_columns(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    used = {column for row in rows for column, text in row.items() if text}
    return [{column: text for column, text in row.items() if column in used} for row in rows]


def _versions(runs: Mapping[str, RunDirectory]) -> list[dict[str, str]]:
    """The libraries, Python and the commit whose versions differ."""
    records = {name: read_record(run.environment, versions=dict) for name, run in runs.items()}
    versions = {
        name: {**record["versions"], "python": record.get("python"), "git commit": record.get("git_commit")}
        for name, record in records.items()
    }
    rows = []
    for library in dict.fromkeys(library for each in versions.values() for library in each):
        texts = [str(each.get(library) or NOT_SET) for each in versions.values()]
        if len(set(texts)) > 1:
            rows.append({"library": library, **dict(zip(versions, texts, strict=True))})
    return rows


def _overlaid(curves: Mapping[str, RunCurves]) -> list[Plot]:
    """A plot for each line that a run has, with the lines of all runs."""
    plots: dict[tuple[str, str], Plot] = {}
    for name, read in curves.items():
        for plot in run_plots(read):
            for label, points in plot.lines.items():
                title = f"{plot.title}: {label}" if plot.title != label else label
                own = plots.setdefault((plot.title, label), Plot(title, plot.unit, {}))
                plots[plot.title, label] = Plot(own.title, own.unit, {**own.lines, name: points})
    return list(plots.values())


def write_comparison(comparisons: Sequence[Compared], path: Path, sources: Sequence[Source]) -> None:
    """Write a page with the differences of each comparison, and the rows that became worse and better with their images.

    Args:
        path: the HTML file.
        sources: the sources of the rows, for images that are embedded in a file; without them such images are left out.
    """
    page = render_page("comparison.html.jinja", title="Comparison", sections=_sections(comparisons, sources))
    replace_text(path, page)


def write_run_comparison(comparison: RunComparison, path: Path) -> None:
    """Write an HTML page with all that `compare_runs` found."""
    page = render_page(
        "comparison.html.jinja",
        title=" and ".join(comparison.names) if len(comparison.names) == 2 else f"{len(comparison.names)} runs",
        styles=("plots.css",),
        scripts=("plots.js",),
        runs=comparison,
        plots=[plot_values(plot) for plot in comparison.plots[:SHOWN_PLOTS]],
        hidden=max(len(comparison.plots) - SHOWN_PLOTS, 0),
        sections=_sections(comparison.answers, comparison.sources),
    )
    replace_text(path, page)


def _sections(comparisons: Sequence[Compared], sources: Sequence[Source]) -> list[dict[str, Any]]:
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
    return sections
