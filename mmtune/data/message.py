"""The one form every row takes at the door: typed messages, as transformers' chat templates read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmtune.data.media.media import Media
from mmtune.utils.errors import UserError

Message = dict[str, Any]
"""`{"role": "user" | "assistant" | "system", "content": [block, ...]}` where a block is `{"type": "text", "text": str}`
or `{"type": "image", "image": Media}`, and likewise `video` and `audio`. An assistant's message with `"supervised": False` is
context that the loss does not fall on."""


class RowError(UserError):
    """A row that cannot train as it stands.

    Args:
        row: the row's id, `FILE:LINE` or `FILE[INDEX]`.
        field: the field of the row that is at fault.
        detail: what was wrong and what would be right.
        issue: what kind of fault it is, one of `mmtune.data.validation.issues.ISSUE_TYPES`, said where the fault is known.
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
    """One conversation, and where it came from.

    Attributes:
        id: stable id of the row.
        messages: typed messages; image blocks hold a path that the source's rules allow, or what a row carries inside.
        task: what kind of question this is, for figures per task; None when the rows do not say.
        source: the file or data set it came from, as the recipe names it.
        choices: all answers that the last question leaves open, each as the assistant would say it; empty for an open question.
        references: all answers that count as right, where the row has several; empty where the last turn is the only one.
    """

    id: str
    messages: list[Message]
    task: str | None = None
    source: str = ""
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    @property
    def images(self) -> list[Media]:
        """The images, in the order in which the text refers to them."""
        return [block["image"] for message in self.messages for block in message["content"] if block["type"] == "image"]


def text_of(message: Message) -> str:
    """The text of one message, its images left out."""
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def has_media(message: Message) -> bool:
    """Whether a message holds an image, a video or audio."""
    return any(block["type"] != "text" for block in message["content"])


def is_supervised(message: Message) -> bool:
    """Whether the loss falls on a message."""
    return message["role"] == "assistant" and message.get("supervised", True)


def split_question(sample: Sample) -> tuple[list[Message], str]:
    """The conversation up to its last answer, and that answer.

    Raises:
        RowError: when the conversation does not end with the assistant, or its weight takes the answer out of the loss: what a
            model should not learn is no reference to hold it to.
    """
    if sample.messages[-1]["role"] != "assistant":
        raise RowError(sample.id, "messages", "the conversation does not end with an answer", "answer_missing")
    if not is_supervised(sample.messages[-1]):
        detail = "the last answer has weight 0, so it cannot be the reference; cut it, or give it weight 1"
        raise RowError(sample.id, "messages", detail, "reference_weight")
    return sample.messages[:-1], text_of(sample.messages[-1])
