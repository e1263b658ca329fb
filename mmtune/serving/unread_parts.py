"""Parts of a conversation that an engine leaves out or writes otherwise without an error, such as the text beside a tool call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

from mmtune.data.message import Message, RowError, Sample, prompt_messages
from mmtune.serving.trained_answers import TrainedModel


def _in_messages(change: Callable[[Message], Message]) -> Callable[[Sample], Sample]:
    """Change the messages of the prompt."""
    return lambda sample: replace(sample, messages=[*map(change, prompt_messages(sample)), sample.messages[-1]])


def _without(key: str) -> Callable[[Sample], Sample]:
    return _in_messages(lambda message: {name: value for name, value in message.items() if name != key})


def _with_openai_keys(sample: Sample) -> Sample:
    tools = []
    for tool in sample.tools:
        function = {"description": None, "parameters": None, **tool["function"]}
        keys = [key for key in ("name", "description", "parameters", "strict") if key in function]
        tools.append({"type": "function", "function": {key: function[key] for key in keys}})
    return replace(sample, tools=tuple(tools))


PARTS: dict[str, Callable[[Sample], Sample]] = {
    "leaves out the text beside a tool call": _in_messages(
        lambda message: {**message, "content": []} if "tool_calls" in message else message
    ),
    "leaves out reasoning_content": _without("reasoning_content"),
    "leaves out the name of a tool result": _without("name"),
    'writes "description": null in the schema of a function without one, and only the keys of OpenAI\'s API': _with_openai_keys,
}
"""What an engine does to a conversation, and the conversation as it then reads it.

`transformers serve` 5.23 does the first three, vLLM 0.32 the last.
"""


def find_unread_parts(model: TrainedModel, sample: Sample, prompt_tokens: int) -> tuple[Sample, tuple[str, ...]] | None:
    """The conversation as an engine reads it: with parts left out or written otherwise, so that it has as many tokens.

    Args:
        sample: a sample for which the engine counts another number of prompt tokens than the trained model.
        prompt_tokens: the engine's number.

    Returns:
        The sample as the engine reads it, and keys of `PARTS`; None if they do not explain the number.
    """
    names = [name for name, change in PARTS.items() if change(sample) != sample]
    for count in range(1, len(names) + 1):
        for parts in combinations(names, count):
            read = sample
            for name in parts:
                read = PARTS[name](read)
            try:
                counted = model.prompt_tokens(prompt_messages(read), read.tools)
            except RowError:  # the chat template needs the part
                continue
            if counted == prompt_tokens:
                return read, parts
    return None
