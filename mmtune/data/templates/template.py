"""Data templates: YAML files that turn a row of any format into typed messages.

A template says either where a row keeps its conversation (`conversation`), or how to write one from the row's
columns (`messages`, in sandboxed Jinja). `docs/data_templates.md` documents the format; `data_templates/` holds those that ship.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, ValidationError, model_validator

from mmtune.data.media.image_settings import DEFAULT_IMAGE_SETTINGS, ImageSettings
from mmtune.data.media.media import EmbeddedMedia, MediaRules
from mmtune.data.message import Message, RowError, Sample, has_media, is_supervised
from mmtune.data.sources.rows import ID_FIELDS, Row
from mmtune.data.templates.boxes import BOX_FIELDS
from mmtune.data.templates.columns import BoxDeclaration, ColumnTemplate, TurnTemplate
from mmtune.data.templates.conversation import PLACEHOLDERS, Conversation, check_no_row_weights
from mmtune.data.templates.expressions import TemplateSection, check_jinja, names_read
from mmtune.data.templates.prompts import DEFAULT_PROMPT_SETTINGS, Options, PromptSettings, Verbalizer
from mmtune.data.templates.unread_media import check_unread, is_empty_value, modality_of_file
from mmtune.recipe.yaml_lines import read_document
from mmtune.utils.errors import UserError, nearest
from mmtune.utils.hub import missing_path_message
from mmtune.utils.shipped import shipped_dir

ROLES = ("system", "user", "assistant")
_IN_CONVERSATIONS = ("images", "videos", "audio", "placeholder")
_IN_MESSAGES = ("join", "values", "repeat", "options", "verbalizer", "boxes", "references")


class Join(TemplateSection):
    """Each row's partner in another list, which Jinja reads as `joined`."""

    by: str = Field(description="The row's field that names its partner.")
    to: str | None = Field(default=None, description="The partner's field of the same value; null: named as `by`.")
    rows: str | None = Field(default=None, description="Where the partner's file holds its list, as `rows` of the template.")
    same_file: bool = Field(
        default=False, description="The list is in the rows' own file; otherwise the source names one, `join`."
    )


class DataTemplate(TemplateSection):
    """One data template. Exactly one of `conversation` and `messages` is given."""

    description: str
    rows: str | None = Field(
        default=None, description="Where a JSON file holds its rows: a key, or '*' for an object of rows by key; null: a list."
    )
    join: Join | None = None
    conversation: Conversation | None = None
    images: str | tuple[str, ...] | None = Field(
        default=None, description="The row's field with one image, or a list of them; of several fields a row has one."
    )
    videos: str | None = Field(default=None, description="The row's field with one video, or a list of them.")
    audio: str | None = Field(default=None, description="The row's field with one sound, or a list of them.")
    placeholder: str = Field(
        default=PLACEHOLDERS["image"], min_length=1, description="What stands in a turn's text where an image goes."
    )
    messages: tuple[TurnTemplate, ...] = ()
    values: dict[str, str] = Field(
        default_factory=dict, description="Names that Jinja can read besides the row's, with values that a source can replace."
    )
    repeat: dict[str, str] = Field(default_factory=dict, description="Name to the row's list whose items it takes in turn.")
    leave_out_empty: str | None = Field(
        default=None, description="The row's list without which there is nothing to learn: rows where it is empty are left out."
    )
    options: Options | None = None
    verbalizer: Verbalizer | None = None
    boxes: BoxDeclaration | None = None
    references: str | None = Field(default=None, description="Jinja: the list of all accepted answers.")
    task: str | None = Field(default=None, description="The row's field that names its task, if it has one; a.b is b inside a.")
    ignore: tuple[str, ...] = Field(
        default=(), description="The row's fields that name media too and are left alone; any other that is not read is an error."
    )
    example: dict[str, Any] = Field(description="A row in this format; `--rehearse` and the tests use it.")

    @model_validator(mode="after")
    def _one_form(self) -> DataTemplate:
        if (self.conversation is None) == (not self.messages):
            raise ValueError("give exactly one of 'conversation' and 'messages'")
        form, other = ("messages", _IN_CONVERSATIONS) if self.messages else ("conversation", _IN_MESSAGES)
        for name in other:
            if name in self.model_fields_set:
                raise ValueError(f"'{name}' means nothing beside '{form}'")
        roles = self.conversation.roles.values() if self.conversation else [turn.role for turn in self.messages]
        for role in roles:
            if role not in ROLES:
                raise ValueError(f"'{role}' is no role; roles are {', '.join(ROLES)}")
        if self.options is not None and self.verbalizer is not None:
            raise ValueError("give one of 'options' and 'verbalizer'")
        partner = self.example.get("joined")
        if self.join is not None and (not isinstance(partner, dict) or (self.join.to or self.join.by) not in partner):
            raise ValueError("the example of a template with a join holds its partner under 'joined'")
        if self.references is not None:
            check_jinja(self.references)
        return self

    def sample(
        self,
        row_id: str,
        row: Row,
        rules: MediaRules,
        prompting: PromptSettings = DEFAULT_PROMPT_SETTINGS,
        settings: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    ) -> Sample:
        """Turn a row into messages and check what can be checked without decoding an image.

        Args:
            row_id: names the row in errors, and settles its draws.
            row: with its partner under `joined`, where the template has a join.
            rules: which media the row may name.
            prompting: what the recipe's source adds.
            settings: how it shows images.

        Raises:
            RowError: a missing field, an unknown speaker, turns out of order, an empty answer, an image that is missing or
                outside the media root, not as many images as placeholders, a box outside the image, or one in a text that
                `settings` would leave behind.
        """
        row = self.unpacked(row_id, row)
        read = self.fields_read | prompting.ignore | {*self.ignore, *ID_FIELDS}
        check_unread(row_id, "", row, read, self._advice, provenance=True)
        choices: tuple[str, ...] = ()
        references: tuple[str, ...] = ()
        if self.conversation:
            check_no_row_weights(row_id, row, read)
            fields = {kind: names for kind, names in self._media_fields().items() if names}
            messages = self.conversation.messages(row_id, row, rules, fields, self.placeholder, prompting.add_images)
        else:
            messages, choices, references = self.columns().messages(row_id, row, rules, prompting, settings)
        if not any(map(has_media, messages)):
            check_unread(row_id, "", row, read, self._advice)
        if self.boxes is None:
            settings.shown(row_id, messages)
        if prompting.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompting.system}]})
        _check_turns(row_id, messages)
        return Sample(row_id, messages, task=self._task(row_id, row), choices=choices, references=references)

    @cached_property
    def fields_read(self) -> frozenset[str]:
        """The fields of a row that are read, those of the template's own names (`joined`) among them."""
        named = [*chain.from_iterable(self._media_fields().values()), self.task, *self.repeat.values()]
        written = [self.references or ""]
        if self.conversation is not None:
            named += self.conversation.fields
        if self.join is not None:
            named.append(self.join.by)
        for turn in self.messages:
            written += [*turn.images, *turn.videos, *turn.audio, *turn.text]
        if self.options is not None:
            written += [self.options.choices, self.options.answer]
        if self.verbalizer is not None:
            written.append(self.verbalizer.label)
        if self.boxes is not None:
            written.append(self.boxes.value)
        in_jinja = {name for source in written for name in names_read(source)}
        return frozenset(in_jinja | {name.split(".")[0] for name in named if name})

    def unpacked(self, row_id: str, row: Row) -> Row:
        """A shard's row with a conversation in its `json` member: that object as the row, with the shard's media.

        A medium that the object names is the member of that name. Where no name is a member's, the members come in the order of
        their names. Any other row is returned as it is.

        Raises:
            RowError: when the object names more media of a kind than there are members, or fewer, or only some members.
        """
        inner = row.get("json")
        if self.conversation is None or not isinstance(inner, dict) or self.conversation.fields & row.keys():
            return row
        members = {name: value for name, value in row.items() if name != "json" and name not in inner}
        whole = {**inner, **members}
        for kind, fields in self._media_fields().items():
            own = {
                name: value
                for name, value in members.items()
                if isinstance(value, EmbeddedMedia) and modality_of_file(value.name) == kind
            }
            if not own or not fields:
                continue
            field = next((name for name in fields if not is_empty_value(inner.get(name))), fields[0])
            whole = {name: value for name, value in whole.items() if name not in own}
            whole[field] = _members_in_order(row_id, field, inner.get(field), own)
        return whole

    @cached_property
    def _advice(self) -> str:
        """What to do about media that the template does not read."""
        reads = ", ".join(chain.from_iterable(self._media_fields().values()))
        fields = ", ".join(sorted(self.fields_read))
        fix = f"the template reads {f'media in {reads}' if reads else f'the fields {fields}'}; rename the key"
        return f"{fix}, or list it under the source's `ignore`"

    def _media_fields(self) -> dict[str, tuple[str, ...]]:
        declared = {"image": self.images, "video": self.videos, "audio": self.audio}
        return {kind: () if names is None else (names,) if isinstance(names, str) else names for kind, names in declared.items()}

    def columns(self) -> ColumnTemplate:
        """What a template without a conversation says, apart from the rest."""
        return ColumnTemplate(self.messages, self.values, self.repeat, self.options, self.verbalizer, self.boxes, self.references)

    def undeclared_boxes(self) -> str | None:
        """A column with a box's name that a text reads as it is; None where there is none, or the template declares boxes."""
        read = {name for turn in self.messages for text in turn.text for name in names_read(text)}
        return next((name for name in BOX_FIELDS if name in read and self.boxes is None), None)

    def _task(self, row_id: str, row: Row) -> str | None:
        value = lookup(row, self.task) if self.task else None
        if value is not None and not isinstance(value, (str, int, float)):
            raise RowError(row_id, str(self.task), f"expected a task's name, found {type(value).__name__}", "field_type")
        return None if value is None else str(value)


def lookup(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field, `a.b` for the field `b` of the object in field `a`; None where there is none."""
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_turns(row_id: str, messages: list[Message]) -> None:
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowError(row_id, "messages", "a system message comes first or not at all", "role_order")
    if not spoken or spoken[0] != "user" or any(a == b for a, b in pairwise(spoken)):
        raise RowError(
            row_id, "messages", f"turns alternate from user to assistant, found {', '.join(spoken) or 'none'}", "role_order"
        )
    if "assistant" in spoken and not any(map(is_supervised, messages)):
        raise RowError(row_id, "messages", "every answer has weight 0, so that none trains", "nothing_supervised")
    if spoken[-1] != "assistant":
        raise RowError(
            row_id,
            "messages",
            "no answer: the last turn is the user's",
            "answer_missing" if "assistant" in spoken else "nothing_supervised",
        )
    for number, message in enumerate(messages):
        media = [block["type"] for block in message["content"] if block["type"] != "text"]
        if message["role"] == "assistant" and not any(b["type"] == "text" and b["text"].strip() for b in message["content"]):
            raise RowError(row_id, f"messages[{number}]", "the answer is empty", "answer_empty")
        if message["role"] == "assistant" and media:
            raise RowError(row_id, f"messages[{number}]", f"an answer cannot hold {_with_article(media[0])}", "image_in_answer")


def _members_in_order(row_id: str, field: str, named: Any, members: Mapping[str, EmbeddedMedia]) -> list[EmbeddedMedia]:
    """A row's members of one kind in the order of the media that its `json` names.

    Args:
        row_id: of the row.
        field: of the `json` member, which names the media.
        named: its value: a path, a list of paths, or nothing.
        members: of the shard, by their keys.

    Raises:
        RowError: a count that differs, a path that names no member where another does, or a member that none names.
    """
    if is_empty_value(named):
        return [members[key] for key in sorted(members, key=_by_number)]
    paths = [item.get("path") if isinstance(item, Mapping) else item for item in (named if isinstance(named, list) else [named])]
    keys = [next((key for key in members if _names_member(path, key, members[key])), None) for path in paths]
    listed = ", ".join(members)
    if any(key is not None for key in keys):
        if None in keys:
            detail = f"`json` names {str(paths[keys.index(None)])[:100]!r}, which is not a member of the shard's row ({listed})"
            raise RowError(row_id, field, detail, "media_missing")
        if unnamed := [key for key in members if key not in keys]:
            detail = f"the member {unnamed[0]} of the shard's row is not named in `json`, and {keys[0]} is"
            raise RowError(row_id, field, detail, "placeholder_count")
        return [members[key] for key in keys if key is not None]
    if len(paths) != len(members):
        detail = f"{len(paths)} in `json` and {len(members)} members of the shard ({listed})"
        raise RowError(row_id, field, detail, "placeholder_count")
    return [members[key] for key in sorted(members, key=_by_number)]


def _names_member(path: Any, key: str, member: EmbeddedMedia) -> bool:
    """Whether a path ends in the key or the name of a member."""
    if not isinstance(path, str):
        return False
    ending = f"/{path}".replace("\\", "/").lower()
    return any(ending.endswith(f"/{name}".lower()) for name in (key, member.name, PurePosixPath(member.name).name))


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _with_article(kind: str) -> str:
    return "audio" if kind == "audio" else f"an {kind}" if kind == "image" else f"a {kind}"


def shipped_templates() -> dict[str, Path]:
    """The shipped data templates by name (the file's name without `.yaml`), in the order of their names."""
    return {file.stem: file for file in sorted(shipped_dir("data_templates").glob("*.yaml"))}


def load_data_template(name: str) -> DataTemplate:
    """A shipped template by its name, or one of your own by the path of its YAML file.

    Raises:
        UserError: for an unknown name or a file that is not a data template, with each of its faults on a line.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(missing_path_message(name, "data template"))
    else:
        shipped = shipped_templates()
        if name not in shipped:
            raise UserError(f"data template '{name}' is not one of those that ship{nearest(name, set(shipped))}")
        path = shipped[name]
    document = read_document(path, "data template", "description, conversation or messages, example")
    template = None
    try:
        template = DataTemplate.model_validate(document.values)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(map(str, detail["loc"])) or "data template"
            document.report(key, _message(detail["type"], detail["loc"], detail["msg"]))
    document.raise_problems()
    assert template is not None
    return template


def _message(kind: str, where: tuple[int | str, ...], message: str) -> str:
    """What pydantic found wrong with a key, in the words of recipes."""
    if kind == "missing":
        return "required, and not given"
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(where[0]), set(DataTemplate.model_fields)) if len(where) == 1 else ''}"
    return message.removeprefix("Value error, ")
