"""Samples with tool calls from the row to tokens, counts, over-length policies, the view of a sample and evaluation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects.tool_dialects import SAID_OR_TEXT
from PIL import Image

from mmtune.chat_templates.resolving import set_chat_template
from mmtune.data.encoding.encode import IGNORE_INDEX, OverLength, encode_sample
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.message import RowError, Sample
from mmtune.data.sources.reader import SourceReader
from mmtune.data.validation.show_sample import view_sample
from mmtune.data.validation.validate import ValidationSettings, Validator
from mmtune.evaluation.evaluate import evaluate
from mmtune.recipe.recipe import DataSection, EvaluateSection, Source

TEMPLATE = SAID_OR_TEXT.replace("IMAGE", "'<image>'") + (
    "{%- if tools -%}{{- '<|system|>Call: ' ~ tools | tojson ~ '<|end|>' -}}{%- endif -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}{{- '<|assistant|>' -}}{%- generation -%}{{- said(m) -}}"
    "{%- for c in m.tool_calls -%}{{- c.function | tojson -}}{%- endfor -%}{{- '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|user|>' ~ ('result: ' if m.role == 'tool' else '') ~ said(m) ~ '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
PARAMETERS = {"type": "object", "properties": {"box": {"type": "array"}}}
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": PARAMETERS}}]
CALL = {"id": "c", "type": "function", "function": {"name": "zoom", "arguments": '{"box": [1, 2, 30, 40]}'}}


def _row(answer: str | None = "red") -> dict[str, Any]:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "image"}, {"type": "text", "text": "enlarged"}]},
        {"role": "assistant", "content": answer},
    ]
    images = ["a.png", "b.png"]
    return {"messages": messages if answer else messages[:2], "images": images if answer else images[:1], "tools": TOOLS}


def _source(media: Path, *rows: dict[str, Any]) -> Source:
    (media / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Source(path=str(media / "rows.jsonl"), template="messages")


def _sample(media: Path, row: dict[str, Any]) -> Sample:
    reader = SourceReader(_source(media, row))
    return reader.sample(*reader.open()[0])


@pytest.fixture(scope="module")
def calling(answering_llava: tuple[Any, Any]) -> tuple[Any, Any]:
    model, processor = answering_llava
    processor = copy.deepcopy(processor)
    set_chat_template(processor, TEMPLATE)
    return model, processor


def test_labels_are_the_call_and_the_answer(media: Path, calling: tuple[Any, Any]) -> None:
    sample, processor = _sample(media, _row()), calling[1]
    encoded = encode_sample(sample, processor)
    supervised = encoded["input_ids"][encoded["labels"] != IGNORE_INDEX]
    assert processor.tokenizer.decode(supervised) == '{"name": "zoom", "arguments": {"box": [1, 2, 30, 40]}}<|end|>red<|end|>'
    assert encoded["pixel_values"].shape[0] == 2
    counts = count_tokens(sample, processor)
    assert (counts.tokens, counts.supervised, counts.images) == (encoded["input_ids"].shape[1], len(supervised), 2)
    text_only = encode_sample(sample, processor, supervise="without_tool_calls")
    assert processor.tokenizer.decode(text_only["input_ids"][text_only["labels"] != IGNORE_INDEX]) == "red<|end|>"
    assert count_tokens(sample, processor, "without_tool_calls").tokens == counts.tokens


def test_a_template_without_tools_is_an_error_of_the_row(media: Path, untrained: tuple[Any, Any]) -> None:
    with pytest.raises(RowError, match=r"rows\.jsonl:1: messages: the chat template does not write tools and tool calls"):
        encode_sample(_sample(media, _row()), untrained[1])
    issues = list(Validator([_source(media, _row())], settings=ValidationSettings(untrained[1])).issues(processes=1))
    assert [(issue.row, issue.issue) for issue in issues] == [("rows.jsonl:1", "chat_template")]


def test_a_long_sample_loses_images_but_no_call_and_no_result(media: Path, calling: tuple[Any, Any]) -> None:
    sample, processor = _sample(media, _row()), calling[1]
    whole = count_tokens(sample, processor).tokens
    fitted = fit_to_budget(sample, processor, whole - 20, "drop_media")
    assert fitted.dropped == 2 and fitted.sample.images == [] and fitted.sample.tools == sample.tools
    assert [message["role"] for message in fitted.sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert fitted.sample.messages[1]["tool_calls"] == sample.messages[1]["tool_calls"]
    assert fitted.sample.messages[2]["content"] == [{"type": "text", "text": "enlarged"}]
    with pytest.raises(OverLength):
        fit_to_budget(sample, processor, whole - 60, "drop_media")


def test_the_view_of_a_sample(media: Path, calling: tuple[Any, Any]) -> None:
    source = _source(media, _row())
    view = view_sample(_sample(media, _row()), calling[1], DataSection(train=(source,)))
    supervised = "".join(token.text for token in view.tokens if token.kind == "supervised")
    assert supervised == '{"name": "zoom", "arguments": {"box": [1, 2, 30, 40]}}<|end|>red<|end|>'
    assert view.prompt.startswith("<|system|>Call: [{") and view.prompt.endswith("result: <image>enlarged<|end|><|assistant|>")


def test_an_evaluation_asks_with_schemas_calls_and_results(media: Path, calling: tuple[Any, Any]) -> None:
    model, processor = calling
    section = EvaluateSection(data=(_source(media, _row()),), max_new_tokens=6)
    [answer] = evaluate(model, processor, section)
    messages = _row()["messages"][:3]
    messages[0]["content"] = [{"type": "image", "image": Image.open(media / "a.png")}, {"type": "text", "text": "What is it?"}]
    messages[1] |= {"content": "", "tool_calls": [{**CALL, "function": {"name": "zoom", "arguments": {"box": [1, 2, 30, 40]}}}]}
    messages[2]["content"][0] = {"type": "image", "image": Image.open(media / "b.png")}
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, tools=TOOLS, **settings)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.prediction == expected.strip() and (answer.question, answer.references) == ("What is it?", ("red",))


def test_a_held_out_row_that_ends_with_a_call_is_rejected_before_answers(media: Path, calling: tuple[Any, Any]) -> None:
    section = EvaluateSection(data=(_source(media, _row(None)),))
    with pytest.raises(RowError, match=r"rows\.jsonl:1: messages: the last answer is a tool call"):
        evaluate(*calling, section)
    issues = list(Validator([], [_source(media, _row(None))]).issues(processes=1))
    assert [issue.issue for issue in issues] == ["reference_tool_call"]
