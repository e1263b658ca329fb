"""Tool calls, tool results and function schemas of rows, in the forms of OpenAI, LLaMA-Factory and ms-swift."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmtune.data.message import Message, RowError
from mmtune.data.sources.rows import parse_json

CALL_KEYS = ("tool_calls", "function_call")
"""An assistant turn's keys with its tool calls: a list, or one call in OpenAI's first form."""

TOOL_TURN_KEYS = (*CALL_KEYS, "tool_call_id", "reasoning_content")
"""All keys of a turn that are read for tool calls, results and reasoning."""

_ABSENT: tuple[Any, ...] = (None, "", [], {})
_FUNCTION_KEYS = {"name", "arguments"}
_CALL_KEYS = {"id", "type", "index", "function"}
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_CALL_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def has_calls(keys: Mapping[str, Any]) -> bool:
    """Whether a turn's keys have tool calls."""
    return any(keys.get(name) not in _ABSENT for name in CALL_KEYS)


def read_turn_keys(row_id: str, where: str, role: str, keys: Mapping[str, Any]) -> Message:
    """The parts of a message that come from a turn's keys: `tool_calls` and `reasoning_content`, or `tool_call_id` and `name`.

    Args:
        row_id: the row's id.
        where: the part of the row with the turn.
        role: role of the message.
        keys: all keys of the turn.

    Raises:
        RowError: a call that is not valid, or a key in a turn of another role.
    """
    parts: Message = {}
    calls = [call for name in CALL_KEYS for call in _read_calls(row_id, f"{where}.{name}", keys.get(name))]
    if calls:
        parts["tool_calls"] = calls
    reasoning = _optional_text(row_id, where, keys, "reasoning_content")
    if reasoning:
        parts["reasoning_content"] = reasoning
    expected = {"tool_call_id": "tool"}
    for name in TOOL_TURN_KEYS:
        if role != (owner := expected.get(name, "assistant")) and keys.get(name) not in _ABSENT:
            detail = f"expected it in a turn of the {owner}, got a turn of the {role}; move or remove it"
            raise RowError(row_id, f"{where}.{name}", detail, "tool_malformed")
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if text := _optional_text(row_id, where, keys, name):
                parts[name] = text
    return parts


def read_call_text(row_id: str, where: str, content: Any) -> tuple[str, list[dict[str, Any]]]:
    """The text and the calls of a turn whose content is tool calls, as `function_call` and `tool_call` turns have.

    The content is one call or a list of calls, as JSON text or as an object. Before the call there can be a thought in
    `<think>` tags; calls in `<tool_call>` tags can follow any text.

    Raises:
        RowError: the content has no call, or one that is not valid.
    """
    if not isinstance(content, str):
        return "", _read_calls(row_id, where, content, required=True)
    thought = _THOUGHT.match(content)
    text, rest = (content[: thought.end()], content[thought.end() :]) if thought else ("", content)
    start = rest.find("<tool_call>")
    if start < 0 or rest.lstrip()[:1] in ("{", "["):
        return text.strip(), _read_calls(row_id, where, _parse(row_id, where, rest), required=True)
    blocks = rest[start:]
    if outside := _CALL_BLOCK.sub("", blocks).strip():
        detail = f"expected only <tool_call> blocks after the first one, got {outside[:80]!r}"
        raise RowError(row_id, where, detail, "tool_malformed")
    calls = [_parse(row_id, where, block) for block in _CALL_BLOCK.findall(blocks)]
    return (text + rest[:start]).strip(), [call for value in calls for call in _read_calls(row_id, where, value, required=True)]


def read_tools(row_id: str, field: str, value: Any) -> tuple[dict[str, Any], ...]:
    """A row's function schemas: a list, or JSON text of one. A schema is an object or JSON text, with or without `type`.

    Raises:
        RowError: a schema without a name, or a name that occurs twice.
    """
    value = _parse(row_id, field, value) if isinstance(value, str) and value.strip() else value
    if value in _ABSENT:
        return ()
    tools = []
    names = set()
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        where = f"{field}[{number}]"
        item = _parse(row_id, where, item) if isinstance(item, str) else item
        if isinstance(item, dict) and "function" not in item:
            item = {"type": "function", "function": {name: part for name, part in item.items() if name != "type"}}
        function = item.get("function") if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or item.get("type", "function") != "function":
            detail = f"expected a function schema with a `name`, got {item!r}"[:200]
            raise RowError(row_id, where, detail, "tool_malformed")
        if name in names:
            raise RowError(row_id, where, f"two functions are named {name[:80]!r}; remove one", "tool_malformed")
        names.add(name)
        tools.append(item)
    return tuple(tools)


def check_result_ids(row_id: str, messages: list[Message]) -> None:
    """Check that a tool result with `tool_call_id` belongs to a call of the turn before it, and is the only one of that call.

    Raises:
        RowError: another id.
    """
    open_ids: list[str] = []
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            open_ids = [call["id"] for call in message.get("tool_calls", ()) if "id" in call]
        elif "tool_call_id" in message:
            call_id = message["tool_call_id"]
            if call_id not in open_ids:
                detail = f"expected the id of a call before it that has no result yet ({', '.join(open_ids) or 'none'}), "
                raise RowError(row_id, f"messages[{number}].tool_call_id", f"{detail}got {call_id!r}"[:300], "tool_malformed")
            open_ids.remove(call_id)


def _read_calls(row_id: str, where: str, value: Any, required: bool = False) -> list[dict[str, Any]]:
    if not required and value in _ABSENT:
        return []
    if not isinstance(value, (dict, list)) or not value:
        detail = f"expected a tool call, {{name, arguments}}, or a list of calls, got {value!r}"[:200]
        raise RowError(row_id, where, detail, "tool_malformed")
    calls = value if isinstance(value, list) else [value]
    return [_read_call(row_id, f"{where}[{number}]" if value is calls else where, call) for number, call in enumerate(calls)]


def _read_call(row_id: str, where: str, call: Any) -> dict[str, Any]:
    """One call, with or without its `function` object, with its arguments as an object."""
    if not isinstance(call, dict):
        raise RowError(row_id, where, f"expected a tool call, {{name, arguments}}, got {call!r}"[:200], "tool_malformed")
    is_nested = call.get("function") is not None
    function = call["function"] if is_nested else call
    if not isinstance(function, dict):
        raise RowError(row_id, f"{where}.function", f"expected an object, got {function!r}"[:200], "tool_malformed")
    expected = [(call, _CALL_KEYS), (function, _FUNCTION_KEYS)] if is_nested else [(call, _CALL_KEYS | _FUNCTION_KEYS)]
    for keys, known in expected:
        for key in keys:
            if key not in known and keys[key] is not None:
                detail = f"unknown key {key[:80]!r} of a tool call; expected name and arguments"
                raise RowError(row_id, where, detail, "tool_malformed")
    if call.get("type") not in (None, "function"):
        raise RowError(row_id, f"{where}.type", f"expected function, got {call['type']!r}"[:200], "tool_malformed")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(row_id, f"{where}.name", f"expected the name of a function, got {name!r}"[:200], "tool_malformed")
    parts = {"type": "function", "function": {"name": name, "arguments": _read_arguments(row_id, where, function)}}
    call_id = _optional_text(row_id, where, call, "id")
    return {"id": call_id, **parts} if call_id else parts


def _read_arguments(row_id: str, where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    where = f"{where}.arguments"
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse(row_id, where, arguments) if arguments.strip() else {}
    if arguments is None:
        return {}
    if isinstance(arguments, str):
        detail = f"expected an object, got text that is JSON twice: {arguments!r}; parse it once"[:200]
        raise RowError(row_id, where, detail, "tool_malformed")
    if not isinstance(arguments, dict):
        raise RowError(row_id, where, f"expected an object, got {arguments!r}"[:200], "tool_malformed")
    return arguments


def _optional_text(row_id: str, where: str, keys: Mapping[str, Any], name: str) -> str:
    value = keys.get(name)
    if value is not None and not isinstance(value, str):
        raise RowError(row_id, f"{where}.{name}", f"expected text, got {type(value).__name__}", "field_type")
    return value or ""


def _parse(row_id: str, where: str, text: str) -> Any:
    try:
        return parse_json(row_id, where, text.encode("utf-8", "surrogatepass"))
    except RowError as error:
        detail = f"{error.detail.replace(' of the row', ' of the text')}, in {text[:60]!r}"
        raise RowError(row_id, where, detail, "tool_malformed") from error
