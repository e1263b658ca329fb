"""Chat template rendering, with the exact character spans of the assistant's answers.

Templates with `{% generation %}` tags mark the spans themselves. For other templates the conversation is rendered a second time
with every answer replaced by a placeholder character, and the two texts must differ only in the answers. The span of a turn with
tool calls or reasoning is what the template writes for it after the prompt, compared with the conversation that ends there. No
length is estimated from a prefix, and spans that cannot be exact are an error.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from mmtune.chat_templates.jinja_rendering import (
    ChatTemplateError,
    Messages,
    Span,
    Tools,
    control_tokens,
    has_generation_tags,
    render_template,
)
from mmtune.chat_templates.tool_calls import (
    check_calls_written,
    check_reasoning_written,
    check_results_written,
    check_tools_written,
    render_with_tools,
)
from mmtune.utils.transformers_private import ESCAPE_END, ESCAPE_START

PLACEHOLDER_CODE_POINTS = range(0x100000, 0x10FFFE)
"""Private-use code points; those that a conversation does not contain are placeholders of its answers."""

CALL_END_TOKENS = {"<|tool_response>", "<|eom_id|>"}
"""Tokens with which a model ends a turn with tool calls instead of its end-of-turn token: Gemma 4, and Llama 3 with `ipython`.
Their generation configs stop there."""

NO_GENERATION_TAGS = "the chat template has no {% generation %} tags"
ANSWER_STRIPPED = "the chat template strips white space from the ends of an answer; remove it from the row"


def render_text(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase, tools: Tools = ()) -> str:
    """Render a whole conversation, without the spans of its answers.

    Raises:
        ChatTemplateError: the template rejects the conversation.
    """
    return _Chat(template, tokenizer, tools).text(messages)


def render_prompt(messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase, tools: Tools = ()) -> str:
    """Render a prompt: the text up to the start of the model's answer.

    Raises:
        ChatTemplateError: the template rejects the conversation, or leaves out tool calls, their results or schemas.
    """
    prompt = _Chat(template, tokenizer, tools).prompt(messages)
    check_tools_written(prompt, tools)
    for message in messages:
        check_calls_written(prompt, message.get("tool_calls", ()))
    check_results_written(prompt, messages)
    return prompt


def render_conversation(
    messages: Messages, template: str, tokenizer: PreTrainedTokenizerBase, tools: Tools = ()
) -> tuple[str, list[Span]]:
    """Render a whole conversation, with the spans of its answers.

    Args:
        messages: typed messages.
        template: the chat template.
        tokenizer: the tokenizer, for the template's variables such as `bos_token` and for end-of-turn tokens.
        tools: function schemas of the conversation.

    Returns:
        The text, and for each answer its first and past-the-last character. A span contains the answer with its tool calls, white
        space that the model generates before it (such as a space after a prompt that ends with a colon), and the end-of-turn
        token.

    Raises:
        ChatTemplateError: the spans cannot be exact, or the template rejects the conversation or leaves out a part of it.
    """
    chat = _Chat(template, tokenizer, tools)
    text, marked = render_with_tools(messages, template, tokenizer, tools)
    spans = (
        _marked_spans(text, marked, messages, chat) if has_generation_tags(template) else _unmarked_spans(text, messages, chat)
    )
    check_tools_written(text[: spans[0][0]] if spans else text, tools)
    check_results_written(text, messages)
    return text, spans


class _Chat(NamedTuple):
    """What rendering needs besides the messages."""

    template: str
    tokenizer: PreTrainedTokenizerBase
    tools: Tools

    def text(self, messages: Messages) -> str:
        return render_with_tools(messages, self.template, self.tokenizer, self.tools)[0]

    def prompt(self, messages: Messages) -> str:
        return render_with_tools(messages, self.template, self.tokenizer, self.tools, add_generation_prompt=True)[0]

    @property
    def control(self) -> re.Pattern[str]:
        """Matches the control tokens that the template writes."""
        return control_tokens(self.tokenizer, self.template).not_escaped


def _answer_numbers(messages: Messages) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _answer_text(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _has_more_than_text(message: dict[str, Any]) -> bool:
    """Whether the template writes more for an answer than its text: tool calls or reasoning."""
    return "tool_calls" in message or "reasoning_content" in message


# ---- turns with tool calls or reasoning


def _turn_span(text: str, messages: Messages, number: int, chat: _Chat) -> Span:
    """The span of a turn with tool calls or reasoning, from the end of its prompt to its end-of-turn token.

    The turn ends with the first end-of-turn token that the template writes after the prompt. In the conversation that ends with
    this turn, the template must write the same text up to that token, so that no tool result or other turn is in the span.

    Raises:
        ChatTemplateError: the template writes the turn differently, or leaves out a part of it.
    """
    message, what = messages[number], "a tool call" if "tool_calls" in messages[number] else "an answer with reasoning"
    prompt, alone = chat.prompt(messages[:number]), chat.text(messages[: number + 1])
    for rendered in (text, alone):
        if not rendered.startswith(prompt):
            raise ChatTemplateError(
                f"the chat template writes another text before {what} than its prompt: expected {prompt[-40:]!r}, got "
                f"{rendered[max(0, len(prompt) - 40) : len(prompt)]!r}"
            )
    start = len(prompt)
    ends = _end_of_turn_tokens(chat.template, chat.tokenizer)
    if "tool_calls" in message:
        ends = ends | CALL_END_TOKENS
    end, end_alone = (
        next((token.end() for token in chat.control.finditer(rendered, start) if token[0] in ends), None)
        for rendered in (text, alone)
    )
    if end is None or end_alone is None:
        raise ChatTemplateError(f"the chat template writes no end-of-turn token after {what}")
    if alone[end_alone:].strip():
        raise ChatTemplateError(f"the chat template writes an end-of-turn token before the end of {what}")
    turn = text[start:end]
    if not alone[start:end_alone].endswith(turn):
        raise ChatTemplateError(f"the chat template writes {what} differently before other turns, got {turn[:100]!r}")
    answer = _answer_text(message)
    begin = turn.find(answer, check_reasoning_written(turn, message.get("reasoning_content", "")))
    if begin < 0:
        stripped = answer.strip() in turn
        raise ChatTemplateError(ANSWER_STRIPPED if stripped else f"the chat template changes the answer {answer[:100]!r}")
    if answer and "reasoning_content" not in message and turn[:begin].strip():
        raise ChatTemplateError(f"expected the answer {answer[:100]!r} after the prompt, got {turn[: begin + 40]!r}")
    check_calls_written(turn[begin + len(answer) :], message.get("tool_calls", ()))
    return start, end


@lru_cache(maxsize=32)
def _end_of_turn_tokens(template: str, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The token that the template writes after an answer of text, and the tokenizer's eos token."""
    question, answer = ({"role": role, "content": [{"type": "text", "text": "yes"}]} for role in ("user", "assistant"))
    tokens = {tokenizer.eos_token} if tokenizer.eos_token else set()
    try:
        text, _ = render_template([question, answer], template, tokenizer)
    except ChatTemplateError:  # such as a template that needs an image; the conversation itself is checked too
        return tokens
    end = text.rfind("yes") + len("yes")
    token = control_tokens(tokenizer, template).not_escaped.search(text, end)
    return tokens | {token[0]} if token and not text[end : token.start()].strip() else tokens


# ---- templates with {% generation %} tags


def _marked_spans(text: str, marked: list[Span], messages: Messages, chat: _Chat) -> list[Span]:
    """The spans of a template with `{% generation %}` tags."""
    answers = _answer_numbers(messages)
    marked = _merge_adjacent(marked)
    if len(marked) != len(answers):
        detail = f"expected {len(answers)} supervised spans, one for each answer, got {len(marked)}: the chat template drops or "
        raise ChatTemplateError(detail + "joins answers")
    spans, ends = [], set()
    for mark, number in zip(marked, answers, strict=True):
        if _has_more_than_text(messages[number]):
            spans.append(_turn_span(text, messages, number, chat))
            _check_mark_of_turn(text, mark, spans[-1], chat)
        else:
            spans.append(_exact_span(text, mark, messages, number, chat))
            ends.add(text[mark[1] : spans[-1][1]])
    if len(ends) > 1:
        raise ChatTemplateError(
            f"expected the same end-of-turn token after every answer, got {', '.join(map(repr, sorted(ends)))}"
        )
    return spans


def _check_mark_of_turn(text: str, mark: Span, span: Span, chat: _Chat) -> None:
    """Check that the template's tags mark the same turn, with or without its end-of-turn token, and nothing after it.

    Raises:
        ChatTemplateError: the marked span has other text.
    """
    *_, token = chat.control.finditer(text, *span)
    first = span[0] + len(text[span[0] : token.start()]) - len(text[span[0] : token.start()].lstrip())
    last = len(text[: token.start()].rstrip())
    if mark[0] > first or mark[1] < last or text[span[1] : mark[1]].strip():
        raise ChatTemplateError(
            f"expected the {{% generation %}} tags of the chat template around {text[first:last]!r}, got {text[slice(*mark)]!r}"
        )


def _merge_adjacent(spans: list[Span]) -> list[Span]:
    """Merge adjacent spans, because some templates mark every part of an answer."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1][1] == span[0]:
            span = merged.pop()[0], span[1]
        merged.append(span)
    return merged


def _exact_span(text: str, span: Span, messages: Messages, number: int, chat: _Chat) -> Span:
    """The exact span of an answer and its end-of-turn token, from the span that the template marked.

    The end-of-turn token can also follow directly after the marked span. White space after the token is excluded.

    Raises:
        ChatTemplateError: the marked span has other text, or there is no end-of-turn token.
    """
    (start, stop), answer = span, _answer_text(messages[number])
    begin = text.find(answer, start, stop)
    end = begin + len(answer)
    if begin >= 0:
        start = _span_start(text, start, begin, messages[:number], chat)
    token = chat.control.search(text, end, stop)
    if (
        token is None
        and (following := chat.control.search(text, stop)) is not None
        and not text[stop : following.start()].strip()
    ):
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


def _span_start(text: str, start: int, begin: int, before: Messages, chat: _Chat) -> int:
    """The start of a marked span, moved to the end of the prompt if they differ.

    Text that the prompt already contains (such as an empty thinking block written by the template) is excluded. White space
    between the prompt and the marked span is included, because the model generates it.

    Args:
        text: the rendered conversation.
        start: start of the marked span.
        begin: start of the answer.
        before: the messages before the answer.
        chat: the template, its tokenizer and the tools.
    """
    if start == begin and not text[:start][-1:].isspace():
        return start
    prompt = chat.prompt(before)
    if text.startswith(prompt) and len(prompt) <= begin:
        return start if text[len(prompt) : start].strip() else len(prompt)
    if prompt.rstrip() == text[:begin].rstrip():
        return begin  # only white space differs: LLaVA-OneVision's template writes one more space in the prompt
    return start


# ---- templates without {% generation %} tags


def _unmarked_spans(text: str, messages: Messages, chat: _Chat) -> list[Span]:
    """The spans of a template without `{% generation %}` tags."""
    answer_spans = _find_answers(text, messages, chat)
    of_text = [number for number in answer_spans if not _has_more_than_text(messages[number])]
    turn_end = _turn_end(text, messages, of_text[-1], answer_spans[of_text[-1]][1], chat) if of_text else ""
    spans = []
    for number in _answer_numbers(messages):
        if _has_more_than_text(messages[number]):
            spans.append(_turn_span(text, messages, number, chat))
            continue
        begin, end = answer_spans[number]
        prompt = chat.prompt(messages[:number])
        if not text.startswith(prompt) or len(prompt) > begin or text[len(prompt) : begin].strip():
            raise ChatTemplateError(
                f"{NO_GENERATION_TAGS}, and its text before an answer differs from the prompt: expected {prompt[-40:]!r}, "
                f"got {text[max(0, begin - 40) : begin]!r}"
            )
        if not text.startswith(turn_end, end):
            raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and ends only the last turn, but not all turns, with {turn_end!r}")
        spans.append((len(prompt), end + len(turn_end)))
    return spans


def _turn_end(text: str, messages: Messages, number: int, end: int, chat: _Chat) -> str:
    """The text from the end of the last answer of text to the end of its end-of-turn token.

    Args:
        text: the rendered conversation.
        messages: the conversation.
        number: number of the message with that answer.
        end: end of the answer.
        chat: the template, its tokenizer and the tools.
    """
    token = chat.control.search(text, end)
    is_end = number == len(messages) - 1 or (token and token[0] in _end_of_turn_tokens(chat.template, chat.tokenizer))
    if token is None or not is_end or text[end : token.start()].strip():
        raise ChatTemplateError(f"{NO_GENERATION_TAGS}, and writes no end-of-turn token after the last answer")
    return text[end : token.end()]


def _find_answers(text: str, messages: Messages, chat: _Chat) -> dict[int, Span]:
    """The span of the text of each answer that has text, by number of the message.

    The conversation is rendered with a placeholder for every text block of an answer.
    """
    used = set(text).union(*(_answer_text(message) for message in messages))
    free = (chr(code) for code in PLACEHOLDER_CODE_POINTS if chr(code) not in used)
    text_of_placeholder: dict[str, str] = {}
    replaced: Messages = []
    placeholders: dict[int, list[str]] = {}
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            content = []
            for block in message["content"]:
                if block["type"] != "text":
                    raise ChatTemplateError(f"expected only text in an assistant turn, got {block['type']}")
                placeholder = next(free)
                text_of_placeholder[placeholder] = block["text"]
                placeholders.setdefault(number, []).append(placeholder)
                content.append({**block, "text": placeholder})
            message = {**message, "content": content}
        replaced.append(message)
    if not text_of_placeholder:
        return {}
    frame = chat.text(replaced)
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
    return {number: (spans[blocks[0]][0], spans[blocks[-1]][1]) for number, blocks in placeholders.items()}
