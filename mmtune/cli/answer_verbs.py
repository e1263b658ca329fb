"""The verb `mmtune score`: a metric on answers that were made elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import AddVerb


def add_answer_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs that work on files of answers.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "score", _score, "score answers that were made elsewhere")
    verb.add_argument(
        "data",
        metavar="FILE.jsonl",
        help="JSON Lines: `prediction`, `references`, optionally `id`, `cluster`, `task`, and what the metric needs",
    )
    verb.add_argument("--metric", required=True, metavar="NAME", help="a metric of docs/evaluation.md, or FILE.py:function")
    verb.add_argument("--answer-after", metavar="TEXT", help="score only the text after this, in predictions and references")


def _score(arguments: argparse.Namespace) -> Any:
    from mmtune.evaluation.answers import item_scores, read_items, scores_to_dicts
    from mmtune.evaluation.metrics.metric_table import find_metric
    from mmtune.evaluation.scores import print_scores

    metric = find_metric(arguments.metric)
    items = read_items(Path(arguments.data), metric, arguments.answer_after)
    values = metric.score_all(items)
    scores = scores_to_dicts(item_scores(metric, items, values, [str(item.fields.get("task") or "untitled") for item in items]))
    print_scores({"tuned_scores": scores}, column="score")
    answers = [
        {"id": item.fields["id"], "score": value or 0.0, "parsed": value is not None}
        for item, value in zip(items, values, strict=True)
    ]
    return {"scores": scores, "answers": answers}
