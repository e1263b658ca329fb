"""Report of a run, `report.html`: one page from the records of the run directory, written again while the run trains."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mmtune.data.validation.issues import ISSUE_TYPES
from mmtune.evaluation.answers import score_metrics
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.scores import (
    difference_lines,
    format_score,
    further_lines,
    gap_line,
    generation_line,
    group_rows,
    group_title,
    score_rows,
    score_title,
)
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.report.answer_cards import choose_answers, sample_cards, shortened
from mmtune.report.confusion import confusion_tables
from mmtune.report.curves import RunCurves
from mmtune.report.explanations.explanation_page import EXPLANATION_SCRIPTS, EXPLANATION_STYLES, explanations_by_row
from mmtune.report.pages import render_page
from mmtune.report.plots import plot_values, run_plots
from mmtune.report.recipe_differences import differences_from_defaults
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import Stopped, UserError
from mmtune.utils.files import read_json_object, replace_text, report_disk_errors, resolve_link
from mmtune.utils.locks import lock_holder

SHOWN_ROWS = 200
"""Rows of one table."""
SHOWN_ISSUES = 20
"""Rows of the data that are named, for each list of the data report."""
SHOWN_RECIPE = 100_000
"""Characters of the recipe."""
STYLES = ("plots.css", "tokens.css", "report.css", *EXPLANATION_STYLES)
SCRIPTS = ("plots.js", "report.js", *EXPLANATION_SCRIPTS)


@dataclass(frozen=True)
class ProfileSection:
    """The profile of a run in its report: a title, a table as text by column, and sentences."""

    title: str
    rows: list[dict[str, str]]
    lines: list[str]


@dataclass(frozen=True)
class RunState:
    """What a run does when its report is written.

    Attributes:
        kind: a page of a `running` run reads itself again, and says how old it is.
        text: a sentence.
    """

    kind: Literal["running", "finished", "stopped"]
    text: str


def finished_state(summary: Mapping[str, Any]) -> RunState:
    """The state of a run that has its summary."""
    steps = f"{summary['steps']:,} steps in " if "steps" in summary else ""
    return RunState("finished", f"Finished: {steps}{summary['train_seconds']:,g} s.")


def write_report(
    run: RunDirectory,
    recipe: Recipe,
    state: RunState,
    *,
    summary: Mapping[str, Any] | None = None,
    profile: ProfileSection | None = None,
    curves: RunCurves | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Replace `report.html`, from the records that the run directory has so far.

    Args:
        summary: the metrics of a finished run.
        profile: of the run's steps; None where they were not profiled.
        curves: of the run, if they have been read before.
        base: of a run without a summary, from `base_scores`.

    Raises:
        UserError: the disk is full or failing.
    """
    read = (curves or RunCurves(run.metrics)).update()
    page = render_page(
        "report.html.jinja",
        title=run.path.resolve().name,
        styles=STYLES,
        scripts=SCRIPTS,
        state=state,
        written=_clock(time.time()),
        written_ms=round(time.time() * 1000),
        facts=_facts(run, recipe, summary, read),
        plots=[plot_values(plot) for plot in run_plots(read)],
        damaged=read.damaged,
        profile=profile,
        data=_data_values(run),
        modules=_module_values(run),
        first_batch=_record(run.first_batch),
        checks=_checks(run, summary or {}),
        **_result_values(run, recipe, summary, base),
        **_recipe_values(run, recipe),
    )
    with report_disk_errors(run.report):
        replace_text(run.report, page)


def rewrite_report(run: RunDirectory, profile: ProfileSection | None = None) -> RunState:
    """Write `report.html` of a run that this process does not train, finished or not.

    Returns:
        The state of the run.

    Raises:
        UserError: not a run, or a damaged record.
    """
    recipe = load_recipe(run.recipe)
    if run.summary.is_file():
        summary = run.read_summary()
        state = finished_state(summary)
    else:
        summary, state = None, unfinished_run_state(run)
    write_report(run, recipe, state, summary=summary, profile=profile, base=base_scores(run))
    return state


def unfinished_run_state(run: RunDirectory) -> RunState:
    """The state of a run without a summary, by the lock of the process that trains it."""
    return RunState("running" if lock_holder(resolve_link(run.path)) else "stopped", f"This run {run.unfinished_state()}.")


@contextmanager
def stops_reported(run: RunDirectory, recipe: Recipe, is_main_process: bool) -> Iterator[None]:
    """If the block fails, the page says that the run stopped, and why. The error is raised again.

    The page of a run that has its summary stays: what failed is then the upload to a tracker.
    """
    try:
        yield
    except BaseException as error:
        if is_main_process and run.report.is_file() and not run.summary.is_file():
            reason = str(error) if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
            with suppress(OSError, UserError):  # such as a full disk, which is then the error that is raised
                write_report(run, recipe, RunState("stopped", f"Stopped: {shortened(reason, 1_000)}"))
        raise


def base_scores(run: RunDirectory) -> dict[str, Any] | None:
    """The scores of the base before tuning, as those of a summary; None if it was not evaluated."""
    file = run.answers("before")
    return score_metrics([], read_answers(file)) if file.is_file() else None


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _record(path: Path) -> dict[str, Any] | None:
    return read_json_object(path) if path.is_file() else None


def _facts(run: RunDirectory, recipe: Recipe, summary: Mapping[str, Any] | None, read: RunCurves) -> list[tuple[str, str]]:
    """The most important values of a run by name."""
    model, modules = recipe.model, _record(run.modules)
    methods = dict.fromkeys(each.method for each in recipe.tune.components.values() if each.method != "frozen")
    base = model.base or f"{model.vision} + {model.language}"
    facts = [("base", f"{base}, {model.precision}"), ("method", " + ".join(methods))]
    if modules is not None:
        total, trainable = (sum(each[name] for each in modules["components"]) for name in ("total", "trainable"))
        facts.append(("trainable parameters", f"{trainable:,} of {total:,} ({trainable / max(total, 1):.2%})"))
    if summary is not None:
        facts.append(("training", f"{summary.get('steps', read.step):,} steps in {summary['train_seconds']:,g} s"))
        facts.append(("peak memory", f"{summary['peak_memory_mb']:,.0f} MB"))
        if "tuned_score" in summary:
            before = f"{format_score(summary['base_score'], summary['metric'])} \u2192 " if "base_score" in summary else ""
            facts.append((f"held-out {summary['metric']}", before + format_score(summary["tuned_score"], summary["metric"])))
        if "best_step" in summary:
            facts.append(
                ("best step", f"{summary['best_step']:,}: {summary['metric_for_best_model']} {summary['best_metric']:.4g}")
            )
    elif read.step:
        facts.append(("last logged step", f"{read.step:,}"))
        for name, label in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            if name in read.last:
                facts.append((label, f"{read.last[name]:.4g}"))
    return facts


def _result_values(
    run: RunDirectory, recipe: Recipe, summary: Mapping[str, Any] | None, base: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Scores, confusion matrices and answers of a finished run; the scores of the base before that."""
    if summary is None and base is not None:
        rows = [{"base" if name == "tuned" else name: text for name, text in row.items()} for row in score_rows(base)]
        title, lines = f"{score_title(base)} of the base, before tuning", further_lines(base)
        results = {"title": title, "rows": _first_rows(rows), "hidden": max(len(rows) - SHOWN_ROWS, 0), "lines": lines}
        return {"results": results, "groups": [], "answer_groups": []}
    if summary is None or not summary.get("tuned_scores"):
        return {"results": None, "groups": [], "answer_groups": []}
    section = recipe.evaluate
    after = read_answers(run.answers("after")) if run.answers("after").is_file() else []
    before = read_answers(run.answers("before")) if run.answers("before").is_file() and section and section.before else []
    rows = score_rows(summary)
    results = {
        "title": score_title(summary),
        "rows": _first_rows(rows),
        "hidden": max(len(rows) - SHOWN_ROWS, 0),
        "lines": further_lines(summary) + difference_lines(summary.get("comparison", [])),
        "generation": generation_line(dict(summary)),
        "by_field": [(group_title(each), group_rows(each), gap_line(each)) for each in summary.get("groups", ())],
        "tasks": [
            (
                score_title(each, name),
                _first_rows(score_rows(each)),
                further_lines(each, True) + difference_lines(each.get("comparison", [])),
            )
            for name, each in summary.get("tasks", {}).items()
        ],
        "confusion": confusion_tables(after),
    }
    chosen = choose_answers(before, after, section.samples) if section else {}
    sources = section.sources if section else ()
    every = iter(sample_cards([pair for pairs in chosen.values() for pair in pairs], ("base", "tuned"), sources))
    cards = [(title, list(islice(every, len(pairs)))) for title, pairs in chosen.items()]
    explained = [pair[1] for pairs in chosen.values() for pair in pairs] if run.explanations.is_file() else []
    values = explanations_by_row(run.explanations, explained, sources)
    cards = [(title, [{**card, "explained": values.get(card["id"])} for card in group]) for title, group in cards]
    names = dict.fromkeys(card["group"] for _, group in cards for card in group)
    return {"results": results, "groups": cards, "answer_groups": list(names), "has_base": bool(before)}


def _first_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The first rows of a table and its last one, which is that of all groups."""
    return [*rows[: SHOWN_ROWS - 1], rows[-1]] if len(rows) > SHOWN_ROWS else list(rows)


def _data_values(run: RunDirectory) -> dict[str, Any] | None:
    """The data report: counts, and the first rows of each list by their type."""
    report = _record(run.data_report)
    if report is None:
        return None
    lists = []
    for name, title in (
        ("quarantined", "Quarantined rows"),
        ("dropped_over_length", "Rows dropped as too long"),
        ("media_changed", "Rows with media dropped or resized"),
    ):
        issues = report[name]
        types = Counter(issue["issue"] for issue in issues)
        shown = [
            {"row": shortened(each["row"], 300), "field": shortened(each["field"], 100), "what": shortened(each["detail"], 500)}
            for each in issues[:SHOWN_ISSUES]
        ]
        fixes = [f"{kind}, {count:,}: {ISSUE_TYPES[kind].fix}" for kind, count in types.most_common() if kind in ISSUE_TYPES]
        if issues:
            lists.append({"title": title, "count": len(issues), "rows": shown, "fixes": fixes})
    skipped = report.get("skipped_steps", [])
    return {
        "rows": report["rows"],
        "checked": report["checked"],
        "held_out": report.get("held_out", {}),
        "lists": lists,
        "skipped": Counter(each["reason"] for each in skipped).most_common(),
        "skipped_steps": ", ".join(str(each["step"]) for each in skipped[:SHOWN_ISSUES])
        + (", ..." if len(skipped) > SHOWN_ISSUES else ""),
    }


def _module_values(run: RunDirectory) -> dict[str, Any] | None:
    """The tables of adapted modules and of parameters by component."""
    record = _record(run.modules)
    if record is None:
        return None
    modules = [
        {"module": path, "modules": f"{count:,}", "trainable": f"{size:,}"} for path, (count, size) in record["modules"].items()
    ]
    components = [
        {
            "component": each["component"],
            "method": each["method"],
            "frozen weights": each["weights"],
            "parameters": f"{each['total']:,}",
            "trainable": f"{each['trainable']:,}",
            "learning rate": "" if each["learning_rate"] is None else f"{each['learning_rate']:g}",
        }
        for each in record["components"]
    ]
    return {"module_rows": modules[:SHOWN_ROWS], "component_rows": components, "lines": record["lines"], "class": record["class"]}


def _checks(run: RunDirectory, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The comparisons of releases and served models with the run."""
    serving = _record(run.serving)
    return {"merge": summary if "merge_samples" in summary else None, "serving": serving["checks"] if serving else []}


def _recipe_values(run: RunDirectory, recipe: Recipe) -> dict[str, Any]:
    environment = _record(run.environment) or {}
    return {
        "differences": differences_from_defaults(recipe),
        "recipe": shortened(run.recipe.read_text(encoding="utf-8"), SHOWN_RECIPE),
        "versions": environment.get("versions", {}),
        "environment": {
            "base revision": (_record(run.modules) or {}).get("base_revision"),
            "command": shortened(" ".join(map(str, environment.get("command", ()))), 2_000),
            **{
                name: environment[name]
                for name in ("started", "python", "platform", "git_commit", "image_backend")
                if environment.get(name)
            },
        },
    }
