"""Parts of a conversation that an engine leaves out without an error, such as the text beside a tool call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

from mmtune.data.message import Message, RowError, Sample, prompt_messages
from mmtune.serving.trained_answers import TrainedModel


def _without(key: str) -> Callable[[Message], Message]:
    return lambda message: {name: value for name, value in message.items() if name != key}


PARTS: dict[str, Callable[[Message], Message]] = {
    "the text beside a tool call": lambda message: {**message, "content": []} if "tool_calls" in message else message,
    "reasoning_content": _without("reasoning_content"),
    "the name of a tool result": _without("name"),
}
"""Parts by name, and a message without it. `transformers serve` 5.23 reads none of them."""


def find_unread_parts(model: TrainedModel, sample: Sample, prompt_tokens: int) -> tuple[Sample, tuple[str, ...]] | None:
    """The conversation as an engine reads it: without parts of it, so that the prompt has as many tokens as the engine counts.

    Args:
        sample: a sample for which the engine counts another number of prompt tokens than the trained model.
        prompt_tokens: the engine's number.

    Returns:
        The sample without these parts, and their names; None if no parts explain the number.
    """
    names = [name for name, remove in PARTS.items() if any(remove(message) != message for message in prompt_messages(sample))]
    for count in range(1, len(names) + 1):
        for parts in combinations(names, count):
            messages = prompt_messages(sample)
            for name in parts:
                messages = [PARTS[name](message) for message in messages]
            try:
                counted = model.prompt_tokens(messages, sample.tools)
            except RowError:  # the chat template needs the part
                continue
            if counted == prompt_tokens:
                return replace(sample, messages=[*messages, sample.messages[-1]]), parts
    return None
