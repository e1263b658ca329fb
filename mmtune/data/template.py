"""Data templates: YAML files that turn a row of any format into typed messages.

A template says either where a row keeps its conversation (`conversation`), or how to write one from the row's
columns (`messages`, in sandboxed Jinja). `docs/data.md` documents the format; `data_templates/` holds those that ship.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmtune.data.media import Media, MediaRules, kind_of, resolve_media
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.source import Row
from mmtune.errors import UserError, nearest
from mmtune.shipped import shipped_dir

ROLES = ("system", "user", "assistant")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Conversation(_Strict):
    """Where a row keeps its turns."""

    field: str = Field(description="The row's field that holds the list of turns.")
    role: str = Field(description="The turn's key that names the speaker.")
    text: str = Field(description="The turn's key that holds the text, or a list of typed blocks.")
    roles: dict[str, str] = Field(description="Speaker name to user, assistant or system.")


class Turn(_Strict):
    """One message written from the row's columns."""

    role: str
    images: tuple[str, ...] = Field(default=(), description="Jinja for each image's path, shown before the text.")
    text: str = Field(description="Jinja for the text.")


class DataTemplate(_Strict):
    """One data template. Exactly one of `conversation` and `messages` is given."""

    description: str
    conversation: Conversation | None = None
    messages: tuple[Turn, ...] = ()
    images: str | None = Field(default=None, description="The row's field with one image path, or a list of them.")
    placeholder: str = Field(default="<image>", description="What stands in a turn's text where an image goes.")
    task: str | None = Field(default=None, description="The row's field that names its task, if it has one.")
    example: dict[str, Any] = Field(description="A row in this format; `--rehearse` and the tests use it.")

    @model_validator(mode="after")
    def _one_form(self) -> DataTemplate:
        if (self.conversation is None) == (not self.messages):
            raise ValueError("give exactly one of 'conversation' and 'messages'")
        roles = self.conversation.roles.values() if self.conversation else [turn.role for turn in self.messages]
        for role in roles:
            if role not in ROLES:
                raise ValueError(f"'{role}' is no role; roles are {', '.join(ROLES)}")
        for turn in self.messages:
            for source in (*turn.images, turn.text):
                try:
                    _compile(source)
                except TemplateError as error:
                    raise ValueError(f"not valid Jinja: {error}: {source}") from error
        return self

    def sample(self, row_id: str, row: Row, rules: MediaRules) -> Sample:
        """Turn a row into messages and check what can be checked without opening an image.

        Raises:
            RowError: a missing field, an unknown speaker, turns out of order, an empty answer, an image that is missing or
                outside the media root, or a number of images that differs from the number of placeholders.
        """
        messages = self._from_turns(row_id, row, rules) if self.conversation else self._from_columns(row_id, row, rules)
        _check_turns(row_id, messages)
        task = row.get(self.task) if self.task else None
        return Sample(id=row_id, messages=messages, task=None if task is None else str(task))

    def _from_turns(self, row_id: str, row: Row, rules: MediaRules) -> list[Message]:
        assert self.conversation is not None
        spec = self.conversation
        turns = row.get(spec.field)
        if not isinstance(turns, list) or not turns:
            kind = "field_type" if spec.field in row else "field_missing"
            raise RowError(row_id, spec.field, "expected a list of turns" + _among(row, spec.field), kind)
        images = iter(paths := self._row_images(row_id, row, rules))
        messages: list[Message] = []
        used = 0
        for number, turn in enumerate(turns):
            where = f"{spec.field}[{number}]"
            if not isinstance(turn, dict) or spec.role not in turn or spec.text not in turn:
                raise RowError(row_id, where, f"expected an object with '{spec.role}' and '{spec.text}'", "field_missing")
            speaker, text = turn[spec.role], turn[spec.text]
            if not isinstance(speaker, str) or speaker not in spec.roles:
                told = f"unknown speaker {speaker!r}{nearest(str(speaker), set(spec.roles))}"
                raise RowError(row_id, f"{where}.{spec.role}", told, "role_unknown")
            role = spec.roles[speaker]
            if isinstance(text, list):
                content = [
                    self._block(row_id, f"{where}.{spec.text}[{i}]", block, rules, images) for i, block in enumerate(text)
                ]
            elif isinstance(text, str):
                content = self._split(text, images) if role != "assistant" else [{"type": "text", "text": text}]
            else:
                raise RowError(row_id, f"{where}.{spec.text}", f"expected text, found {type(text).__name__}", "field_type")
            used += sum(1 for block in content if block["type"] == "image")
            messages.append({"role": role, "content": content})
        missing = any(block.get("image") is None for m in messages for block in m["content"] if block["type"] == "image")
        if missing or next(images, None) is not None:
            told = f"{len(paths)} images for {used} '{self.placeholder}' placeholders"
            raise RowError(row_id, self.images or spec.field, told, "placeholder_count")
        return messages

    def _from_columns(self, row_id: str, row: Row, rules: MediaRules) -> list[Message]:
        messages: list[Message] = []
        for number, turn in enumerate(self.messages):
            where = f"messages[{number}]"
            content: list[dict[str, Any]] = []
            for source in turn.images:
                path = _media(row_id, where, self._render(row_id, where, source, row), rules)
                content.append({"type": "image", "image": path})
            content.append({"type": "text", "text": self._render(row_id, where, turn.text, row)})
            messages.append({"role": turn.role, "content": content})
        return messages

    def _render(self, row_id: str, where: str, source: str, row: Row) -> str:
        try:
            return _compile(source).render(row)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:  # Jinja runs Python's operators
            kind = "field_missing" if isinstance(error, UndefinedError) else "field_type"
            raise RowError(row_id, where, f"{error}; the row has: {', '.join(map(str, row))}", kind) from error

    def _row_images(self, row_id: str, row: Row, rules: MediaRules) -> list[Media]:
        value = row.get(self.images) if self.images else None
        if value is None or value == "":
            return []
        names = value if isinstance(value, list) else [value]
        return [_media(row_id, self.images or "", name, rules) for name in names]

    def _split(self, text: str, images: Any) -> list[dict[str, Any]]:
        """Text around placeholders; the line break that sets a placeholder apart belongs to it, not to the text."""
        content: list[dict[str, Any]] = []
        pieces = text.split(self.placeholder)
        for number, piece in enumerate(pieces):
            if number > 0:
                content.append({"type": "image", "image": next(images, None)})
                piece = piece.removeprefix("\n")
            if number < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                content.append({"type": "text", "text": piece})
        return content

    def _block(self, row_id: str, where: str, block: Any, rules: MediaRules, images: Any) -> dict[str, Any]:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            return {"type": "text", "text": block["text"]}
        if kind == "image":
            named = block.get("image") or block.get("path") or block.get("url")
            return {"type": "image", "image": _media(row_id, where, named, rules) if named else next(images, None)}
        if kind == "image_url" and isinstance(block.get("image_url"), dict):
            return {"type": "image", "image": _media(row_id, where, block["image_url"].get("url"), rules)}
        raise RowError(row_id, where, f"expected a text or image block, found {block!r}"[:200], "field_type")


@cache
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, finalize=_written)
    return environment.from_string(source)


def _written(value: Any) -> Any:
    """Jinja would write Python's own words for these, and the model would learn them."""
    if value is None or isinstance(value, (list, dict)):
        raise TemplateRuntimeError(f"a text cannot be made of {'null' if value is None else f'a {type(value).__name__}'}")
    return value


def _media(row_id: str, field: str, name: Any, rules: MediaRules) -> Media:
    try:
        return resolve_media(name, rules)
    except ValueError as error:
        raise RowError(row_id, field, str(error), kind_of(error)) from error


def _among(row: Row, field: str) -> str:
    return "" if field in row else nearest(field, {str(key) for key in row})


def _check_turns(row_id: str, messages: list[Message]) -> None:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowError(row_id, "messages", "a system message comes first or not at all", "role_order")
    if not spoken or spoken[0] != "user" or any(a == b for a, b in pairwise(spoken)):
        told = f"turns alternate from user to assistant, found {', '.join(spoken) or 'none'}"
        raise RowError(row_id, "messages", told, "role_order")
    if spoken[-1] != "assistant":
        kind = "answer_missing" if "assistant" in spoken else "nothing_supervised"
        raise RowError(row_id, "messages", "no answer: the last turn is the user's", kind)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not any(b["type"] == "text" and b["text"].strip() for b in message["content"]):
            raise RowError(row_id, f"messages[{number}]", "the answer is empty", "answer_empty")
        if message["role"] == "assistant" and any(b["type"] == "image" for b in message["content"]):
            raise RowError(row_id, f"messages[{number}]", "an answer cannot hold an image", "image_in_answer")


def load_data_template(name: str) -> DataTemplate:
    """A shipped template by its name, or one of your own by the path of its YAML file.

    Raises:
        UserError: for an unknown name or a file that is no data template.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"data template {path}: no such file")
    else:
        shipped = {file.stem: file for file in sorted(shipped_dir("data_templates").glob("*.yaml"))}
        if name not in shipped:
            raise UserError(f"data template '{name}' is not one of those that ship{nearest(name, set(shipped))}")
        path = shipped[name]
    try:
        return DataTemplate.model_validate(yaml.safe_load(path.read_bytes()))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: {faults}") from error
