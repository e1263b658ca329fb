"""A conversation as the chat template writes it, and where in that text the assistant's answers stand.

Templates with `{% generation %}` marks say so themselves. For the others the conversation is rendered a second time with every
answer exchanged for a character that occurs nowhere else, and the two texts may differ in nothing but the answers. Both ways
end in character spans; nothing is guessed from the length of a prefix, and what cannot be exact is refused.
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
"""Code points that no standard gives a meaning; those that a conversation does not use stand in for its answers."""

NO_GENERATION_TAGS = "the chat template has no {% generation %} marks"
ANSWER_STRIPPED = "the chat template takes white space off the ends of an answer; take it out of the row"

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class ChatTemplateError(ValueError):
    """What the template wrote cannot be told apart into answers and the rest; the message says why."""


class ControlTokenPatterns(NamedTuple):
    """Patterns of the tokens that only a chat template may write.

    Attributes:
        spelled: matches one anywhere.
        written: matches one that the template wrote, and not the marked one of a text (see `mmtune.data.encoding.token_spans`).
    """

    spelled: re.Pattern[str]
    written: re.Pattern[str]


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int, template: str) -> ControlTokenPatterns:
    tokens = sorted(control_tokens_of(tokenizer, template), key=len, reverse=True)
    anyone = "|".join(map(re.escape, tokens)) or "(?!)"
    return ControlTokenPatterns(re.compile(anyone), re.compile(f"(?<!{ESCAPE_START})(?:{anyone})"))


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> ControlTokenPatterns:
    """The tokenizer's special tokens, and those of its added tokens that stand in the template."""
    return _control_tokens(tokenizer, len(tokenizer), template)


def has_generation_tags(template: str) -> bool:
    """Whether a chat template marks what the assistant says."""
    return GENERATION_TAG.search(template) is not None


def render_text(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A whole conversation as text, whatever its answers can be told by.

    Raises:
        ChatTemplateError: when the template refuses the conversation.
    """
    return _render(messages, template, tokenizer)[0]


def render_prompt(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text up to where the model's answer begins.

    Raises:
        ChatTemplateError: when the template refuses the conversation.
    """
    return _render(messages, template, tokenizer, add_generation_prompt=True)[0]


def render_conversation(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """A whole conversation as text, and what of it is learnt.

    Args:
        messages: typed messages.
        template: a chat template.
        tokenizer: its special tokens are what the template calls `bos_token` and so on, and what can end a turn.

    Returns:
        The text, and for each answer its first and past-the-last character. A span holds the answer, white space that the model
        writes before it (a space where the prompt ends at a colon), and the token that ends the turn.

    Raises:
        ChatTemplateError: when the spans cannot be exact, or the template refuses the conversation.
    """
    text, marked = _render(messages, template, tokenizer)
    if not has_generation_tags(template):
        return text, _unmarked_spans(text, messages, template, tokenizer)
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    marked = _joined(marked)
    if len(marked) != len(spoken):
        detail = f"{len(marked)} supervised spans for {len(spoken)} answers: the chat template dropped or joined one"
        raise ChatTemplateError(detail)
    spans = [_checked(text, span, messages, number, template, tokenizer) for span, number in zip(marked, spoken, strict=True)]
    ends = {text[mark[1] : span[1]] for mark, span in zip(marked, spans, strict=True)}
    if len(ends) > 1:
        raise ChatTemplateError(
            f"the chat template writes different tokens behind its answers: {', '.join(map(repr, sorted(ends)))}"
        )
    return text, spans


def _render(
    messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    try:
        compiled = _compiled(template)
    except COMPILE_FAULTS as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja{failure(error)}") from error
    written = _Written()
    given = {
        **plain_template_data(dict(tokenizer.special_tokens_map)),
        "messages": plain_template_data(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        _WRITTEN: written,
    }
    try:
        for piece in render_bounded(compiled, given):
            written.pieces.append(piece)
            written.length += len(piece)
    except RENDER_FAULTS as error:
        if isinstance(error, TemplateError) and not isinstance(error, TooMuchWork):
            raise ChatTemplateError(f"the chat template refuses this conversation: {error}"[:400]) from error
        raise ChatTemplateError(f"the chat template fails on this conversation{failure(error)}") from error
    return "".join(written.pieces), written.spans


_WRITTEN = "text of mmtune"
"""The name under which a rendering finds what was written so far; no name that Jinja could write."""


class _Written:
    """What a template has written, and the spans that it marked."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.spans: list[Span] = []


class _Generation(Extension):
    """`{% generation %}`: what stands in it is the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @pass_context
    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        text = caller()
        written = context.parent[_WRITTEN]
        written.spans.append((written.length, written.length + len(text)))
        return text


@cache
def _environment() -> BoundedEnvironment:
    """Jinja as transformers sets it up for chat templates, with the functions and filters that it adds, and with bounds."""
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    theirs = template_environment()
    environment.filters.update(theirs.filters)
    environment.globals.update(theirs.globals)
    environment.bound()
    return environment


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _joined(spans: list[Span]) -> list[Span]:
    """Spans with those that touch made one: some templates mark every piece of an answer."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1][1] == span[0]:
            span = joined.pop()[0], span[1]
        joined.append(span)
    return joined


def _spoken(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _checked(text: str, span: Span, messages: Messages, number: int, template: str, tokenizer: PreTrainedTokenizerBase) -> Span:
    """A marked span, which must hold the answer and its end of turn.

    The token that the template writes right behind the mark ends the answer; white space after that token is left out.
    """
    (start, stop), answer = span, _spoken(messages[number])
    begin = text.find(answer, start, stop)
    end = begin + len(answer)
    if begin >= 0:
        start = _start(text, start, begin, messages[:number], template, tokenizer)
    written = control_tokens(tokenizer, template).written
    token = written.search(text, end, stop)
    if token is None and (behind := written.search(text, stop)) is not None and not text[stop : behind.start()].strip():
        token = behind
    tail = (text[end : token.start()] + text[token.end() : stop]) if token else text[end:stop]
    if begin < 0 or text[start:begin].strip() or tail.strip():
        if answer != answer.strip() and answer.strip() in text[start:stop]:
            raise ChatTemplateError(ANSWER_STRIPPED)
        supervised, spoken = (part.replace(ESCAPE_START, "").replace(ESCAPE_END, "") for part in (text[span[0] : stop], answer))
        detail = "right is the answer as it stands in the row and one token that ends it"
        raise ChatTemplateError(f"the chat template supervises {supervised!r} for the answer {spoken!r}; {detail}")
    if token is None and "\n" not in tail:
        raise ChatTemplateError(
            f"the chat template writes {tail!r} after an answer and no token that ends it, so the end would not be learnt"
        )
    return start, token.end() if token else stop


def _start(text: str, start: int, begin: int, before: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a marked span begins: where the prompt ends, if the two differ.

    What the prompt already holds is left out (an empty thought that the template writes for the model), and white space between
    the prompt and the mark is taken in, because the model has to write it.

    Args:
        start: of the mark.
        begin: of the answer.
        before: the messages before the answer.
    """
    if start == begin and not text[:start][-1:].isspace():
        return start
    prompt = render_prompt(before, template, tokenizer)
    if text.startswith(prompt) and len(prompt) <= begin:
        return start if text[len(prompt) : start].strip() else len(prompt)
    if prompt.rstrip() == text[:begin].rstrip():
        return begin  # it ends in other white space than the prompt: LLaVA-OneVision's template writes a space more
    return start


def _unmarked_spans(text: str, messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of a template without marks."""
    written = control_tokens(tokenizer, template).written
    spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        return []
    places = _places(text, messages, template, tokenizer)
    whole = text if spoken[-1] == len(messages) - 1 else _render(messages[: spoken[-1] + 1], template, tokenizer)[0]
    _, last = places[-1]
    token = written.search(whole, last)
    if not whole.startswith(text[:last]) or token is None or whole[last : token.start()].strip():
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and writes no token that would end the turn after the last answer")
    turn_end = whole[last : token.end()]
    spans = []
    for number, (begin, end) in zip(spoken, places, strict=True):
        prompt = render_prompt(messages[:number], template, tokenizer)
        if not text.startswith(prompt) or len(prompt) > begin or text[len(prompt) : begin].strip():
            raise ChatTemplateError(
                f"{NO_GENERATION_TAGS}, and what it writes before an answer is not the prompt that the model is given: "
                f"{text[max(0, begin - 40) : begin]!r} for {prompt[-40:]!r}"
            )
        if not text.startswith(turn_end, end):
            raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and ends the last turn with {turn_end!r} and another one otherwise")
        spans.append((len(prompt), end + len(turn_end)))
    return spans


def _places(text: str, messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Where each answer stands in the text, found by rendering the conversation with a stand-in for every piece of one."""
    used = set().union(*(_spoken(message) for message in messages))
    free = (chr(code) for code in PLACEHOLDER_CODE_POINTS if chr(code) not in used)
    stands_for: dict[str, str] = {}
    exchanged: Messages = []
    pieces: list[list[str]] = []
    for message in messages:
        if message["role"] == "assistant":
            pieces.append([])
            content = []
            for block in message["content"]:
                if block["type"] != "text":
                    raise ChatTemplateError(f"an assistant turn holds text only, not {block['type']}")
                dummy_sample = next(free)
                stands_for[dummy_sample] = block["text"]
                pieces[-1].append(dummy_sample)
                content.append({**block, "text": dummy_sample})
            message = {**message, "content": content}
        exchanged.append(message)
    frame, _ = _render(exchanged, template, tokenizer)
    if [character for character in frame if character in stands_for] != list(stands_for):
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and drops or repeats an answer")
    at: dict[str, Span] = {}
    built = ""
    for part in re.split(f"([{''.join(stands_for)}])", frame):
        if part in stands_for:
            at[part] = (len(built), len(built) + len(stands_for[part]))
        built += stands_for.get(part, part)
    if built != text:
        if any(answer != answer.strip() for answer in stands_for.values()):
            raise ChatTemplateError(ANSWER_STRIPPED)
        raise ChatTemplateError(
            f"{NO_GENERATION_TAGS}, and changes an answer, or what stands around it for words that it looks for in one"
        )
    return [(at[stand_ins[0]][0], at[stand_ins[-1]][1]) for stand_ins in pieces]
