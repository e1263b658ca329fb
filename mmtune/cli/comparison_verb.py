"""Verbs `mmtune compare`, the answers of models to the same questions, and `mmtune report`, the results of runs."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.cli.verb_arguments import AddVerb, check_jsonl
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import UserError
from mmtune.utils.hub import missing_path_message

if TYPE_CHECKING:
    from mmtune.run_directory import RunDirectory


@dataclass(frozen=True)
class _Side:
    """The answers of one model.

    Attributes:
        name: as it was given, or base or tuned.
        file: the answers file.
        run: the run directory that the file is in; None if it is in no run.
    """

    name: str
    file: Path
    run: Path | None


def add_comparison_verb(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "compare", _compare, "compare the answers of two models, or of a run's base and its tuned model")
    help_text = "a run (its tuned model) or a file of answers; the others are compared with the first. One run: base and tuned"
    verb.add_argument("model", metavar="RUN_OR_ANSWERS", nargs="+", help=help_text)
    help_text = "also combine all answers: the most frequent one, or the choice with the largest mean probability"
    verb.add_argument("--vote", choices=("majority", "mean"), help=help_text)
    verb.add_argument("--weights", metavar="W,W,...", help="with --vote, the weight of each model (default: equal)")
    verb.add_argument("--out", metavar="FILE.jsonl", help="with --vote, write its answers")
    verb.add_argument("--html", metavar="FILE", help="write a page with the rows that became better or worse, and their images")

    verb = add(verbs, "report", _report, "print the results of a run and write its report.html again, or compare runs")
    verb.add_argument("model", metavar="RUN", nargs="+", help="a run, finished or not; several are compared with the first")
    verb.add_argument("--html", metavar="FILE", help="with several runs: the page (default: comparison.html)")


def _compare(arguments: argparse.Namespace) -> Any:
    from mmtune.recipe.recipe import load_recipe
    from mmtune.run_directory import RunDirectory
    from mmtune.utils.files import check_writable, report_disk_errors

    sides = _sides(arguments.model)
    weights = _weights(arguments)
    if arguments.out and Path(arguments.out).resolve() in [side.file.resolve() for side in sides]:
        raise UserError(
            f"--out {arguments.out}: this file holds answers that are compared and is not replaced; give another file"
        )
    if arguments.html:
        check_writable(Path(arguments.html).parent, f"--html {arguments.html}: ")
    configure_console()
    from mmtune.evaluation.answers_file import read_answers, write_answers
    from mmtune.evaluation.comparison import compare_answers, print_comparison
    from mmtune.evaluation.ensemble import vote_of_models
    from mmtune.report.run_comparison import write_comparison

    first, *others = [read_answers(side.file) for side in sides]
    comparisons = []
    for side, answers in zip(sides[1:], others, strict=True):
        comparison = compare_answers(first, answers)
        comparisons.append(((sides[0].name, side.name), comparison))
        print_comparison(comparison, comparisons[-1][0])
    result: dict[str, Any] = {}
    if arguments.vote:
        vote = vote_of_models([first, *others], arguments.vote, weights)
        comparisons.append(((sides[vote.best].name, f"vote ({arguments.vote})"), vote.gain))
        left_out = f"; {vote.left_out:,} rows of the first are not in all or are asked differently" if vote.left_out else ""
        print(f"vote of {len(sides)} models on {len(vote.answers):,} rows{left_out}; the best of them is {sides[vote.best].name}")
        if vote.undecided:
            print(f"{vote.undecided:,} rows have no single largest vote: the answer of the earliest model is taken")
        print_comparison(vote.gain, comparisons[-1][0])
        result["vote"] = {
            "how": arguments.vote,
            "weights": weights,
            "rows": len(vote.answers),
            "left_out": vote.left_out,
            "undecided": vote.undecided,
            "best": sides[vote.best].name,
        }
        if arguments.out:
            with report_disk_errors(Path(arguments.out)):
                Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
                write_answers(vote.answers, Path(arguments.out))
            print(f"answers: {arguments.out}")
            result["vote"]["answers"] = arguments.out
    if arguments.html:
        run = next((side.run for side in sides if side.run is not None), None)
        section = load_recipe(RunDirectory(run).recipe).evaluate if run is not None else None
        with report_disk_errors(Path(arguments.html)):
            Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
            write_comparison(comparisons, Path(arguments.html), section.sources if section else ())
        print(f"page: {arguments.html}")
    result["comparisons"] = [{"first": names[0], "second": names[1], **each.as_json()} for names, each in comparisons]
    return result


def _weights(arguments: argparse.Namespace) -> list[float]:
    """The weight of each model in a vote."""
    for name in ("weights", "out"):
        if getattr(arguments, name) and not arguments.vote:
            raise UserError(f"--{name}: needs --vote majority or --vote mean")
    if arguments.out:
        check_jsonl(Path(arguments.out))
    if arguments.vote and len(arguments.model) < 2:
        raise UserError("--vote: expected at least two runs or files of answers")
    if not arguments.weights:
        return [1.0] * len(arguments.model)
    try:
        weights = [float(text) for text in arguments.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != len(arguments.model) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"--weights {arguments.weights}: expected {len(arguments.model)} positive numbers, such as 2,1")
    return weights


def _sides(names: list[str]) -> list[_Side]:
    if len(names) > 1:
        return [_side(name, Path(name), "after") for name in names]
    run = Path(names[0])
    if run.is_file():
        raise UserError(f"{run}: expected a second run or file of answers to compare with, or one run with answers of its base")
    return [_side("base", run, "before"), _side("tuned", run, "after")]


def _side(name: str, path: Path, when: str) -> _Side:
    """
    Raises:
        UserError: there are no answers.
    """
    from mmtune.run_directory import RunDirectory

    run = RunDirectory(path if path.is_dir() else path.parent)
    if not path.exists():
        raise UserError(missing_path_message(str(path), "run or file of answers"))
    file = run.answers(when) if path.is_dir() else path
    if not file.is_file():
        hint = "set evaluate.before: true" if when == "before" else "`mmtune eval` writes them; give its file"
        raise UserError(f"{path}: has no answers ({file.name}); {hint}")
    return _Side(name, file, run.path if run.recipe.is_file() else None)


def _report(arguments: argparse.Namespace) -> Any:
    paths = [Path(name) for name in arguments.model]
    if len(paths) > 1:
        return _compare_runs(paths, Path(arguments.html or "comparison.html"))
    if arguments.html:
        raise UserError(f"--html {arguments.html}: belongs to several runs; the page of one run is its report.html")
    from mmtune.run_directory import RunDirectory

    run = RunDirectory(paths[0])
    _check_started(run)
    summary = _print_summary(run) if run.summary.is_file() else _print_progress(run)
    if run.recipe.is_file():
        rewrite_page(run)
    print(f"page: {run.report}")
    return summary


def _check_started(run: RunDirectory) -> None:
    """Raises UserError if a directory is not a run, or a run that stopped before its first step."""
    if not run.recipe.is_file() or run.is_leftover():
        run.read_summary()


def _print_summary(run: RunDirectory) -> dict[str, Any]:
    from mmtune.evaluation.scores import print_scores
    from mmtune.utils.files import read_record

    number = (int, float)
    summary = read_record(
        run.summary, trainable_parameters=int, total_parameters=int, train_seconds=number, peak_memory_mb=number
    )
    print_scores(summary)
    if not summary.get("tuned_scores"):
        print("no evaluation: the recipe has no evaluate section (`mmtune eval RUN --recipe FILE` evaluates the run)")
    print(
        f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters trained in "
        f"{summary['train_seconds']:g} s, peak memory {summary['peak_memory_mb']:,.0f} MB"
    )
    return summary


def _print_progress(run: RunDirectory) -> dict[str, Any]:
    """Print the state of an unfinished run and its last log."""
    from mmtune.report.curves import RunCurves

    state, read = run.unfinished_state(), RunCurves(run.metrics).update()
    print(f"{run.path} {state}")
    values = {name: value for name, value in read.last.items() if name.endswith("loss") or name.startswith("eval_")}
    shown = "".join(f", {name} {value:.4f}" for name, value in values.items() if isinstance(value, float))
    print(f"last log: step {read.step:,}{shown}" if read.step else "no step is logged yet")
    return {"state": state, "step": read.step, **values}


def rewrite_page(run: RunDirectory) -> None:
    """Write the report of a run again, with what its directory has by now, if that may be written."""
    from mmtune.utils.files import check_writable

    try:
        check_writable(run.path)
    except UserError as error:
        print(f"the page is not written again: {error}")
        return
    configure_console()
    from mmtune.report.run_report import rewrite_report
    from mmtune.training.profiling.profile_table import profile_section

    rewrite_report(run, profile_section(run))


def _compare_runs(paths: list[Path], page: Path) -> Any:
    from mmtune.run_directory import RunDirectory
    from mmtune.utils.files import check_writable, report_disk_errors

    for path in paths:
        _check_started(RunDirectory(path))
    check_writable(page.parent, f"--html {page}: ")
    configure_console()
    from mmtune.evaluation.comparison import print_comparison
    from mmtune.evaluation.scores import print_rows
    from mmtune.report.run_comparison import compare_runs, write_run_comparison

    comparison = compare_runs(paths)
    tables = {"Runs": comparison.results, "Recipe differences": comparison.recipe, "Version differences": comparison.versions}
    for title, rows in tables.items():
        if rows:
            print_rows(title, rows)
    for names, each in comparison.answers:
        print_comparison(each, names)
    for line in comparison.notes:
        print(line)
    with report_disk_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_run_comparison(comparison, page)
    print(f"page: {page}")
    return comparison.as_json()
