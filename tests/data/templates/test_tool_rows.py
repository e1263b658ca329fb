"""Rows with tool calls: the forms of OpenAI, LLaMA-Factory and ms-swift become the same messages, or an error of the row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from message_rows import assistant, contents, samples, user
from pyarrow import parquet

from mmtune.data.message import RowError, Sample, is_supervised, split_question
from mmtune.data.sources.reader import SourceReader
from mmtune.data.validation.validate import Validator
from mmtune.recipe.recipe import Source

SCHEMA = {
    "name": "zoom",
    "description": "Enlarge.",
    "parameters": {"type": "object", "properties": {"factor": {"type": "integer"}}},
}
TOOLS = [{"type": "function", "function": SCHEMA}]


def call(arguments: Any, name: str = "zoom", **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def called(*calls: Any, content: Any = None, **keys: Any) -> dict[str, Any]:
    return assistant(content, tool_calls=list(calls), **keys)


def result(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **keys}


def row(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [user("q"), *turns], **fields}


def calls_of(sample: Sample) -> list[list[tuple[str, Any]]]:
    """The name and the arguments of each call, by message with calls."""
    calls = [[each["function"] for each in message["tool_calls"]] for message in sample.messages if "tool_calls" in message]
    return [[(function["name"], function["arguments"]) for function in functions] for functions in calls]


# ---- the forms


def test_the_three_forms_are_the_same_sample(media: Path) -> None:
    openai = row(called(call('{"factor": 2}'), content="I look."), result("big"), assistant("a"), tools=TOOLS)
    swift = row(
        assistant("I look."),
        {"role": "tool_call", "content": '{"name": "zoom", "arguments": {"factor": 2}}'},
        {"role": "tool_response", "content": "big"},
        assistant("a"),
        tools=json.dumps([SCHEMA]),
    )
    turns = [("human", "q"), ("function_call", 'I look.<tool_call>{"name": "zoom", "arguments": {"factor": 2}}</tool_call>')]
    turns += [("observation", "big"), ("gpt", "a")]
    factory = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": json.dumps([SCHEMA])}
    first, second = samples(media, openai, swift)
    [third] = samples(media, factory, template="sharegpt")
    assert first.messages == second.messages == third.messages
    assert list(first.tools) == list(second.tools) == list(third.tools) == TOOLS
    assert [message["role"] for message in first.messages] == ["user", "assistant", "tool", "assistant"]
    assert first.messages[1]["tool_calls"] == [call({"factor": 2})] and contents(first) == [["q"], ["I look."], ["big"], ["a"]]


def test_the_example_of_the_documentation_is_a_row(media: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data_templates.md").read_text(encoding="utf-8")
    [example] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if "tool_calls" in block]
    for name in ("street.png", "sign.png"):
        (media / name).write_bytes((media / "a.png").read_bytes())
    [sample] = samples(media, example)
    assert calls_of(sample) == [[("zoom", {"bbox_2d": [310, 40, 380, 90]})]] and len(sample.images) == 2
    assert [tool["function"]["name"] for tool in sample.tools] == ["zoom"]


@pytest.mark.parametrize("arguments", [{}, "{}", "", " ", None, "null"])
def test_a_call_without_arguments(media: Path, arguments: Any) -> None:
    [sample] = samples(media, row(called(call(arguments))))
    assert calls_of(sample) == [[("zoom", {})]]


@pytest.mark.parametrize(
    ("value", "text", "calls"),
    [
        ('{"name": "zoom", "arguments": {"factor": 2}}', "", [("zoom", {"factor": 2})]),
        ('{"name": "zoom", "arguments": "{\\"factor\\": 2}"}', "", [("zoom", {"factor": 2})]),
        ('[{"name": "zoom", "arguments": {}}, {"name": "now", "arguments": {}}]', "", [("zoom", {}), ("now", {})]),
        ('<think>Closer.</think>\n{"name": "zoom", "arguments": {}}', "<think>Closer.</think>", [("zoom", {})]),
        (
            '<think>Closer.</think>I look.\n<tool_call>{"name": "zoom", "arguments": {}}</tool_call>',
            "<think>Closer.</think>I look.",
            [("zoom", {})],
        ),
        (
            '<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call>\n<tool_call>{"name": "now"}</tool_call>',
            "",
            [("zoom", {}), ("now", {})],
        ),
        ('{"name": "zoom", "arguments": {"label": "<tool_call>"}}', "", [("zoom", {"label": "<tool_call>"})]),
        ({"name": "zoom", "arguments": {"factor": 2}}, "", [("zoom", {"factor": 2})]),
    ],
)
def test_the_text_of_a_call_turn(media: Path, value: Any, text: str, calls: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    [sample] = samples(media, {"conversations": turns}, template="sharegpt")
    assert calls_of(sample) == [calls] and contents(sample)[1] == ([text] if text else [])


def test_consecutive_call_turns_are_parallel_calls_of_one_turn(media: Path) -> None:
    turns = [("human", "q"), ("function_call", '{"name": "zoom"}'), ("function_call", '{"name": "now"}')]
    turns += [("observation", "big"), ("observation", "12:00"), ("gpt", "a")]
    [sample] = samples(media, {"conversations": [{"from": r, "value": v} for r, v in turns]}, template="sharegpt")
    assert calls_of(sample) == [[("zoom", {}), ("now", {})]]
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool", "tool", "assistant"]


@pytest.mark.parametrize("content", [None, "", "\n\n", []])
def test_a_call_needs_no_text(media: Path, content: Any) -> None:
    turn = called(call({}), content=content)
    for each in (turn, {key: value for key, value in turn.items() if key != "content"}):
        [sample] = samples(media, row(each))
        assert sample.messages[1]["content"] == [] and calls_of(sample) == [[("zoom", {})]]


def test_the_first_form_of_openai(media: Path) -> None:
    [sample] = samples(media, row(assistant(None, function_call={"name": "zoom", "arguments": "{}"}, tool_calls=None)))
    assert calls_of(sample) == [[("zoom", {})]]


def test_null_keys_of_other_turns_are_no_calls(media: Path) -> None:
    empty = {"tool_calls": None, "tool_call_id": None, "function_call": None, "name": None, "reasoning_content": None}
    [sample] = samples(media, {"messages": [user("q", **empty), assistant("a", **empty)], "tools": None})
    assert sample.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "a"}]} and sample.tools == ()


@pytest.mark.parametrize(
    "tools",
    [TOOLS, [SCHEMA], json.dumps(TOOLS), json.dumps([SCHEMA]), [json.dumps(TOOLS[0])], SCHEMA, [{"type": "function", **SCHEMA}]],
)
def test_forms_of_schemas(media: Path, tools: Any) -> None:
    [sample] = samples(media, row(assistant("a"), tools=tools))
    assert list(sample.tools) == TOOLS


@pytest.mark.parametrize("tools", [None, "", "[]", [], {}])
def test_a_row_without_schemas(media: Path, tools: Any) -> None:
    [sample] = samples(media, row(assistant("a"), tools=tools))
    assert sample.tools == ()


def test_reasoning_is_kept(media: Path) -> None:
    [sample] = samples(media, row(called(call({}), reasoning_content="Closer."), result("big"), assistant("a")))
    assert sample.messages[1]["reasoning_content"] == "Closer."


def test_images_in_results(media: Path) -> None:
    blocks = [{"type": "text", "text": "enlarged "}, {"type": "image_url", "image_url": {"url": "b.png"}}]
    openai = {"images": ["a.png"], **row(called(call({})), result(blocks), assistant("a"))}
    openai["messages"][0] = user("<image>q")
    turns = [("human", "<image>q"), ("function_call", '{"name": "zoom"}'), ("observation", "enlarged <image>"), ("gpt", "a")]
    factory = {"images": ["a.png", "b.png"], "conversations": [{"from": role, "value": value} for role, value in turns]}
    [first], [second] = samples(media, openai), samples(media, factory, template="sharegpt")
    assert contents(first) == contents(second) == [["<a.png>", "q"], [], ["enlarged ", "<b.png>"], ["a"]]
    own = row(called(call({})), result("enlarged", images=["b.png"]), assistant("a"))
    assert contents(samples(media, own)[0])[2] == ["<b.png>", "enlarged"]


def test_files_in_arguments_and_schemas_are_not_media(media: Path) -> None:
    schema = {"name": "zoom", "parameters": {"properties": {"image_path": {"default": "a.png"}}}}
    [sample] = samples(media, row(called(call({"image_path": "a.png", "url": "https://x.org/b.jpg"})), tools=[schema]))
    assert sample.images == [] and calls_of(sample)[0][0][1]["image_path"] == "a.png"


# ---- weights


@pytest.mark.parametrize("weight", [{"loss": False}, {"weight": 0}, {"train": False}])
def test_a_weight_of_a_call_is_read(media: Path, weight: dict[str, Any]) -> None:
    swift = {"role": "tool_call", "content": '{"name": "zoom"}', **weight}
    for turn in (swift, called(call({}), **weight)):
        [sample] = samples(media, row(turn, result("big"), assistant("a")))
        assert [is_supervised(message) for message in sample.messages] == [False, False, False, True]


def test_a_text_and_its_call_have_one_weight(media: Path) -> None:
    turns = [assistant("I look.", loss=False), {"role": "tool_call", "content": '{"name": "zoom"}'}]
    with pytest.raises(RowError, match=r"messages\[2\]: expected the weight of the assistant's turn before it") as caught:
        samples(media, row(*turns))
    assert caught.value.issue == "turn_weight"


def test_a_result_is_never_supervised(media: Path) -> None:
    with pytest.raises(RowError, match=r"messages\[2\]\.weight: expected weight 0 for a turn of the tool"):
        samples(media, row(called(call({})), result("big", weight=1), assistant("a")))


# ---- errors


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([result("big"), assistant("a")], "its results, then the assistant, got user, tool, assistant"),
        ([called(call({})), user("p"), assistant("a")], "got user, tool_call, user, assistant"),
        ([called(call({})), result("big"), user("p"), assistant("a")], "got user, tool_call, tool, user, assistant"),
        ([assistant("a"), result("big"), assistant("a")], "got user, assistant, tool, assistant"),
        ([called(call({})), assistant("a")], "got user, tool_call, assistant"),
    ],
)
def test_turns_out_of_order(media: Path, turns: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(RowError, match=f"alternate between user and assistant, and after a tool call .*{reason}") as caught:
        samples(media, row(*turns))
    assert caught.value.issue == "role_order"


def test_a_result_is_no_last_turn(media: Path) -> None:
    with pytest.raises(RowError, match="expected an answer as the last turn, got a turn of the tool") as caught:
        samples(media, row(called(call({})), result("big")))
    assert caught.value.issue == "answer_missing"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        (called(call("{factor: 2}")), r"tool_calls\[0\]\.arguments: not valid JSON: .*in '\{factor: 2\}'"),
        (called(call('{"a": 1, "a": 2}')), "not valid JSON: duplicate key 'a' in one object"),
        (called(call('{"a": NaN}')), "NaN is not a JSON value"),
        (called(call('"{}"')), r"arguments: expected an object, got text that is JSON twice: '\{\}'; parse it once"),
        (called(call("[1]")), r"arguments: expected an object, got \[1\]"),
        (called(call(3)), "arguments: expected an object, got 3"),
        (called(call({}, name="")), r"tool_calls\[0\]\.name: expected the name of a function, got ''"),
        (called({"name": "zoom", "parameters": {}}), "unknown key 'parameters' of a tool call; expected name and arguments"),
        (called(call({}, type="code_interpreter")), "expected function, got 'code_interpreter'"),
        (called("zoom"), r"expected a tool call, \{name, arguments\}, got 'zoom'"),
        (assistant("a", tool_calls="zoom"), r"tool_calls: expected a tool call, .* got 'zoom'"),
        ({"role": "tool_call", "content": "zoom(2)"}, r"messages\[1\]\.content: not valid JSON: .*in 'zoom\(2\)'"),
        ({"role": "tool_call", "content": "[]"}, r"messages\[1\]\.content: expected a tool call, .* got \[\]"),
        ({"role": "tool_call", "content": '<tool_call>{"name": "zoom"}</tool_call> Done.'}, "got 'Done.'"),
        (user("p", tool_calls=[call({})]), r"messages\[1\]\.tool_calls: expected it in a turn of the assistant, got .* the user"),
        (assistant("a", tool_call_id="x"), "tool_call_id: expected it in a turn of the tool, got a turn of the assistant"),
    ],
)
def test_a_call_that_is_not_valid_is_named(media: Path, turn: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=rf"^rows\.json\[0\]: messages\[1\]\S*: .*|{reason}") as caught:
        samples(media, row(turn))
    assert re.search(reason, str(caught.value)) and caught.value.issue == "tool_malformed" and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("a calculator", "tools: not valid JSON: .*in 'a calculator'"),
        ([{"description": "no name"}], r"tools\[0\]: expected a function schema with a `name`, got"),
        ([*TOOLS, SCHEMA], r"tools\[1\]: two functions are named 'zoom'; remove one"),
        ([{"type": "web_search", "function": SCHEMA}], r"tools\[0\]: expected a function schema"),
        ([3], r"tools\[0\]: expected a function schema with a `name`, got 3"),
    ],
)
def test_schemas_that_are_not_valid(media: Path, tools: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        samples(media, row(assistant("a"), tools=tools))
    assert caught.value.issue == "tool_malformed"


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (["c"], r"messages\[2\]\.tool_call_id: expected the id of a call before it that has no result yet \(a, b\), got 'c'"),
        (["a", "a"], r"messages\[3\]\.tool_call_id: expected .* \(b\), got 'a'"),
        (["b", "a"], None),
    ],
)
def test_the_id_of_a_result_is_that_of_a_call(media: Path, ids: list[str], reason: str | None) -> None:
    turns = [called(call({}, id="a"), call({}, id="b")), *(result("r", tool_call_id=each) for each in ids), assistant("x")]
    if reason is None:
        assert [message.get("tool_call_id") for message in samples(media, row(*turns))[0].messages[2:4]] == ids
        return
    with pytest.raises(RowError, match=reason):
        samples(media, row(*turns))


def test_a_result_that_is_an_object_is_rejected(media: Path) -> None:
    with pytest.raises(RowError, match=r"messages\[2\]\.content: expected text, got dict"):
        samples(media, row(called(call({})), result({"size": 2}), assistant("a")))


def test_an_image_in_an_answer_with_a_call_is_rejected(media: Path) -> None:
    turn = called(call({}), content=[{"type": "image_url", "image_url": {"url": "a.png"}}])
    with pytest.raises(RowError, match=r"messages\[1\]: expected only text in an answer, got an image"):
        samples(media, row(turn))


def test_a_box_in_arguments_does_not_follow_an_augmentation(media: Path) -> None:
    turns = row(called(call({"bbox_2d": [1, 2, 30, 40]})), images=["a.png"])
    turns["messages"][0] = user("<image>q")
    assert samples(media, turns)
    with pytest.raises(RowError, match=r"messages\[1\]: the text has a box") as caught:
        samples(media, turns, augment={"flip": 1.0})
    assert caught.value.issue == "box_unmoved"


def test_roles_of_tools_need_a_conversation(tmp_path: Path) -> None:
    text = "description: d\nmessages: [{role: tool, text: x}, {role: assistant, text: y}]\nexample: {a: 1}\n"
    (tmp_path / "t.yaml").write_text(text, encoding="utf-8")
    from mmtune.data.templates.template import load_data_template
    from mmtune.utils.errors import UserError

    with pytest.raises(UserError, match="unknown role 'tool'; expected one of system, user, assistant"):
        load_data_template(str(tmp_path / "t.yaml"))


# ---- arrow, few-shot examples, evaluation, validation


def test_padding_of_arrow_is_not_an_argument(tmp_path: Path) -> None:
    """In a Parquet file every call has the arguments of all calls, and every schema the parameters of all schemas, as null."""
    schemas = [
        {"name": "zoom", "parameters": {"type": "object", "properties": {"factor": {"type": "integer"}}}},
        {"name": "find", "parameters": {"type": "object", "properties": {"words": {"type": "string", "enum": ["a"]}}}},
    ]
    rows = [
        row(called(call({"factor": 2})), result("big", tool_call_id=None), assistant("a", tool_calls=[]), tools=schemas),
        row(called(call({"words": "x"}, "find"), call({"factor": 3})), tools=schemas[1:]),
    ]
    table = pa.Table.from_pylist(rows)
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"factor": 2, "words": None}
    parquet.write_table(table, tmp_path / "rows.parquet")
    reader = SourceReader(Source(path=str(tmp_path / "rows.parquet"), template="messages"))
    opened = reader.open()
    first, second = (reader.sample(*opened[index]) for index in range(2))
    assert calls_of(first) == [[("zoom", {"factor": 2})]] and calls_of(second) == [
        [("find", {"words": "x"}), ("zoom", {"factor": 3})]
    ]
    assert [tool["function"] for tool in first.tools] == schemas and [tool["function"] for tool in second.tools] == schemas[1:]
    assert [reader.sample(*parse()) for parse in reader.stream()] == [first, second]


def test_null_arguments_of_json_rows_are_kept(media: Path) -> None:
    [sample] = samples(media, row(called(call('{"factor": null}'))))
    assert calls_of(sample) == [[("zoom", {"factor": None})]]


def test_few_shot_examples_have_the_same_schemas(media: Path) -> None:
    rows = [row(called(call({"factor": n})), result(f"{n}"), assistant("a"), tools=TOOLS) for n in range(3)]
    sample = samples(media, *rows, shots={"count": 1})[0]
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool", "assistant"] * 2
    others = [{**rows[0], "tools": [{**SCHEMA, "description": f"{number}"}]} for number in range(2)]
    with pytest.raises(RowError, match=r"shots: few-shot example rows\.json\[\d\]: expected the function schemas of this row"):
        samples(media, *others, shots={"count": 1})


def test_a_call_as_the_last_answer_cannot_be_scored(media: Path) -> None:
    call_last, text_last = samples(media, row(called(call({}))), row(called(call({})), result("big"), assistant("a")))
    with pytest.raises(RowError, match="the last answer is a tool call, and only text can be compared") as caught:
        split_question(call_last)
    assert caught.value.issue == "reference_tool_call"
    question, reference = split_question(text_last)
    assert reference == "a" and question == text_last.messages[:-1]


def test_validation_reports_calls_of_undeclared_functions_and_control_tokens(tmp_path: Path) -> None:
    rows = [
        row(called(call({}, "zom")), tools=TOOLS),
        row(called(call({"label": "<|im_end|>"})), tools=TOOLS),
        row(called(call({}, "zom"))),
        row(called(call("{"))),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    issues = list(Validator([Source(path=str(tmp_path / "rows.jsonl"), template="messages")]).issues(processes=1))
    reported = {(each.row, each.field, each.issue) for each in issues}
    assert reported == {
        ("rows.jsonl:1", "messages[1]", "tool_undeclared"),
        ("rows.jsonl:2", "messages[1]", "control_token"),
        ("rows.jsonl:4", "messages[1].tool_calls[0].arguments", "tool_malformed"),
    }
    assert "a call of 'zom', which the row's tools do not declare; did you mean 'zoom'?" in [each.detail for each in issues]
