"""Properties that every metric of the table has."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmtune.evaluation.answers import Answer, group_scores, item_scores, score_answers
from mmtune.evaluation.metrics.metric import Item
from mmtune.evaluation.metrics.metric_table import METRICS

EXAMPLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "exact_match": (["a cat", "Paris.", "12", "left"], {}),
    "token_f1": (["a black cat", "the city of Paris", "12", "turn left"], {}),
    "vqa_accuracy": (["a cat", "two", "don't know", "yes"], {}),
    "textvqa_accuracy": (["a cat", "two", "don't know", "Dakota's"], {}),
    "anls": (["a cat", "Paris", "12.50", "UCSF"], {}),
    "relaxed_accuracy": (["12", "-3.5", "40%", "Yes"], {}),
    "circular_choice": (["A", "B", "C", "dog"], {"options": ["cat", "dog", "bird"]}),
    "multiple_choice": (["A", "B", "C", "dog"], {"options": ["cat", "dog", "bird"]}),
    "mmmu": (["A", "B", "C", "B"], {"options": ["cat", "dog", "bird"]}),
    "yes_no": (["yes", "no", "Yes.", "No"], {}),
    "classification": (["cat", "dog", "Bird", "dog."], {"choices": ["cat", "dog", "bird"]}),
    "numeric": (["12", "-3.5", "1,000 apples", "0"], {}),
    "cer": (["a cat", "Paris.", "12", "左"], {}),
    "wer": (["a cat", "Paris, France", "12", "turn left"], {}),
    "cider_d": (["a cat on a mat", "two dogs run", "a red bus", "a man's hat"], {}),
    "bleu": (["a cat sits on a mat", "two dogs run in a park", "a red bus on a street", "a man's hat on a chair"], {}),
    "rouge_l": (["a cat on a mat", "two dogs run", "a red bus", "a man's hat"], {}),
    "iou": (["[1, 2, 30, 40]", "(5 5 10 10)", "[[0, 0, 5, 5], [7, 7, 9, 9]]", "0.1, 0.2, 0.5, 0.6"], {}),
    "acc_at_iou_0.5": (["[1, 2, 30, 40]", "(5 5 10 10)", "[[0, 0, 5, 5], [7, 7, 9, 9]]", "0.1, 0.2, 0.5, 0.6"], {}),
    "json_fields": (['{"a": 1, "b": ["x", "y"]}', '{"name": "Ann"}', "[1, 2]", '{"a": {"b": null}}'], {}),
}
"""References and further fields of a row, for each metric."""

PLAIN_ANSWERS = ["", " ", "yes", "A", "A or B", "cat", "12", "12 or 13", "[1, 2, 30, 40]", "{}", "```json\n{}\n```", "a." * 50]
WORDS = [*["a", "the", "cat", "Yes", "no", "12", "B.", "3.5", "1/2", "not", "nan"], *".,[]{}():'\"-"]
TEXTS = st.text(max_size=40) | st.sampled_from(PLAIN_ANSWERS) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


def _items(name: str, predictions: list[str]) -> list[Item]:
    references, fields = EXAMPLES[name]
    copies = 4 if name in ("vqa_accuracy", "textvqa_accuracy") else 1
    return [
        Item(text, (references[n % len(references)],) * copies, f"image {n // 2}", fields) for n, text in enumerate(predictions)
    ]


def _headline(name: str, items: list[Item]) -> float:
    metric = METRICS[name]
    return float(metric.headline(metric.statistics(items, metric.score_all(items)).sum(axis=0)))


def test_every_metric_has_an_example_that_it_can_score() -> None:
    assert EXAMPLES.keys() == METRICS.keys()
    for name, metric in METRICS.items():
        assert [metric.problem(item) for item in _items(name, [""] * 4)] == [None] * 4


@pytest.mark.parametrize("name", METRICS)
def test_the_reference_is_the_best_answer(name: str) -> None:
    items = [replace(item, prediction=item.references[0]) for item in _items(name, [""] * 4)]
    best = {"cer": 0.0, "wer": 0.0, "cider_d": 10.0}.get(name, 1.0)
    scores = METRICS[name].score_all(items)
    if name not in ("bleu", "cider_d"):  # these need four words for a full score
        assert scores == pytest.approx([best] * 4, abs=1e-6)
    assert all(score is not None and METRICS[name].is_right(score) for score in scores)


@pytest.mark.parametrize("name", METRICS)
def test_any_answer_has_a_finite_score_or_is_unparsed(name: str) -> None:
    metric = METRICS[name]
    largest = {"cider_d": 10.0, "cer": math.inf, "wer": math.inf}.get(name, 1.0)

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(predictions=st.lists(TEXTS, min_size=1, max_size=5))
    def check(predictions: list[str]) -> None:
        items = _items(name, predictions)
        scores = metric.score_all(items)
        assert all(score is None or (math.isfinite(score) and 0 <= score <= largest + 1e-9) for score in scores)
        assert not metric.proportion or set(scores) <= {0.0, 1.0, None}
        assert scores == metric.score_all(items)
        if metric.unparsed == "never":
            assert None not in scores
        # The order of the rows, and rows given twice, do not change the headline number.
        headline = _headline(name, items)
        assert _headline(name, items[::-1]) == pytest.approx(headline, abs=1e-9)
        if name != "cider_d":  # its document frequencies do change
            assert _headline(name, items * 2) == pytest.approx(headline, abs=1e-6)
        # More references never make an answer worse.
        if name not in ("vqa_accuracy", "textvqa_accuracy", "cider_d", "bleu"):
            more = [replace(item, references=(*item.references, *items[0].references)) for item in items]
            for score, with_more in zip(scores, metric.score_all(more), strict=True):
                assert (score is None) == (with_more is None)
                if score is not None and with_more is not None:
                    assert with_more <= score + 1e-9 if not metric.greater_is_better else with_more >= score - 1e-9
        [*_, overall] = item_scores(metric, items, scores, ["all"] * len(items))
        assert overall.unparsed == scores.count(None)
        assert overall.score == pytest.approx(headline, abs=1e-9)
        if overall.interval is not None:
            assert overall.interval[0] <= overall.interval[1]
        json.dumps(overall.further, allow_nan=False)

    check()


@pytest.mark.parametrize("name", METRICS)
def test_unparsed_answers_count_as_zero(name: str) -> None:
    items = _items(name, ["nothing that can be read as an answer"] * 3)
    scores = METRICS[name].score_all(items)
    if METRICS[name].unparsed == "never":
        assert None not in scores
    else:
        assert scores == [None] * 3 and _headline(name, items) == 0
        right = replace(items[0], prediction=items[0].references[0], cluster="another image")
        # Of json_fields: twice 3 right fields; 3 fields in the answer, and 3, 3, 1 and 2 in the references.
        # Of circular_choice: two of the three are about one image, and so passes of one question.
        expected = {"json_fields": 2 * 3 / (3 + 3 + 3 + 1 + 2), "circular_choice": 1 / 3}
        assert _headline(name, [right, *items]) == expected.get(name, 0.25)


@pytest.mark.parametrize("name", METRICS)
def test_an_answer_without_answer_after_is_unparsed_and_counts_as_an_empty_one(name: str) -> None:
    references, fields = EXAMPLES[name]
    texts, options, choices = (references[0],) * 4, *(tuple(fields.get(key, ())) for key in ("options", "choices"))
    answers = score_answers(
        [
            Answer(str(n), None, "?", (), texts, text, str(n), name, answer_after="Answer:", options=options, choices=choices)
            for n, text in enumerate((f"I look closer. Answer: {texts[0]}", f"{texts[0]}, or let me look closer"))
        ]
    )
    assert [answer.parsed for answer in answers] == [True, False]
    assert answers[1].score == METRICS[name].unparsed_score == (METRICS[name].score_all([Item("", texts, "", fields)])[0] or 0)
    [overall] = group_scores(answers)
    assert overall.unparsed == 1 and overall.questions == 2 and overall.missing_markers == ("Answer:",)
    assert overall.score == _headline(name, [answer.item() for answer in answers])


def test_several_boxes_are_matched_one_to_one() -> None:
    iou, accuracy = METRICS["iou"], METRICS["acc_at_iou_0.5"]
    two = ("[0, 0, 10, 10] and [20, 20, 30, 30]",)
    assert iou.score(Item("[20, 20, 30, 30], [0, 0, 10, 10]", two)) == 1
    assert iou.score(Item("[0, 0, 10, 10]", two)) == 1 / 2  # a missing box
    assert iou.score(Item("[0, 0, 10, 10], [0, 0, 10, 10]", two)) == 1 / 2  # a box counts once
    assert iou.score(Item("[0, 0, 10, 10] [20, 20, 30, 30] [40, 40, 50, 50]", two)) == 2 / 3  # an extra box
    assert accuracy.score(Item("[0, 0, 10, 5], [20, 20, 30, 24]", two)) == 1 / 2
    assert accuracy.score(Item("[[0, 0, 10, 5], [20, 20, 30, 24]]", two)) == 1 / 2
    assert iou.score(Item("the box is at 3, 4", two)) is None
    one = ("[0,0,10,10]",)
    for text in ("<box>(0, 0, 10, 10)</box>", '```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "a"}]\n```', "(0,0),(10,10)"):
        assert iou.score(Item(text, one)) == 1
    boxes = Item("<loc_0><loc_0><loc_9><loc_9><loc_20><loc_20><loc_29><loc_29>", ("a<loc_0><loc_0><loc_9><loc_9>",))
    assert iou.score(boxes) == 1 / 2  # two boxes, and no quadrilateral
    assert iou.score(Item("<loc0000><loc0000><loc0010><loc0005> cat", ("<loc0000><loc0000><loc0010><loc0010> cat",))) == 1 / 2


def test_corpus_bleu_is_not_the_mean_of_the_scores() -> None:
    items = [Item("a cat sits on a mat", ("a cat sits on a mat",)), Item("dog", ("two dogs run in a green park",))]
    metric = METRICS["bleu"]
    assert _headline("bleu", items) != pytest.approx(np.mean([metric.score(item) or 0 for item in items]), abs=0.05)


def test_fields_of_nested_json() -> None:
    metric = METRICS["json_fields"]
    reference = ('{"name": "Ann", "items": [{"price": 1.0}, {"price": 2}], "paid": true}',)
    assert (
        metric.score(Item('```json\n{"paid": true, "items": [{"price": 2}, {"price": 1}], "name": "ANN."}\n```', reference)) == 1
    )
    assert metric.score(Item('{"name": "Ann"}', reference)) == pytest.approx(2 * 1 / (1 + 4))
    assert metric.score(Item('{"name": "Ann", "paid": 1, "items": []}', reference)) == pytest.approx(
        2 * 1 / (3 + 4)
    )  # 1 is not true
    for hostile in ("name: Ann", '{"name": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, "3", "```\n{}\n```\n```\n{}\n```", "null"):
        assert metric.score(Item(hostile, reference)) is None
    for hostile in ('{"a": 1e999}', '{"a": -1e999}', '{"a": Infinity}', "[" * 300 + "]" * 300):
        assert metric.score(Item(hostile, reference)) is None
    fenced = '{"code": "```python\\nx = 1\\n```"}'
    assert metric.problem(Item("", (fenced,))) is None and metric.score(Item(fenced, (fenced,))) == 1
    assert metric.score(Item("\ufeff" + reference[0], reference)) == 1


def test_items_of_a_json_list_are_matched_one_to_one() -> None:
    metric = METRICS["json_fields"]
    tea, cake, pie = {"name": "tea", "price": 2}, {"name": "cake", "price": 9}, {"name": "pie", "price": 9, "note": ["a", "b"]}

    def score(answer: list[Any], reference: list[Any]) -> float:
        item = Item(json.dumps(answer), (json.dumps(reference),))
        value = metric.score(item)
        assert value is not None
        assert metric.further([item], [value])["all_fields"] == (value == 1)
        return value

    assert score([cake, tea], [tea, cake]) == 1
    assert score([{**tea, "price": 9}, {**cake, "price": 2}], [tea, cake]) == 1 / 2  # exchanged prices
    assert score([tea, tea], [tea, cake]) == 1 / 2  # an item counts once
    assert score([tea], [tea, cake]) == pytest.approx(2 * 2 / (2 + 4))
    assert score([cake, pie], [pie, tea]) == pytest.approx(2 * 4 / (6 + 6))  # the equal item first; cake and tea share nothing
    assert score([[1, 2], [3, 4]], [[3, 4], [1, 5]]) == 3 / 4
    assert score([True, "1"], [1, 1.0]) == 0
    assert score([{**pie, "note": ["b", "a"]}], [pie]) == 1


def test_the_matching_of_a_json_list_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        first, second = ([{key: int(draw.integers(2)) for key in "abc"} for _ in range(4)] for _ in range(2))
        best = max(
            sum(one[key] == other[key] for one, other in zip(first, order, strict=True) for key in "abc")
            for order in itertools.permutations(second)
        )
        assert METRICS["json_fields"].score(Item(json.dumps(first), (json.dumps(second),))) == pytest.approx(best / 12)


@pytest.mark.filterwarnings("error")
def test_boxes_in_full_width_text_and_of_absurd_size() -> None:
    iou, box = METRICS["iou"], ("[1, 2, 3, 4]",)
    for text in (
        "[1\uff0c2\uff0c3\uff0c4]",
        "\uff081\uff0c2\uff0c3\uff0c4\uff09",
        "[1\u30012\u30013\u30014]",
        "\uff3b\uff11, 2, 3, 4\uff3d",
    ):
        assert iou.score(Item(text, box)) == 1
    for text in (f"[1, 2, 3, {'9' * 400}]", f"[1, 2, 3, {'9' * 200}]", f"[1, 2, 3, 4] [{'9' * 400}, 2, 3, 4]"):
        assert iou.score(Item(text, box)) is None


def test_error_rates_compare_composed_characters() -> None:
    for name in ("cer", "wer"):
        assert (
            METRICS[name].score(Item("cafe\u0301", ("caf\u00e9",)))
            == 0
            == METRICS[name].score(Item("caf\u00e9", ("cafe\u0301",)))
        )


@pytest.mark.parametrize(
    "form", ["[{}, {}, {}, {}, {}, {}, {}, {}]", "[[{}, {}], [{}, {}], [{}, {}], [{}, {}]]", "a" + "<loc_{}>" * 8]
)
def test_the_overlap_of_quadrilaterals_is_that_of_their_pixels(form: str) -> None:
    """Corners of four quarters around a center, so that they are convex up to a little; the reference is drawn by Pillow."""
    chosen = random.Random(form)
    for _ in range(10):
        quads = []
        for _ in range(2):
            x, y, width, height = (chosen.randint(*limits) for limits in ((300, 700), (300, 700), (120, 250), (120, 250)))
            shift = [chosen.randint(-40, 40) for _ in range(4)]
            corners = [x - width, y - height + shift[0], x + width + shift[1], y - height, x + width, y + height + shift[2]]
            quads.append([*corners, x - width + shift[3], y + height])
        masks = []
        for quad in quads:
            mask = Image.new("1", (1000, 1000))
            ImageDraw.Draw(mask).polygon(quad, fill=1)
            masks.append(np.asarray(mask))
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert METRICS["iou"].score(Item(form.format(*quads[0]), (form.format(*quads[1]),))) == pytest.approx(expected, abs=0.01)
    assert METRICS["iou"].score(Item("[0, 5, 5, 0, 10, 5, 5, 10]", ("[0, 0, 10, 10]",))) == 0.5
