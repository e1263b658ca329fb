"""ScriptedConversation scripts: a YAML file with questions to a model, turn by turn, and what each answer is expected to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmtune.data.encoding.encode import open_images
from mmtune.data.media.media import MediaRules, resolve_media
from mmtune.data.message import Message
from mmtune.evaluation.metrics.metric import Item, Metric
from mmtune.evaluation.metrics.metric_table import METRICS
from mmtune.recipe.yaml_lines import read_document
from mmtune.utils.errors import UserError, nearest

NonEmpty = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expectation(_Section):
    """What an answer is expected to be: exactly one of the first six keys."""

    contains: NonEmpty | None = Field(default=None, description="This text is in the answer, without regard to case.")
    not_contains: NonEmpty | None = Field(default=None, description="This text is not in the answer, without regard to case.")
    exact: NonEmpty | None = Field(default=None, description="The answer is this text; white space at its ends does not count.")
    regex: NonEmpty | None = Field(default=None, description="Python's re.search finds this in the answer.")
    metric: NonEmpty | None = Field(default=None, description="A metric of docs/evaluation.md, with `references`.")
    judge: NonEmpty | None = Field(default=None, description="A good answer. The judge does not prefer it to the model's.")
    references: tuple[NonEmpty, ...] = Field(default=(), description="With metric: all accepted answers.")
    at_least: float | None = Field(default=None, description="With metric: the lowest score that passes; default 1.")
    at_most: float | None = Field(default=None, description="With metric: the highest score that passes, for error rates.")

    @field_validator("regex")
    @classmethod
    def _check_regex(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"expected a regular expression, got {value[:80]!r}: {error}") from error
        return value

    @model_validator(mode="after")
    def _check(self) -> Expectation:
        kinds = [name for name in KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"expected one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
        if self.metric is None:
            if self.references or self.at_least is not None or self.at_most is not None:
                raise ValueError("references, at_least and at_most belong to a metric")
            return self
        metric = METRICS.get(self.metric)
        if metric is None:
            raise ValueError(f"expected a metric of docs/evaluation.md, got {self.metric[:80]!r}{nearest(self.metric, METRICS)}")
        if not self.references:
            raise ValueError(f"metric {self.metric}: expected references")
        wrong = self.at_most is not None if metric.greater_is_better else self.at_least is not None or self.at_most is None
        if wrong:
            needed, better = ("at_least", "greater") if metric.greater_is_better else ("at_most", "lower")
            raise ValueError(f"metric {self.metric}: expected {needed}, because {better} is better")
        if (problem := metric.problem(self.item(""))) is not None:
            raise ValueError(f"references: {problem} (metric {self.metric})")
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def item(self, answer: str) -> Item:
        """What the metric scores."""
        return Item(answer.strip(), self.references)

    def score(self, answer: str) -> float | None:
        """The score of an answer by the metric; None if it cannot be parsed."""
        metric: Metric = METRICS[str(self.metric)]
        return metric.score_items([self.item(answer)])[0]

    def passes(self, answer: str) -> bool:
        """Whether an answer is as expected; not for `judge`."""
        folded, text = answer.casefold(), answer.strip()
        if self.contains is not None:
            return self.contains.casefold() in folded
        if self.not_contains is not None:
            return self.not_contains.casefold() not in folded
        if self.exact is not None:
            return text == self.exact.strip()
        if self.regex is not None:
            return re.search(self.regex, text) is not None
        score = self.score(answer)
        if score is None:
            return False
        return score <= self.at_most if self.at_most is not None else score >= (1.0 if self.at_least is None else self.at_least)

    def __str__(self) -> str:
        if self.metric is None:
            return f"{self.kind}: {getattr(self, self.kind)}"
        limit = (
            f"at most {self.at_most:g}"
            if self.at_most is not None
            else f"at least {1.0 if self.at_least is None else self.at_least:g}"
        )
        return f"{self.metric} {limit}: {' | '.join(self.references)}"


KINDS = ("contains", "not_contains", "exact", "regex", "metric", "judge")


class ScriptedTurn(_Section):
    """A question, with images before its text."""

    user: NonEmpty
    images: tuple[NonEmpty, ...] = ()
    expect: tuple[Expectation, ...] = ()


class ScriptedConversation(_Section):
    """Turns that build on each other: the model's own answers are the context of the next questions."""

    id: NonEmpty
    system: NonEmpty | None = None
    turns: tuple[ScriptedTurn, ...] = Field(min_length=1)


class Script(_Section):
    """A file of conversations."""

    description: str = ""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    media_root: str = Field(default=".", description="The folder of the images, relative to the script's folder.")
    conversations: tuple[ScriptedConversation, ...] = Field(min_length=1)

    @field_validator("conversations")
    @classmethod
    def _check_ids(cls, value: tuple[ScriptedConversation, ...]) -> tuple[ScriptedConversation, ...]:
        ids = [each.id for each in value]
        repeated = sorted({name for name in ids if ids.count(name) > 1})
        if repeated:
            raise ValueError(f"id: expected another one for each conversation, got {repeated[0]!r} again")
        return value


def read_script(path: Path) -> Script:
    """Read a script.

    Raises:
        UserError: a file that is not a valid script, one problem per line with its line and key.
    """
    document = read_document(path, "conversation script", "description, conversations")
    script = None
    try:
        script = Script.model_validate(document.values)
    except ValidationError as error:
        for detail in error.errors():
            document.report(".".join(map(str, detail["loc"])) or "conversations", _problem(detail))
    document.raise_problems()
    assert script is not None
    return script


def _problem(detail: Any) -> str:
    if detail["type"] == "missing":
        return "required key is missing"
    if detail["type"] == "extra_forbidden":
        known = {*Script.model_fields, *ScriptedConversation.model_fields, *ScriptedTurn.model_fields, *Expectation.model_fields}
        return f"unknown key{nearest(str(detail['loc'][-1]), known)}"
    message: str = detail["msg"]
    return message.removeprefix("Value error, ")


def question_messages(script: Script, path: Path) -> list[list[Message]]:
    """For each conversation, the user messages of its turns, with images that were opened once.

    Raises:
        UserError: an image that is missing, outside the media root or cannot be read, with the conversation's id.
    """
    rules = MediaRules((path.parent / script.media_root).resolve())
    conversations = []
    for conversation in script.conversations:
        messages: list[Message] = []
        for number, turn in enumerate(conversation.turns, start=1):
            where = f"{path}: conversation {conversation.id}, turn {number}"
            try:
                images = [{"type": "image", "image": resolve_media(name, rules)} for name in turn.images]
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            message: Message = {"role": "user", "content": [*images, {"type": "text", "text": turn.user}]}
            open_images(where, [message])
            messages.append(message)
        conversations.append(messages)
    return conversations
