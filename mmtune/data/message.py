"""Samples and messages: the common form of all rows, as read by transformers' chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.data.media.media import Media
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    from mmtune.data.templates.regions import Region

Message = dict[str, Any]
"""`{"role": "user" | "assistant" | "system" | "tool", "content": [block, ...]}` where a block is `{"type": "text", "text": str}`
or `{"type": "image", "image": Media}`, and likewise `video` and `audio`. An assistant message with `"supervised": False` is
context without loss.

A text block with `native`, a `NativeRegion` in the image `region_image`, is written in the convention of the model's family by
`write_native_regions`; until then its text has the region in thousandths.

An assistant message can have `reasoning_content`, the text of its reasoning, and `tool_calls`, a list of
`{"type": "function", "function": {"name": str, "arguments": {...}}}` with an optional `id`; its content can then be empty.
A `tool` message is the result of a call, with optional `tool_call_id` and `name`."""


class RowError(UserError):
    """An error of one row.

    Args:
        row: the row's id, `FILE:LINE` or `FILE[INDEX]`.
        field: the field of the row with the error.
        detail: what is wrong, what was expected, and how to fix it.
        issue: the issue type, a key of `mmtune.data.validation.issues.ISSUE_TYPES`.
    """

    def __init__(self, row: str, field: str, detail: str, issue: str = "row_unusable") -> None:
        super().__init__(f"{row}: {field}: {detail}")
        self.row = row
        self.field = field
        self.detail = detail
        self.issue = issue

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str, str]]:
        return type(self), (self.row, self.field, self.detail, self.issue)  # data-loader workers send it between processes


@dataclass(frozen=True)
class Sample:
    """One conversation with its metadata.

    Attributes:
        id: stable id of the row.
        messages: typed messages; image blocks have a checked path, or the embedded image of the row.
        task: name of the task, for metrics per task; None if the rows have no task.
        source: path of the source in the recipe.
        choices: all possible answers to a closed question, as text of the assistant; empty for an open question.
        options: the texts of the options A, B, ... of a multiple-choice question, in the order that the model sees.
        references: all accepted answers as the row has them, with repetitions; empty if only the last turn is accepted.
        cluster: the document that the question is about, if the template names a field for it.
        tools: schemas of the functions that the model may call, `{"type": "function", "function": {"name": str, ...}}`.
        shots: the number of messages that are few-shot examples; only a system message comes before them.
        regions: the boxes, points and quadrilaterals that the template declares, in the only image of the row.
        extent: the coordinates of the image's lower right corner, in the convention of the regions in the last answer; None if it
            has none, several conventions, or that of a family before `with_native_regions`.
    """

    id: str
    messages: list[Message]
    task: str | None = None
    source: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cluster: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    shots: int = 0
    regions: tuple[Region, ...] = ()
    extent: tuple[float, float] | None = None

    @property
    def images(self) -> list[Media]:
        """The images, in the order of their placeholders."""
        return _images_of(self.messages)

    @property
    def own_images(self) -> list[Media]:
        """The images of the row itself, without those of few-shot examples."""
        system = 1 if self.messages and self.messages[0]["role"] == "system" else 0
        return _images_of(self.messages[system + self.shots :])


def _images_of(messages: list[Message]) -> list[Media]:
    return [image for message in messages for image in images_in(message)]


def images_in(message: Message) -> list[Any]:
    """The images of one message, in the order of their placeholders."""
    return [block["image"] for block in message["content"] if block["type"] == "image"]


def with_images(message: Message, convert: Callable[[Any], Any]) -> Message:
    """The message with each of its images converted, in the order of their placeholders."""
    blocks = [{**block, "image": convert(block["image"])} if block["type"] == "image" else block for block in message["content"]]
    return {**message, "content": blocks}


def text_message(role: str, text: str) -> Message:
    """A message of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """The text of one message, without its media."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def all_text_of(message: Message) -> str:
    """The text of one message with its reasoning and, as JSON, its tool calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([message.get("reasoning_content", ""), text_of(message), *calls]).strip("\n")


def has_media(message: Message) -> bool:
    """Whether a message has an image, a video or an audio clip."""
    return any(block["type"] != "text" for block in message["content"])


def is_supervised(message: Message) -> bool:
    """Whether the loss includes a message."""
    return message["role"] == "assistant" and message.get("supervised", True)


def prompt_messages(sample: Sample) -> list[Message]:
    """The messages of a conversation before its last answer, which can be a tool call.

    Raises:
        RowError: the conversation does not end with an answer.
    """
    if sample.messages[-1]["role"] != "assistant":
        raise RowError(sample.id, "messages", "expected an answer as the last turn of the conversation", "answer_missing")
    return sample.messages[:-1]


def split_question(sample: Sample) -> tuple[list[Message], str]:
    """Split a conversation into the messages before its last answer, and the text of that answer.

    Raises:
        RowError: the conversation does not end with an answer of text, or the answer has weight 0 and is thus not a valid
            reference.
    """
    question = prompt_messages(sample)
    if "tool_calls" in sample.messages[-1]:
        detail = "the last answer is a tool call, and only text can be compared with the model's answer; end the row with a text"
        raise RowError(sample.id, "messages", detail, "reference_tool_call")
    if not is_supervised(sample.messages[-1]):
        detail = "the last answer has weight 0, so it cannot be the reference; remove it, or set weight 1"
        raise RowError(sample.id, "messages", detail, "reference_weight")
    return question, text_of(sample.messages[-1])
