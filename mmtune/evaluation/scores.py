"""The score table of a run, made from `summary.json` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mmtune.console.styled_console import StyledConsole
from mmtune.evaluation.metrics.metric_table import METRICS

SHOWN_GROUPS = 20
"""Groups in the table of a field."""
SHOWN_CHARACTERS = 60
"""Characters of a group's name in a table."""


def print_scores(summary: dict[str, Any], column: str = "tuned", task: str | None = None) -> None:
    """Print the scores before and after tuning, by task and overall, with intervals and baselines, and those by field.

    Args:
        summary: with the scores as `tuned_scores`, and those of the base as `base_scores`, if any.
        column: the name of the column of `tuned_scores`.
        task: the name of the evaluation task. The further numbers of its groups are then printed too, as benchmarks report them.
    """
    rows = score_rows(summary)
    if not rows:
        return
    named = [{column if name == "tuned" else name: text for name, text in row.items()} for row in rows]
    print_rows(score_title(summary, task), named, [score["task"] == "overall" for score in summary["tuned_scores"]])
    for line in further_lines(summary, every_group=task is not None) + difference_lines(summary.get("comparison", [])):
        print(line)
    for groups in summary.get("groups", ()):
        print_rows(group_title(groups), group_rows(groups))
        if (gap := gap_line(groups)) is not None:
            print(gap)
    for name, metrics in summary.get("tasks", {}).items():
        print_scores(metrics, column, name)
    if "merge_max_logit_difference" in summary:
        print(
            f"merged: largest logit difference {summary['merge_max_logit_difference']:.2g}, "
            f"{summary['merge_same_answers']} of {summary['merge_samples']} greedy answers identical"
        )


def print_rows(title: str, rows: Sequence[Mapping[str, str]], sections: Sequence[bool] = ()) -> None:
    """Print a table of rows of text by column, the first one on the left; `sections` says above which rows a line is drawn."""
    table = Table(title=Text(title), title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="right" if number else "left")
    for number, row in enumerate(rows):
        if number < len(sections) and sections[number]:
            table.add_section()
        table.add_row(*map(Text, row.values()))
    StyledConsole().print_table(table)


def score_title(summary: Mapping[str, Any], task: str | None = None) -> str:
    """The title of the score table: the name of the task, and its metrics."""
    metrics = ", ".join(dict.fromkeys(score["metric"] for score in summary["tuned_scores"]))
    return f"Held-out {metrics}" if task is None else f"{task}: {metrics}"


def score_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the score table as text, by column. Columns in which no row has a value are left out."""
    base = {(item["task"], item["metric"]): item for item in summary.get("base_scores", [])}
    tuned = summary.get("tuned_scores", [])
    several = len({item["metric"] for item in tuned}) > 1
    differences = {(item["task"], item["metric"]): item for item in summary.get("comparison", [])}
    rows = []
    for item in tuned:
        name = item["metric"]
        before, change = base.get((item["task"], name)), differences.get((item["task"], name))
        rows.append(
            {
                "task or source": item["task"],
                "metric": name if several else "",
                "questions": str(item["questions"]),
                "images or documents": str(item["clusters"]) if item["clusters"] < item["questions"] else "",
                "unparsed": str(item["unparsed"]) if item["unparsed"] else "",
                "majority-class baseline": "" if item["baseline"] is None else format_score(item["baseline"], name),
                "base": format_score(before["score"], name) if before else "",
                "base unparsed": str(before["unparsed"]) if before and before["unparsed"] else "",
                "tuned": format_score(item["score"], name),
                "95% interval": " to ".join(format_score(limit, name) for limit in item["interval"] or ()),
                "difference": format_difference(change["difference"], name) if change else "",
                "its 95% interval": format_interval(change["interval"], name) if change else "",
            }
        )
    used = {column for row in rows for column, text in row.items() if text}
    return [{column: text for column, text in row.items() if column in used} for row in rows]


def further_lines(summary: Mapping[str, Any], every_group: bool = False) -> list[str]:
    """For each overall score, a line with the further numbers of its metric, and one with its unparsed answers.

    With `every_group`, the further numbers of each task or source too.
    """
    lines = []
    for item in summary.get("tuned_scores", []):
        overall = item["task"] == "overall"
        if not (overall or every_group):
            continue
        name, numbers = item["metric"], {key: value for key, value in item["further"].items() if isinstance(value, (int, float))}
        if numbers:
            shown = ", ".join(f"{key} {_format_further(key, value, name)}" for key, value in numbers.items())
            lines.append(f"{name if overall else item['task']}: {shown}")
        if overall and item["unparsed"]:
            rules = [METRICS[name].unparsed] if name in METRICS and METRICS[name].unparsed != "never" else []
            rule = "; or ".join([*rules, *(f"lacks {marker!r}" for marker in item.get("missing_markers", ()))])
            value = METRICS[name].unparsed_score if name in METRICS else 0.0
            why = f" ({rule})" if rule else ""
            lines.append(f"{name}: {item['unparsed']} of {item['questions']} answers are unparsed{why} and count as {value:g}")
    return lines


def group_rows(groups: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of the table of an object of `field_groups` as text, by column: the `SHOWN_GROUPS` largest groups."""
    name = groups["metric"]
    by_size = sorted(groups["scores"], key=lambda score: -score["questions"])
    largest = {score["task"] for score in by_size[:SHOWN_GROUPS]}
    return [
        {
            "group": _short(score["task"]),
            "questions": f"{score['questions']:,}",
            "images or documents": f"{score['clusters']:,}",
            "unparsed": f"{score['unparsed']:,}",
            "score": format_score(score["score"], name),
            "95% interval": " to ".join(format_score(limit, name) for limit in score["interval"] or ()),
        }
        for score in groups["scores"]
        if score["task"] in largest
    ]


def group_title(groups: Mapping[str, Any]) -> str:
    """The title of the table of an object of `field_groups`."""
    count = len(groups["scores"])
    more = f", the {SHOWN_GROUPS} largest of {count:,} groups" if count > SHOWN_GROUPS else ""
    return f"{groups['metric']} by {groups['field']}{more}"


def _short(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}..."


def gap_line(groups: Mapping[str, Any]) -> str | None:
    """The gap of an object of `field_groups` in words; None without one."""
    gap, name = groups["gap"], groups["metric"]
    if gap is None:
        return None
    several = " for all pairs together" if len(groups["scores"]) > 2 else ""
    interval = f", 95% interval{several} {format_interval(gap['interval'], name)}" if gap["interval"] else ""
    pair = f"{_short(gap['highest'])} minus {_short(gap['lowest'])}"
    return f"{name} by {groups['field']}: {pair}: {format_difference(gap['difference'], name)}{interval}"


def metric_lines(summary: Mapping[str, Any]) -> list[str]:
    """What each metric measures, and the scorer or paper that defines it."""
    names = dict.fromkeys(item["metric"] for item in summary.get("tuned_scores", []) if item["metric"] in METRICS)
    return [f"`{name}`: {METRICS[name].about} ({METRICS[name].source})." for name in names]


def generation_line(summary: dict[str, Any]) -> str:
    """One sentence on the generation settings of a run's answers, and one on unused settings of its base; "" without answers."""
    if "generation" not in summary:
        return ""
    from mmtune.models.generation import SAMPLING_SETTINGS  # imports torch, which a table of scores does not need

    used, unused = summary["generation"], summary["generation_not_used"]
    names = {"eos_token_id": "stop token", "pad_token_id": "padding token", "bos_token_id": "first token"}
    settings = [f"at most {used['max_new_tokens']} new tokens"]
    for key, name in names.items():
        if used[key] is not None:
            settings.append(f"{name} {', '.join(map(str, used[key])) if isinstance(used[key], list) else used[key]}")
    line = f"Answers are generated greedily: {', '.join(settings)}."
    if not unused:
        return line
    of_sampling, others = (
        ", ".join(f"{key} {value}" for key, value in unused.items() if (key in SAMPLING_SETTINGS) == sampling)
        for sampling in (True, False)
    )
    parts = [f"{of_sampling}, which a release keeps"] * bool(of_sampling) + [f"{others}, which a release leaves out"] * bool(
        others
    )
    return f"{line} The base's generation config also sets {'; and '.join(parts)}. No answer here used it."


def difference_lines(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """How to read differences: for each overall one its test, then the tasks that became significantly worse.

    Args:
        differences: as in `summary.json` (`comparison`).
    """
    lines = []
    for each in differences:
        if each["task"] == "overall":
            metric, interval, detectable = each["metric"], each["interval"], each["detectable"]
            line = f"{metric}: {format_difference(each['difference'], metric)}"
            line += f", 95% interval {format_interval(interval, metric)}" if interval else ""
            line += f", p = {each['p_value']:.3g} ({each['test']}"
            line += f"; {each['rows']:,} rows of {each['clusters']:,} images or documents)"
            lines.append(
                line + (f"; detectable with 80% power: {format_difference(detectable, metric)[1:]}" if detectable else "")
            )
    worse = [
        f"{each['task']} {format_difference(each['difference'], each['metric'])} (p = {each['adjusted_p']:.3g})"
        for each in differences
        if each["task"] != "overall" and each["regression"]
    ]
    if worse:
        lines.append(f"worse by task at 5%: {', '.join(worse)}; p is adjusted for the number of tasks (Holm)")
    return lines


def format_difference(value: float, metric: str) -> str:
    """A difference of scores as text, with its sign: in percentage points (pp) if scores are shares of 1."""
    return f"{100 * value:+.1f} pp" if _is_percent(metric) else f"{value:+.4g}"


def format_interval(interval: Sequence[float] | None, metric: str) -> str:
    """An interval of a difference as text."""
    return "" if interval is None else " to ".join(format_difference(limit, metric).removesuffix(" pp") for limit in interval)


def format_score(value: float, metric: str) -> str:
    """A score as text: in percent if it is a share of 1."""
    return f"{value:.1%}" if _is_percent(metric) else f"{value:.4g}"


def _format_further(key: str, value: float, metric: str) -> str:
    unit = METRICS[metric].units.get(key) if metric in METRICS else None
    return format_score(value, metric) if unit is None else f"{value:.4g} {unit}"


def _is_percent(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].percent
