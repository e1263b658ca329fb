"""Message weights: a weight of 0 removes a turn from the loss and changes nothing else."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from message_rows import assistant, samples, talk, user

from mmtune.data.batching.collate import pack
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_sample
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.message import RowError, Sample, is_supervised, split_question
from mmtune.data.sources.reader import SourceReader
from mmtune.recipe.recipe import Source


def _answers(sample: Sample, processor: Any, **settings: Any) -> list[str]:
    """The supervised tokens, decoded span by span."""
    encoded = encode_sample(sample, processor, **settings)
    pairs = zip(encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist(), strict=True)
    spans = [list(group) for on, group in groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX) if on]
    return [processor.tokenizer.decode([token for token, _ in span]) for span in spans]


@pytest.mark.parametrize(
    ("first", "last", "trains"),
    [
        ({}, {}, ["WRONG", "right"]),
        ({"weight": 0}, {"weight": 1}, ["right"]),
        ({"weight": 0.0}, {}, ["right"]),
        ({"loss": False}, {"loss": True}, ["right"]),
        ({"train": True}, {"train": False}, ["WRONG"]),
        ({"training": False, "weight": 0}, {"weight": None, "loss": None}, ["right"]),
    ],
)
def test_a_weight_of_0_removes_its_turn_from_the_loss_and_changes_nothing_else(
    untrained: tuple[Any, Any], media: Path, first: dict[str, Any], last: dict[str, Any], trains: list[str]
) -> None:
    processor = untrained[1]
    sample, plain = samples(media, talk(first, last), talk({}, {}))
    assert _answers(sample, processor) == [f"{answer}<|end|>" for answer in trains]
    whole, weighed = encode_sample(plain, processor), encode_sample(sample, processor)
    assert all(torch.equal(whole[key], weighed[key]) for key in whole if key != "labels")
    supervised = int((weighed["labels"] != IGNORE_INDEX).sum())
    assert (
        count_tokens(sample, processor).supervised
        == supervised
        == len(processor.tokenizer("".join(f"{a}<|end|>" for a in trains))["input_ids"])
    )
    assert torch.equal(pack([weighed, whole])["labels"], torch.cat([weighed["labels"], whole["labels"]], dim=1))


def test_a_weight_and_the_last_answer_alone(untrained: tuple[Any, Any], media: Path) -> None:
    sample, without = samples(media, talk({"weight": 0}, {}), talk({}, {"weight": 0}))
    assert _answers(sample, untrained[1], supervise="last") == ["right<|end|>"]
    with pytest.raises(
        RowError, match=r"rows\.json\[1\]: messages: the last answer .* has weight 0, so no token is supervised"
    ) as caught:
        encode_sample(without, untrained[1], supervise="last")
    assert caught.value.issue == "nothing_supervised"


@pytest.mark.parametrize(
    ("first", "last", "reason"),
    [
        ({"weight": 0.5}, {}, r"messages\[1\]\.weight: expected 0, 1, true or false, got 0\.5"),
        ({"weight": 2}, {}, "got 2"),
        ({"loss": "false"}, {}, r"messages\[1\]\.loss: expected 0, 1, true or false, got 'false'"),
        ({}, {"loss": float("nan")}, r"messages\[3\]\.loss: .* got nan"),
        ({"weight": [0]}, {}, r"got \[0\]"),
        ({"weight": 0, "loss": True}, {}, r"messages\[1\]: expected equal weights, got different ones in weight and loss"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            {},
            r"messages\[1\]\.train_detail: not supported",
        ),
        ({"loss_scale": 0.3}, {}, r"messages\[1\]\.loss_scale: expected 0, 1, true or false, got 0\.3"),
        ({"weight": 0}, {"weight": 0}, "messages: every answer has weight 0"),
    ],
)
def test_an_unsupported_weight_is_an_error(media: Path, first: dict[str, Any], last: dict[str, Any], reason: str) -> None:
    reader = SourceReader(Source(path=str(media / "rows.jsonl"), template="messages"))
    with pytest.raises(RowError, match=reason):
        reader.sample("r", talk(first, last))


def test_a_weight_on_a_question_is_an_error(media: Path) -> None:
    asks = [user("q", weight=1), assistant("a")]
    with pytest.raises(RowError, match=r"messages\[0\]\.weight: expected weight 0 for a turn of the user, got 1"):
        samples(media, {"messages": asks})
    for name, weight in (("loss_mask", [0, 1]), ("weight", 0), ("loss", False), ("loss_scale", 0.0), ("train", 1)):
        row = {"messages": [user("q"), assistant("a")], name: weight}
        with pytest.raises(
            RowError, match=rf"^rows\.json\[0\]: {name}: weights of whole rows .*; set weight: 0 or 1 for each turn"
        ):
            samples(media, row)
        assert samples(media, row, ignore=[name]) and samples(media, {**row, name: None})
    [sample] = samples(media, {"messages": [user("q", weight=0, loss=None), assistant("a")]})
    assert [is_supervised(message) for message in sample.messages] == [False, True]


@pytest.mark.parametrize(
    ("template", "question", "answer", "expected"),
    [
        ("query_response", "Indent it", "    return x\n", "    return x\n"),
        ("query_response", "q", " a", " a"),
        ("prompt_completion", "The sky is", " blue.", "blue."),
        ("prompt_completion", "Indent it", "    return x\n", "    return x\n"),
        ("prompt_completion", "def f():\n", " return x", " return x"),
        ("prompt_completion", "Indent it", "\treturn", "\treturn"),
    ],
)
def test_an_answer_keeps_its_white_space(media: Path, template: str, question: str, answer: str, expected: str) -> None:
    [sample] = samples(media, dict(zip(template.split("_"), (question, answer), strict=True)), template=template)
    assert [message["content"][0]["text"] for message in sample.messages] == [question, expected]


def test_an_answer_of_weight_0_is_not_a_reference(media: Path) -> None:
    included, excluded = samples(media, talk({"weight": 0}, {}), talk({}, {"weight": 0}))
    assert split_question(included)[1] == "right"
    with pytest.raises(RowError, match=r"^rows\.json\[1\]: messages: the last answer has weight 0"):
        split_question(excluded)


def test_answers_in_a_prompt_are_context(untrained: tuple[Any, Any], media: Path) -> None:
    """As TRL puts the loss on the completion; a turn's own weight goes before it."""
    prompt = [user("a"), assistant("b"), user("c"), assistant("d", weight=1), user("e")]
    row = {"prompt": prompt, "completion": [assistant("f"), user("g"), assistant("h")]}
    [sample] = samples(media, row, template="prompt_completion")
    assert _answers(sample, untrained[1]) == [f"{answer}<|end|>" for answer in "dfh"]
    rows = [{"query": "c", "response": "d", "history": [["a", "b"]]}]
    assert _answers(samples(media, *rows, template="query_response")[0], untrained[1]) == ["b<|end|>", "d<|end|>"]


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "q"}, "completion: expected a text or a list of turns"),
        (
            "prompt_completion",
            {"promt": "q", "completion": "a"},
            "prompt: expected a text or a list of turns; did you mean 'promt'",
        ),
        ("prompt_completion", {"prompt": 3, "completion": "a"}, "prompt: expected a text or a list of turns"),
        ("prompt_completion", {"prompt": [], "completion": "a"}, "prompt: expected a text or a list of turns"),
        ("prompt_completion", {"prompt": ["q"], "completion": "a"}, r"prompt\[0\]: expected an object with 'role' and 'content'"),
        ("prompt_completion", {"prompt": "q", "completion": [user("a")]}, "turns that alternate"),
        ("prompt_completion", {"prompt": "q", "completion": "  "}, r"messages\[1\]: the answer is empty"),
        (
            "query_response",
            {"query": "q", "response": "a", "history": [["q"]]},
            r"history\[0\]: expected a question and an answer",
        ),
        ("query_response", {"query": "q", "response": "a", "history": "q"}, r"history\[0\]: expected a question and an answer"),
        ("query_response", {"query": "q", "response": "a", "system": 3}, "system: expected text"),
    ],
)
def test_missing_questions_and_answers_are_errors(media: Path, template: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        samples(media, row, template=template)
