"""Chat template rendering, with the exact character spans of the assistant's answers.

Templates with `{% generation %}` tags mark the spans themselves. For other templates the conversation is rendered a second time
with every answer replaced by a placeholder character, and the two texts must differ only in the answers. No length is estimated
from a prefix, and spans that cannot be exact are an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from transformers import PreTrainedTokenizerBase

from mmtune.utils.bounded_jinja import COMPILE_FAULTS, RENDER_FAULTS, BoundedEnvironment, TooMuchWork, failure, render_bounded
from mmtune.utils.transformers_private import (
    ESCAPE_END,
    ESCAPE_START,
    control_tokens_of,
    plain_template_data,
    template_environment,
)

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDER_CODE_POINTS = range(0x100000, 0x10FFFE)
"""Private-use code points; those that a conversation does not contain are placeholders of its answers."""

NO_GENERATION_TAGS = "the chat template has no {% generation %} tags"
ANSWER_STRIPPED = "the chat template strips white space from the ends of an answer; remove it from the row"

Messages = list[dict[str, Any]]
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
    tokens = sorted(control_tokens_of(tokenizer, template), key=len, reverse=True)
    alternatives = "|".join(map(re.escape, tokens)) or "(?!)"
    return ControlTokenPatterns(re.compile(alternatives), re.compile(f"(?<!{ESCAPE_START})(?:{alternatives})"))


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokenPatterns:
    """Patterns of the tokenizer's special tokens, and of its added tokens that occur in the template."""
    return _control_tokens(tokenizer, len(tokenizer), template)


def has_generation_tags(template: str) -> bool:
    """Whether a chat template marks the assistant's answers with `{% generation %}` tags."""
    return GENERATION_TAG.search(template) is not None


def render_text(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a whole conversation, without the spans of its answers.

    Raises:
        ChatTemplateError: the template rejects the conversation.
    """
    return _render(messages, template, tokenizer)[0]


def render_prompt(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Render a prompt: the text up to the start of the model's answer.

    Raises:
        ChatTemplateError: the template rejects the conversation.
    """
    return _render(messages, template, tokenizer, add_generation_prompt=True)[0]


def render_conversation(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """Render a whole conversation, with the spans of its answers.

    Args:
        messages: typed messages.
        template: the chat template.
        tokenizer: the tokenizer, for the template's variables such as `bos_token` and for end-of-turn tokens.

    Returns:
        The text, and for each answer its first and past-the-last character. A span contains the answer, white space that the
        model generates before it (such as a space after a prompt that ends with a colon), and the end-of-turn token.

    Raises:
        ChatTemplateError: the spans cannot be exact, or the template rejects the conversation.
    """
    text, marked = _render(messages, template, tokenizer)
    if not has_generation_tags(template):
        return text, _unmarked_spans(text, messages, template, tokenizer)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    marked = _merge_adjacent(marked)
    if len(marked) != len(answers):
        detail = f"expected {len(answers)} supervised spans, one for each answer, got {len(marked)}: the chat template drops or "
        raise ChatTemplateError(detail + "joins answers")
    spans = [_exact_span(text, span, messages, number, template, tokenizer) for span, number in zip(marked, answers, strict=True)]
    ends = {text[mark[1] : span[1]] for mark, span in zip(marked, spans, strict=True)}
    if len(ends) > 1:
        raise ChatTemplateError(
            f"expected the same end-of-turn token after every answer, got {', '.join(map(repr, sorted(ends)))}"
        )
    return text, spans


def _render(
    messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    try:
        compiled = _compiled(template)
    except COMPILE_FAULTS as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja{failure(error)}") from error
    output = _Output()
    variables = {
        **plain_template_data(dict(tokenizer.special_tokens_map)),
        "messages": plain_template_data(messages),
        "tools": None,
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


def _merge_adjacent(spans: list[Span]) -> list[Span]:
    """Merge adjacent spans, because some templates mark every part of an answer."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1][1] == span[0]:
            span = merged.pop()[0], span[1]
        merged.append(span)
    return merged


def _answer_text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _exact_span(
    text: str, span: Span, messages: Messages, number: int, template: str, tokenizer: PreTrainedTokenizerBase
) -> Span:
    """The exact span of an answer and its end-of-turn token, from the span that the template marked.

    The end-of-turn token can also follow directly after the marked span. White space after the token is excluded.

    Raises:
        ChatTemplateError: the marked span has other text, or there is no end-of-turn token.
    """
    (start, stop), answer = span, _answer_text(messages[number])
    begin = text.find(answer, start, stop)
    end = begin + len(answer)
    if begin >= 0:
        start = _span_start(text, start, begin, messages[:number], template, tokenizer)
    control = control_tokens(tokenizer, template).not_escaped
    token = control.search(text, end, stop)
    if token is None and (following := control.search(text, stop)) is not None and not text[stop : following.start()].strip():
        token = following
    tail = (text[end : token.start()] + text[token.end() : stop]) if token else text[end:stop]
    if begin < 0 or text[start:begin].strip() or tail.strip():
        if answer != answer.strip() and answer.strip() in text[start:stop]:
            raise ChatTemplateError(ANSWER_STRIPPED)
        marked, expected = (part.replace(ESCAPE_START, "").replace(ESCAPE_END, "") for part in (text[span[0] : stop], answer))
        raise ChatTemplateError(f"expected the answer {expected!r} and one end-of-turn token to be supervised, got {marked!r}")
    if token is None and "\n" not in tail:
        raise ChatTemplateError(
            f"expected an end-of-turn token after an answer, got {tail!r}; the model would not learn to end its answer"
        )
    return start, token.end() if token else stop


def _span_start(text: str, start: int, begin: int, before: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The start of a marked span, moved to the end of the prompt if they differ.

    Text that the prompt already contains (such as an empty thinking block written by the template) is excluded. White space
    between the prompt and the marked span is included, because the model generates it.

    Args:
        text: the rendered conversation.
        start: start of the marked span.
        begin: start of the answer.
        before: the messages before the answer.
        template: the chat template.
        tokenizer: the tokenizer.
    """
    if start == begin and not text[:start][-1:].isspace():
        return start
    prompt = render_prompt(before, template, tokenizer)
    if text.startswith(prompt) and len(prompt) <= begin:
        return start if text[len(prompt) : start].strip() else len(prompt)
    if prompt.rstrip() == text[:begin].rstrip():
        return begin  # only white space differs: LLaVA-OneVision's template writes one more space in the prompt
    return start


def _unmarked_spans(text: str, messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of a template without `{% generation %}` tags."""
    control = control_tokens(tokenizer, template).not_escaped
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return []
    answer_spans = _find_answers(text, messages, template, tokenizer)
    up_to_last = text if answers[-1] == len(messages) - 1 else _render(messages[: answers[-1] + 1], template, tokenizer)[0]
    _, last = answer_spans[-1]
    token = control.search(up_to_last, last)
    if not up_to_last.startswith(text[:last]) or token is None or up_to_last[last : token.start()].strip():
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and writes no end-of-turn token after the last answer")
    turn_end = up_to_last[last : token.end()]
    spans = []
    for number, (begin, end) in zip(answers, answer_spans, strict=True):
        prompt = render_prompt(messages[:number], template, tokenizer)
        if not text.startswith(prompt) or len(prompt) > begin or text[len(prompt) : begin].strip():
            raise ChatTemplateError(
                f"{NO_GENERATION_TAGS}, and its text before an answer differs from the prompt: expected {prompt[-40:]!r}, "
                f"got {text[max(0, begin - 40) : begin]!r}"
            )
        if not text.startswith(turn_end, end):
            raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and ends only the last turn, but not all turns, with {turn_end!r}")
        spans.append((len(prompt), end + len(turn_end)))
    return spans


def _find_answers(text: str, messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The span of each answer, from rendering the conversation with a placeholder for every text block of an answer."""
    used = set().union(*(_answer_text(message) for message in messages))
    free = (chr(code) for code in PLACEHOLDER_CODE_POINTS if chr(code) not in used)
    text_of_placeholder: dict[str, str] = {}
    replaced: Messages = []
    placeholders: list[list[str]] = []
    for message in messages:
        if message["role"] == "assistant":
            placeholders.append([])
            content = []
            for block in message["content"]:
                if block["type"] != "text":
                    raise ChatTemplateError(f"expected only text in an assistant turn, got {block['type']}")
                placeholder = next(free)
                text_of_placeholder[placeholder] = block["text"]
                placeholders[-1].append(placeholder)
                content.append({**block, "text": placeholder})
            message = {**message, "content": content}
        replaced.append(message)
    frame, _ = _render(replaced, template, tokenizer)
    if [character for character in frame if character in text_of_placeholder] != list(text_of_placeholder):
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and drops or repeats an answer")
    spans: dict[str, Span] = {}
    rebuilt = ""
    for part in re.split(f"([{''.join(text_of_placeholder)}])", frame):
        if part in text_of_placeholder:
            spans[part] = (len(rebuilt), len(rebuilt) + len(text_of_placeholder[part]))
        rebuilt += text_of_placeholder.get(part, part)
    if rebuilt != text:
        if any(answer != answer.strip() for answer in text_of_placeholder.values()):
            raise ChatTemplateError(ANSWER_STRIPPED)
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and changes an answer, or writes other text that depends on its words")
    return [(spans[blocks[0]][0], spans[blocks[-1]][1]) for blocks in placeholders]
