"""Comparison of the answers of two models: rows joined by id, differences by task, wins and losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from mmtune.evaluation.answers import Answer, score_metrics, statistics_of
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.field_groups import field_groups
from mmtune.evaluation.metrics.metric_table import recorded_metric
from mmtune.evaluation.paired_comparison import PairedDifference, holm, paired_difference
from mmtune.evaluation.scores import difference_lines, format_difference, format_interval, format_score, print_rows
from mmtune.evaluation.tasks import recipe_tasks
from mmtune.recipe.recipe import EvaluateSection
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import UserError

SHOWN = 5
Pair = tuple[Answer, Answer]


@dataclass(frozen=True)
class TaskDifference:
    """The difference of two models on a group of rows.

    Attributes:
        task: the `group` of the answers, or `overall`.
        metric: its name.
        result: the comparison.
        better, worse: how many rows the second model has a better or a worse score on.
        adjusted_p: the p-value adjusted for the number of tasks (Holm); that of the comparison for `overall`.
    """

    task: str
    metric: str
    result: PairedDifference
    better: int
    worse: int
    adjusted_p: float

    @property
    def is_regression(self) -> bool:
        """Whether the second model is worse, and the difference is significant at 5% after the adjustment."""
        return self.adjusted_p < 0.05 and (self.result.difference > 0) != recorded_metric(self.metric).greater_is_better


@dataclass(frozen=True)
class Comparison:
    """The comparison of a second model with a first one.

    Attributes:
        pairs: the answers of both to the rows that are compared.
        tasks: the differences of each task, then `overall`; for each metric.
        only_first, only_second: ids of rows that one of them has.
        changed: by id of a row that is asked differently, what differs, such as its references. These rows are not compared.
    """

    pairs: list[Pair]
    tasks: list[TaskDifference]
    only_first: list[str]
    only_second: list[str]
    changed: dict[str, list[str]]

    def as_json(self) -> dict[str, Any]:
        """The comparison as a JSON object, with the ids of the rows that changed."""
        return {
            "rows": len(self.pairs),
            "only_first": self.only_first,
            "only_second": self.only_second,
            "changed": list(self.changed),
            "tasks": differences_to_dicts(self.tasks),
            "regressions": [each.task for each in self.tasks if each.task != "overall" and each.is_regression],
            "worse": [first.id for first, second in self.pairs if gain(first, second) < 0],
            "better": [first.id for first, second in self.pairs if gain(first, second) > 0],
        }


def compare_answers(first: Sequence[Answer], second: Sequence[Answer]) -> Comparison:
    """Compare the scored answers of two models, row by row.

    Raises:
        UserError: an id occurs twice, or no row can be compared.
    """
    sides = [answers_by_id(answers) for answers in (first, second)]
    joined = [(answer, sides[1][row]) for row, answer in sides[0].items() if row in sides[1]]
    pairs = [pair for pair in joined if not differing_keys(*pair)]
    changed = {pair[0].id: differing for pair in joined if (differing := differing_keys(*pair))}
    only_first, only_second = ([row for row in one if row not in other] for one, other in (sides, sides[::-1]))
    if not pairs:
        ids = " and ".join(next(iter(side), "no row") for side in sides)
        why = f"no row id is in both; the first ids are {ids}"
        if changed:
            row, [what, *_] = next(iter(changed.items()))
            values = " against ".join(repr(_asked(side[row])[what])[:80] for side in sides)
            why = f"{len(changed):,} rows differ in {_listed(changed)}: {what} of {row} is {values}"
        raise UserError(f"no row can be compared: {why}")
    return Comparison(pairs, compare_tasks(pairs), only_first, only_second, changed)


def compare_tasks(pairs: Sequence[Pair]) -> list[TaskDifference]:
    """The differences of each task in the order of first rows, then `overall`; for each metric."""
    differences = []
    metrics = list(dict.fromkeys(first.metric for first, _ in pairs))
    for metric in metrics:
        own = [pair for pair in pairs if pair[0].metric == metric]
        groups = list(dict.fromkeys(first.group for first, _ in own))
        if len(groups) > 1 or len(metrics) > 1:
            rows = [[pair for pair in own if pair[0].group == group] for group in groups]
            results = [_difference(metric, each) for each in rows]
            adjusted = holm([result.p_value for result in results])
            for group, each, result, p_value in zip(groups, rows, results, adjusted, strict=True):
                differences.append(TaskDifference(group, metric, result, *_count(each), p_value))
        result = _difference(metric, own)
        differences.append(TaskDifference("overall", metric, result, *_count(own), result.p_value))
    return differences


def _difference(metric_name: str, pairs: Sequence[Pair]) -> PairedDifference:
    metric = recorded_metric(metric_name)
    first, second = (statistics_of(metric, side) for side in zip(*pairs, strict=True))
    return paired_difference(first, second, [answer.cluster for answer, _ in pairs], metric.headline, metric.proportion)


def gain(first: Answer, second: Answer) -> float:
    """How much better the second score is: positive if it is better, also where lower scores are better."""
    change = second.score - first.score
    return change if recorded_metric(first.metric).greater_is_better else -change


def _count(pairs: Sequence[Pair]) -> tuple[int, int]:
    gains = [gain(*pair) for pair in pairs]
    return sum(each > 0 for each in gains), sum(each < 0 for each in gains)


def answers_by_id(answers: Sequence[Answer]) -> dict[str, Answer]:
    """
    Raises:
        UserError: an id occurs twice.
    """
    [(row, count)] = Counter(answer.id for answer in answers).most_common(1) or [("", 0)]
    if count > 1:
        raise UserError(f"row {row}: expected one answer for each row, got {count}")
    return {answer.id: answer for answer in answers}


def _asked(answer: Answer) -> dict[str, Any]:
    """What must be equal in both answers to a row. Of images the names: the data may be in another folder."""
    return {
        "metric": answer.metric,
        "question": answer.question,
        "images": [PurePath(image).name for image in answer.images],
        "choices": list(answer.choices),
        "options": list(answer.options),
        "references": list(answer.item().references),
    }


def differing_keys(first: Answer, second: Answer) -> list[str]:
    """What differs in how a row was asked, such as its references."""
    asked = _asked(second)
    return [name for name, value in _asked(first).items() if value != asked[name]]


def _listed(changed: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(dict.fromkeys(name for differing in changed.values() for name in differing))


def tuning_metrics(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    """`score_metrics`, the `groups` of the tuned model, and with answers of the base the `comparison` of both."""
    metrics = score_metrics(before, after)
    if groups := field_groups(after):
        metrics["groups"] = groups
    base = {answer.id: answer for answer in before}
    pairs = [(base[answer.id], answer) for answer in after if answer.id in base and not differing_keys(base[answer.id], answer)]
    if pairs:
        metrics["comparison"] = differences_to_dicts(compare_tasks(pairs))
    return metrics


def task_metrics(section: EvaluateSection, run: RunDirectory) -> dict[str, Any]:
    """`tasks` of `summary.json`: by the name of a task the `tuning_metrics` of its answers in the run; nothing without tasks."""
    metrics = {}
    for task in recipe_tasks(section):
        before, after = (run.answers(f"{when}_{task.name}") for when in ("before", "after"))
        metrics[task.name] = tuning_metrics(read_answers(before) if section.before else [], read_answers(after))
    return {"tasks": metrics} if metrics else {}


def differences_to_dicts(differences: Sequence[TaskDifference]) -> list[dict[str, Any]]:
    """Differences as JSON-serializable dicts."""
    return [
        {
            "task": each.task,
            "metric": each.metric,
            **asdict(each.result),
            "difference": each.result.difference,
            "better": each.better,
            "worse": each.worse,
            "adjusted_p": each.adjusted_p,
            "regression": each.is_regression,
        }
        for each in differences
    ]


def difference_rows(differences: Sequence[TaskDifference], names: tuple[str, str]) -> list[dict[str, str]]:
    """The rows of the table of differences as text, by column."""
    several = len({each.metric for each in differences}) > 1
    rows = []
    for each in differences:
        result = each.result
        rows.append(
            {
                "task or source": each.task,
                **({"metric": each.metric} if several else {}),
                "rows": f"{result.rows:,}",
                "images": f"{result.clusters:,}",
                names[0]: format_score(result.first, each.metric),
                names[1]: format_score(result.second, each.metric),
                "difference": format_difference(result.difference, each.metric),
                "95% interval": format_interval(result.interval, each.metric),
                "p": f"{each.adjusted_p:.3g}",
                "better": str(each.better),
                "worse": str(each.worse),
                "detectable": "" if result.detectable is None else format_difference(result.detectable, each.metric)[1:],
            }
        )
    return rows


def print_comparison(comparison: Comparison, names: tuple[str, str]) -> None:
    """Print the rows that are not compared, the table of differences, how to read it, and the tasks that became worse."""
    print(f"{names[1]} against {names[0]}:")
    for line in unmatched_lines(comparison, names):
        print(line)
    rows = difference_rows(comparison.tasks, column_names(names))
    print_rows("Difference of the scores", rows, [row["task or source"] == "overall" for row in rows])
    for line in difference_lines(differences_to_dicts(comparison.tasks)):
        print(line)


def column_names(names: tuple[str, str]) -> tuple[str, str]:
    """Short names of two models for a table."""
    return names if names == ("base", "tuned") else ("first", "second")


def unmatched_lines(comparison: Comparison, names: tuple[str, str]) -> list[str]:
    """One line for each kind of row that is not compared."""
    kinds = {
        f"only in {names[0]}": comparison.only_first,
        f"only in {names[1]}": comparison.only_second,
        f"that differ in {_listed(comparison.changed)}": list(comparison.changed),
    }
    return [
        f"not compared: {len(rows):,} rows {kind}: {', '.join(rows[:SHOWN])}{', ...' if len(rows) > SHOWN else ''}"
        for kind, rows in kinds.items()
        if rows
    ]
