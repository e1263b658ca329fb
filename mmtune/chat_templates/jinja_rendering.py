"""Jinja rendering of a chat template, with the spans that its `{% generation %}` tags mark.

`mmtune.chat_templates.rendering` finds the exact spans of the answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from transformers import PreTrainedTokenizerBase

from mmtune.utils.bounded_jinja import COMPILE_FAULTS, RENDER_FAULTS, BoundedEnvironment, TooMuchWork, failure, render_bounded
from mmtune.utils.transformers_private import (
    ESCAPE_START,
    control_tokens_of,
    plain_template_data,
    template_environment,
)

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

BOX_TOKENS = re.compile(
    r"<\|(box|object_ref|quad)_(start|end)\|>|</?(box|ref|quad|phrase|object)>|<loc_?\d+>|<patch_index_\d+>"
    r"|</delimiter_of_multi_objects/>"
)
"""Tokens that models write as a part of their answers: around a box and its label, and for positions. A text may spell them."""

Messages = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
"""Function schemas, `{"type": "function", "function": {"name", "description", "parameters"}}`."""
Span = tuple[int, int]


class ChatTemplateError(ValueError):
    """The chat template rejects the conversation, or the spans of its answers cannot be exact."""


class ControlTokenPatterns(NamedTuple):
    """Patterns of control tokens, which only a chat template may write.

    Attributes:
        anywhere: matches every control token.
        not_escaped: matches control tokens of the template, but not escaped ones (see `mmtune.data.encoding.token_spans`).
    """

    anywhere: re.Pattern[str]
    not_escaped: re.Pattern[str]


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int, template: str) -> ControlTokenPatterns:
    tokens = [token for token in control_tokens_of(tokenizer, template) if not BOX_TOKENS.fullmatch(token)]
    tokens.sort(key=len, reverse=True)
    alternatives = "|".join(map(re.escape, tokens)) or "(?!)"
    return ControlTokenPatterns(re.compile(alternatives), re.compile(f"(?<!{ESCAPE_START})(?:{alternatives})"))


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokenPatterns:
    """Patterns of the tokenizer's special tokens, and of its added tokens that occur in the template, without `BOX_TOKENS`."""
    return _control_tokens(tokenizer, len(tokenizer), template)


def has_generation_tags(template: str) -> bool:
    """Whether a chat template marks the assistant's answers with `{% generation %}` tags."""
    return GENERATION_TAG.search(template) is not None


def render_template(
    messages: Messages,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    add_generation_prompt: bool = False,
    tools: Tools = (),
    arguments_as_text: bool = False,
) -> tuple[str, list[Span]]:
    """Render messages, without any check of the text.

    Args:
        messages: typed messages.
        template: the chat template.
        tokenizer: the tokenizer, for the template's variables such as `bos_token`.
        add_generation_prompt: whether the text ends with the start of the model's answer.
        tools: function schemas, for the template's variable `tools`; none: it is none.
        arguments_as_text: whether the template reads the arguments of a tool call as JSON text instead of an object.

    Returns:
        The text, and the spans that `{% generation %}` tags mark.

    Raises:
        ChatTemplateError: the template rejects the conversation.
    """
    try:
        compiled = _compiled(template)
    except COMPILE_FAULTS as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja{failure(error)}") from error
    output = _Output()
    variables = {
        **plain_template_data(dict(tokenizer.special_tokens_map)),
        "messages": plain_template_data([_as_read_by_templates(message, arguments_as_text) for message in messages]),
        "tools": plain_template_data(list(tools)) or None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        _OUTPUT: output,
    }
    try:
        for piece in render_bounded(compiled, variables):
            output.pieces.append(piece)
            output.length += len(piece)
    except RENDER_FAULTS as error:
        if isinstance(error, TemplateError) and not isinstance(error, TooMuchWork):
            raise ChatTemplateError(f"the chat template rejects this conversation: {error}"[:400]) from error
        raise ChatTemplateError(f"the chat template fails on this conversation{failure(error)}") from error
    return "".join(output.pieces), output.spans


def _as_read_by_templates(message: dict[str, Any], arguments_as_text: bool) -> dict[str, Any]:
    """A message in the form that published templates read.

    The text of a tool result is a string, and so is the missing text of a tool call: many templates write a list of blocks there
    as it is, or fail on it. A result with media stays a list of blocks.
    """
    blocks = message["content"]
    is_short = message["role"] == "tool" or ("tool_calls" in message and not blocks)
    if is_short and isinstance(blocks, list) and all(block["type"] == "text" for block in blocks):
        message = {**message, "content": "".join(block["text"] for block in blocks)}
    if "reasoning_content" in message:
        message = {**message, "thinking": message["reasoning_content"]}  # transformers gives templates both names
    if arguments_as_text and "tool_calls" in message:
        calls = []
        for call in message["tool_calls"]:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append({**call, "function": {**call["function"], "arguments": arguments}})
        message = {**message, "tool_calls": calls}
    return message


_OUTPUT = "rendered output"
"""The context variable with the output so far. Not a valid Jinja name, so that it cannot collide with a template's variable."""


class _Output:
    """The text that a template has written, and the spans that it marked."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[Span] = []


class _Generation(Extension):
    """The `{% generation %}` tag, which marks an answer of the assistant."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @pass_context
    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        text = caller()
        output = context.parent[_OUTPUT]
        output.spans.append((output.length, output.length + len(text)))
        return text


@cache
def _environment() -> BoundedEnvironment:
    """The Jinja environment of transformers' chat templates, with its functions and filters, and with limits on the work."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    reference = template_environment()
    environment.filters.update(reference.filters)
    environment.globals.update(reference.globals)
    environment.bound()
    return environment


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)
