"""The questions of a held-out row: the last one or one for each turn, in the words that the model reads."""

from __future__ import annotations

from dataclasses import replace

from mmtune.data.message import Message, Sample, is_supervised
from mmtune.recipe.recipe import EvaluateSection


def questions_of(sample: Sample, section: EvaluateSection) -> list[Sample]:
    """The questions of a held-out row, each a conversation that ends with the reference answer.

    With `turns: all` there is one for every answer of text that the loss may include; the answers before it are the row's. The
    last one has the row's id, the n-th of the others `ID#n`.
    """
    answers = [
        number
        for number, message in enumerate(sample.messages[:-1])
        if message["role"] == "assistant" and is_supervised(message) and "tool_calls" not in message
    ]
    earlier = [
        replace(
            sample,
            id=f"{sample.id}#{number}",
            messages=sample.messages[: answer + 1],
            choices=(),
            references=(),
            options=(),
        )
        for number, answer in enumerate(answers if section.turns == "all" else (), start=1)
    ]
    return [*earlier, sample]


def with_prompt(sample: Sample, prompt: str | None) -> Sample:
    """The question in the words of `evaluate.prompt`, whose `{question}` is the text of the last user turn."""
    if prompt is None:
        return sample
    before, _, after = prompt.partition("{question}")
    last = max(number for number, message in enumerate(sample.messages) if message["role"] == "user")
    messages = list(sample.messages)
    messages[last] = _between(messages[last], before, after)
    return replace(sample, messages=messages)


def _between(message: Message, before: str, after: str) -> Message:
    """A message with text before its first text and after its last one; its media keep their places."""
    blocks = [dict(block) for block in message["content"]]
    texts = [block for block in blocks if block["type"] == "text"]
    if not texts:
        texts = [{"type": "text", "text": ""}]
        blocks += texts
    texts[0]["text"] = before + texts[0]["text"]
    texts[-1]["text"] += after
    return {**message, "content": blocks}
