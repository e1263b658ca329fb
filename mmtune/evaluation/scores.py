"""The score table of a run, made from `summary.json` alone."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from mmtune.console.styled_console import StyledConsole


def print_scores(summary: dict[str, Any]) -> None:
    """Print exact match before and after tuning, per task and overall, with the majority-class baseline."""
    rows = score_rows(summary)
    if not rows:
        return
    table = Table(title="Held-out exact match", title_justify="left")
    table.add_column("task or source")
    for name in ("questions", "majority-class baseline", "base", "tuned", "95% interval"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["task"] == "overall":
            table.add_section()
        table.add_row(*(Text(row[key]) for key in ("task", "questions", "majority", "base", "tuned", "interval")))
    StyledConsole().print_table(table)
    if "merge_max_logit_difference" in summary:
        print(
            f"merged: largest logit difference {summary['merge_max_logit_difference']:.2g}, "
            f"{summary['merge_same_answers']} of {summary['merge_samples']} greedy answers identical"
        )


def score_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of the score table, as text."""
    base = {item["task"]: item for item in summary.get("base_scores", [])}
    rows = []
    for tuned in summary.get("tuned_scores", []):
        low, high = tuned["interval"]
        before = base.get(tuned["task"])
        rows.append(
            {
                "task": tuned["task"],
                "questions": str(tuned["questions"]),
                "majority": f"{tuned['majority_accuracy']:.1%}",
                "base": f"{before['accuracy']:.1%}" if before else "",
                "tuned": f"{tuned['accuracy']:.1%}",
                "interval": f"{low:.1%} to {high:.1%}",
            }
        )
    return rows
