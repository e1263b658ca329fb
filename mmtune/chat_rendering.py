"""A conversation as the chat template writes it, and where in that text the assistant's answers stand.

Templates with `{% generation %}` marks say so themselves. For the others the conversation is rendered a second time with every
answer exchanged for a string that occurs nowhere else, and the two texts may differ in nothing but the answers. Both ways end
in character spans; nothing is guessed from the length of a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]
Span = tuple[int, int]


class NotExact(ValueError):
    """What the template wrote cannot be told apart into answers and the rest; the message says why."""


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase, size: int, template: str) -> re.Pattern[str]:
    tokens = sorted(tokenizer._get_control_tokens(template), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> re.Pattern[str]:
    """Matches the tokens that only a chat template may write: the special ones, and added ones that stand in the template."""
    return _control_tokens(tokenizer, len(tokenizer), template)


def render_prompt(messages: Messages, template: str, special_tokens: Mapping[str, Any]) -> str:
    """The text up to where the model's answer begins.

    Raises:
        NotExact: when the template refuses the conversation.
    """
    return _render(messages, template, special_tokens, add_generation_prompt=True)[0]


def render_conversation(
    messages: Messages, template: str, special_tokens: Mapping[str, Any], control: re.Pattern[str]
) -> tuple[str, list[Span]]:
    """A whole conversation as text, and what of it is learnt.

    Args:
        messages: typed messages.
        template: a chat template.
        special_tokens: what the template may call `bos_token` and so on.
        control: matches the tokens that can end a turn, from `control_tokens`.

    Returns:
        The text, and for each answer its first and past-the-last character. A span holds the answer, what the model writes
        before it (a space where the prompt ends at a colon), and the token that ends its turn.

    Raises:
        NotExact: when the spans cannot be exact, or the template refuses the conversation.
    """
    text, spans = _render(messages, template, special_tokens)
    answers = [_spoken(message) for message in messages if message["role"] == "assistant"]
    joined = sum(first[1] == second[0] for first, second in pairwise(spans))
    if len(spans) - joined != len(answers):
        raise NotExact(
            f"{len(spans) - joined} supervised spans for {len(answers)} answers: the chat template dropped or joined one"
        )
    return text, spans


def _render(
    messages: Messages, template: str, special_tokens: Mapping[str, Any], add_generation_prompt: bool = False
) -> tuple[str, list[Span]]:
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=MARKS.search(template) is not None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except TemplateError as error:
        raise NotExact(f"the chat template refuses this conversation: {error}") from error
    return texts[0], spans[0] if spans else []


def _spoken(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")
