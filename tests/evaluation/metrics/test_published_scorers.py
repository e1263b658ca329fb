"""Metrics equal the published scorers, whose numbers `tests/evaluation/metrics/write_scorer_fixtures.py` recorded."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mmtune.evaluation.metrics.metric import Item
from mmtune.evaluation.metrics.metric_table import METRICS
from mmtune.evaluation.metrics.ptb_tokenizer import ptb_tokens


@cache
def _fixtures() -> dict[str, Any]:
    path = Path(__file__).parent / "fixtures" / "scorers.json.gz"
    fixtures: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return fixtures


def _read(name: str) -> tuple[list[Item], Any]:
    recorded = _fixtures()[name]
    items = [
        Item(case["prediction"], tuple(case["references"]), str(n), {"options": case.get("options", ())})
        for n, case in enumerate(recorded["cases"])
    ]
    assert len(items) >= 200
    return items, recorded["scores"]


def _headline(name: str, items: list[Item]) -> float:
    metric = METRICS[name]
    return float(metric.headline(metric.statistics(items, metric.score_all(items)).sum(axis=0)))


@pytest.mark.parametrize("name", ["vqa_accuracy", "textvqa_accuracy", "anls", "token_f1", "relaxed_accuracy"])
def test_a_score_equals_that_of_the_published_scorer(name: str) -> None:
    items, scores = _read(name)
    assert METRICS[name].score_all(items) == pytest.approx(scores, abs=1e-6)
    assert _headline(name, items) == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    assert len(set(scores)) > 1


def test_mmmu_equals_its_code_and_no_letter_is_drawn() -> None:
    items, scores = _read("mmmu")
    assert METRICS["mmmu"].score_all(items) == scores
    assert {*scores} == {0.0, 1.0, None}


def test_yes_no_equals_pope() -> None:
    items, scores = _read("yes_no")
    assert len({item.prediction for item in items}) == len(items)
    assert METRICS["yes_no"].score_all(items).count(None) == 0
    metric = METRICS["yes_no"]
    numbers = {"accuracy": _headline("yes_no", items), **metric.further(items, metric.score_all(items))}
    assert numbers == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("name", ["cer", "wer"])
def test_error_rates_equal_jiwer(name: str) -> None:
    items, scores = _read("error_rates")
    assert METRICS[name].score_all(items) == pytest.approx(scores[name], abs=1e-6)
    assert _headline(name, items) == pytest.approx(scores["all"][name], abs=1e-6)


def test_iou_equals_that_of_coco() -> None:
    items, scores = _read("boxes")
    assert METRICS["iou"].score_all(items) == pytest.approx(scores, abs=1e-6)
    assert METRICS["acc_at_iou_0.5"].score_all(items) == [float(score >= 0.5) for score in scores]


def test_tokens_equal_those_of_the_java_tokenizer() -> None:
    items, scores = _read("captions")
    texts = [text for item in items for text in (item.prediction, *item.references)]
    assert [" ".join(ptb_tokens(text)) for text in texts] == scores["tokens"]


@pytest.mark.parametrize("name", ["cider_d", "bleu", "rouge_l"])
def test_caption_scores_equal_pycocoevalcap(name: str) -> None:
    items, scores = _read("captions")
    metric = METRICS[name]
    assert metric.score_all(items) == pytest.approx(scores[name]["each"], abs=1e-6)
    headline = [_headline(name, items)]
    if name == "bleu":
        headline = [*metric.further(items, metric.score_all(items)).values(), *headline]
    assert headline == pytest.approx(scores[name]["all"] if name == "bleu" else [scores[name]["all"]], abs=1e-6)
