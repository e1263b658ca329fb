"""The vote of several models: their answers to a row become one, and its gain over the best of them.

Only answers are combined (decision-level fusion), so the models may be of any family.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmtune.evaluation.answers import Answer, score_answers, statistics_of
from mmtune.evaluation.comparison import Comparison, answers_by_id, compare_answers, differing_keys
from mmtune.evaluation.metrics.metric_table import METRICS
from mmtune.utils.errors import UserError

How = Literal["majority", "mean"]


@dataclass(frozen=True)
class Vote:
    """
    Attributes:
        answers: one answer to each row that all models were asked in the same way.
        left_out: how many rows of the first model are not among them.
        undecided: in how many of the rows several answers have the largest sum, or probability, so that the order decides.
        best: the index of the model with the best score on these rows; the first of equal ones.
        gain: the vote compared with that model.
    """

    answers: list[Answer]
    left_out: int
    undecided: int
    best: int
    gain: Comparison


def vote_of_models(models: Sequence[Sequence[Answer]], how: How, weights: Sequence[float]) -> Vote:
    """Combine the scored answers of several models. All are scored again, on the rows that they have in common.

    `majority`: the answer with the largest sum of weights. Answers that the metric reads as the same, `B` and `(B) a cat`,
    are one; those that it cannot read have no vote. Of equal sums, the answer of the earliest model wins.
    `mean`: the choice with the largest weighted mean of probabilities, each model's being the softmax of its `choice_scores`.

    Args:
        models: the answers of each model, at least two.
        how: as above.
        weights: of each model, positive.

    Raises:
        UserError: no row is common to all, rows of several metrics, a metric that is a function, or `mean` of answers without a
            finite log-likelihood for each choice.
    """
    sides = [answers_by_id(answers) for answers in models]
    rows = []
    for row, first in sides[0].items():
        others = [side[row] for side in sides[1:] if row in side]
        if len(others) == len(sides) - 1 and not any(differing_keys(first, other) for other in others):
            rows.append([first, *others])
    if not rows:
        raise UserError("no vote: no row is asked in the same way in all of them")
    names = list(dict.fromkeys(row[0].metric for row in rows))
    if len(names) > 1:
        raise UserError(f"no vote: expected answers of one metric, to choose the best model by it, got {', '.join(names)}")
    if names[0] not in METRICS:
        raise UserError(f"no vote: {names[0]} is not a metric of the table, so the vote cannot be scored")
    own = [score_answers(each) for each in zip(*rows, strict=True)]
    rows = [list(each) for each in zip(*own, strict=True)]
    combine = _majority if how == "majority" else _mean
    voted = [combine(row, weights) for row in rows]
    answers = score_answers([answer for answer, _ in voted])
    best = max(range(len(own)), key=lambda index: _overall(own[index]))
    gain = compare_answers(own[best], answers)
    return Vote(answers, len(sides[0]) - len(rows), sum(not decided for _, decided in voted), best, gain)


def _overall(answers: Sequence[Answer]) -> float:
    """The overall score of a model, negated where lower scores are better."""
    metric = METRICS[answers[0].metric]
    score = float(metric.headline(statistics_of(metric, answers).sum(axis=0)))
    return score if metric.greater_is_better else -score


def _majority(row: Sequence[Answer], weights: Sequence[float]) -> tuple[Answer, bool]:
    """The answer of a row, and whether it alone has the largest sum."""
    metric = METRICS[row[0].metric]
    totals: dict[str, float] = defaultdict(float)
    first: dict[str, Answer] = {}
    for answer, weight in zip(row, weights, strict=True):
        if answer.parsed:
            read = metric.answer_class(answer.item())
            totals[read] += weight
            first.setdefault(read, answer)
    if not totals:
        return _as_vote(row[0], row[0].prediction), False
    largest = [read for read, total in totals.items() if math.isclose(total, max(totals.values()))]  # .1 + .2 is not .3
    winner = first[largest[0]]
    return _as_vote(winner, winner.prediction), len(largest) == 1


def _mean(row: Sequence[Answer], weights: Sequence[float]) -> tuple[Answer, bool]:
    """As `_majority`, of probabilities."""
    for number, answer in enumerate(row, start=1):
        if not answer.choice_scores:
            raise UserError(
                f"row {answer.id} of model {number}: a mean needs the log-likelihoods of choices (evaluate.score: choices); use "
                "majority"
            )
        if len(answer.choice_scores) != len(answer.choices) or not all(map(math.isfinite, answer.choice_scores)):
            raise UserError(
                f"row {answer.id} of model {number}: choice_scores: expected {len(answer.choices)} finite numbers, one for each "
                f"choice, got {list(answer.choice_scores)}"
            )
    totals = [0.0] * len(row[0].choices)
    for answer, weight in zip(row, weights, strict=True):
        shares = [math.exp(score - max(answer.choice_scores)) for score in answer.choice_scores]
        totals = [total + weight * share / sum(shares) for total, share in zip(totals, shares, strict=True)]
    largest = [index for index, total in enumerate(totals) if math.isclose(total, max(totals))]
    return _as_vote(row[0], row[0].choices[largest[0]]), len(largest) == 1


def _as_vote(answer: Answer, prediction: str) -> Answer:
    """The answer of a model as the vote, without what only the answer of a single model has."""
    return replace(answer, prediction=prediction, near_tie=False, sampled=(), choice_scores=())
