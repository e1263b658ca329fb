"""Tool calls in rendered conversations: which form of arguments a chat template reads, and whether it writes what it is given.

Chat templates do not agree on tool calls: most read the arguments of a call as an object, some as JSON text, and those without a
place for calls, results or schemas drop them without an error. A probe decides the form once for each template, and every
conversation is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mmtune.chat_templates.jinja_rendering import ChatTemplateError, Messages, Tools, render_template
from mmtune.utils.transformers_private import ESCAPE_START

ADVICE = "set model.chat_template to a .jinja file that does"

_WORD = re.compile(r"\w+")


def _text(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


_PROBE_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "declared_probe",
            "description": "probed description",
            "parameters": {"type": "object", "properties": {"declared_argument": {"type": "string"}}, "required": []},
        },
    }
]
_PROBE_CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "probe", "arguments": {"probe_key": "probe value"}}}
_PROBE: Messages = [
    {"role": "user", "content": _text("question")},
    {"role": "assistant", "content": _text("calling"), "tool_calls": [_PROBE_CALL]},
    {"role": "tool", "content": _text("probed result"), "name": "probe", "tool_call_id": "a1B2c3D4e"},
    {"role": "assistant", "content": _text("answer")},
]


class ToolSupport(NamedTuple):
    """What a chat template does with tool calls.

    Attributes:
        arguments_as_text: whether it reads the arguments of a call as JSON text instead of an object.
        missing: what it does not write: `tools`, `tool calls`, `tool results`.
    """

    arguments_as_text: bool
    missing: tuple[str, ...]


@lru_cache(maxsize=32)
def _tool_support(template: str, tokenizer: PreTrainedTokenizerBase) -> ToolSupport:
    words = {
        "tools": ("declared_probe", "declared_argument"),
        "tool calls": ("probe_key", "probe value"),
        "tool results": ("probed result",),
    }
    for messages, expected in ((_PROBE, [*words]), (_PROBE[:2], [*words][:2])):
        for arguments_as_text in (False, True):
            try:
                text, _ = render_template(messages, template, tokenizer, False, _PROBE_TOOLS, arguments_as_text)
            except ChatTemplateError:  # rendering the conversation itself gives the reason
                continue
            if "{'probe_key'" not in text:  # otherwise an object is written as Python prints it, and not as JSON
                missing = [what for what in expected if not all(word in text for word in words[what])]
                return ToolSupport(arguments_as_text, tuple(missing))
    return ToolSupport(False, ())


def render_with_tools(
    messages: Messages,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    tools: Tools,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages, with the arguments of their tool calls in the form that the template reads.

    Returns:
        As `render_template`.

    Raises:
        ChatTemplateError: the template rejects the conversation, or never writes tool calls, results or schemas that it has.
    """
    has_calls = any("tool_calls" in message for message in messages)
    has_results = any(message["role"] == "tool" for message in messages)
    if not (tools or has_calls or has_results):
        return render_template(messages, template, tokenizer, add_generation_prompt)
    support = _tool_support(template, tokenizer)
    needed = {"tools": bool(tools), "tool calls": has_calls, "tool results": has_results}
    if missing := [what for what in support.missing if needed[what]]:
        raise ChatTemplateError(f"the chat template does not write {' and '.join(missing)}; {ADVICE}")
    text, spans = render_template(messages, template, tokenizer, add_generation_prompt, tools, support.arguments_as_text)
    if json.dumps(ESCAPE_START)[1:-1] in text:
        raise ChatTemplateError("the chat template writes JSON in ASCII, so a control token in a tool call or schema is not text")
    return text, spans


def check_tools_written(text: str, tools: Tools) -> None:
    """Check that the text before the first answer has the names of all functions and of their parameters.

    Raises:
        ChatTemplateError: a name is missing.
    """
    for tool in tools:
        function = tool["function"]
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        for name in (function["name"], *(properties if isinstance(properties, dict) else ())):
            if not has_words(text, name):
                raise ChatTemplateError(f"the chat template does not write {name!r} of `tools` before the first answer; {ADVICE}")


def check_calls_written(turn: str, calls: Sequence[dict[str, Any]]) -> None:
    """Check that the text of a turn has the name and the arguments of all its tool calls.

    The words of names, keys and values must occur: templates quote and order them differently.

    Raises:
        ChatTemplateError: a part of a call is missing.
    """
    for call in calls:
        function = call["function"]
        for leaf in (function["name"], *leaves(function["arguments"])):
            if not has_words(turn, leaf):
                raise ChatTemplateError(
                    f"the chat template does not write {leaf!r} of the tool call {function['name']!r}; {ADVICE}"[:400]
                )


def check_results_written(text: str, messages: Messages) -> None:
    """Check that a conversation has the text of all tool results.

    Raises:
        ChatTemplateError: a result is missing.
    """
    for message in messages:
        for block in message["content"] if message["role"] == "tool" else ():
            if block["type"] == "text" and not has_words(text, block["text"]):
                raise ChatTemplateError(
                    f"the chat template does not write the tool result {block['text']!r}"[:200] + f"; {ADVICE}"
                )


def check_reasoning_written(turn: str, reasoning: str) -> int:
    """Check that the text of a turn has the reasoning; returns the end of the reasoning in it.

    Raises:
        ChatTemplateError: the reasoning is missing.
    """
    end = _end_of_words(turn, reasoning)
    if end is None:
        raise ChatTemplateError(
            f"the chat template does not write the reasoning {reasoning[:100]!r}: it has no place for it, or none in earlier "
            "turns; remove `reasoning_content` from the turn, or set another model.chat_template"
        )
    return end


def leaves(value: Any) -> Iterator[str]:
    """The keys and scalar values of arguments as text, except null, true and false, which templates spell differently."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def has_words(text: str, expected: str) -> bool:
    """Whether a text has the words of another one in their order, whatever is between them, such as escapes."""
    if expected in text:
        return True
    return any(_end_of_words(text, spelling) is not None for spelling in (expected, json.dumps(expected)[1:-1]))


def _end_of_words(text: str, expected: str) -> int | None:
    """Where the words of `expected` end that occur in a text in their order; None if one is missing."""
    position = 0
    for word in _WORD.findall(expected):
        position = text.find(word, position)
        if position < 0:
            return None
        position += len(word)
    return position
