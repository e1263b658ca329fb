"""Data templates: YAML files that define how rows of a format become typed messages.

A template either names the fields that contain a conversation (`conversation`), or writes the messages from the row's columns
(`messages`, in sandboxed Jinja). `docs/data_templates.md` documents the format; `data_templates/` has the shipped templates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from mmtune.data.media.image_settings import DEFAULT_IMAGE_SETTINGS, ImageSettings
from mmtune.data.media.media import EmbeddedMedia, MediaRules
from mmtune.data.message import Message, RowError, Sample, has_media, is_supervised, text_message, text_of
from mmtune.data.sources.rows import ID_FIELDS, Row
from mmtune.data.templates.columns import ColumnTemplate, TurnTemplate
from mmtune.data.templates.conversation import Conversation, check_no_row_weights
from mmtune.data.templates.expressions import TemplateSection, check_jinja, has_filter, is_jinja, names_read, render_expression
from mmtune.data.templates.prompts import DEFAULT_PROMPT_SETTINGS, Options, PromptSettings, Verbalizer
from mmtune.data.templates.region_declaration import BoxDeclaration, PointDeclaration, QuadDeclaration, RegionDeclaration
from mmtune.data.templates.regions import BOX_FIELDS
from mmtune.data.templates.row_media import PLACEHOLDERS
from mmtune.data.templates.tool_turns import check_result_ids, read_tools
from mmtune.data.templates.unread_media import check_unread, is_empty_value, modality_of_file
from mmtune.families.box_convention import RegionKind
from mmtune.recipe.yaml_lines import read_document
from mmtune.utils.errors import UserError, nearest
from mmtune.utils.hub import missing_path_message
from mmtune.utils.shipped import shipped_dir, yaml_files

ROLES = ("system", "user", "assistant")
CONVERSATION_ROLES = (*ROLES, "tool", "tool_call")
"""What a conversation's `roles` can name: also tool results, and turns whose text is tool calls."""

_OBJECTS_IN_TEXT = re.compile("<bbox>|<ref-object>")
"""Where ms-swift writes the values of a row's `objects` into a text."""

_NEXT_ROLES = {"user": ("assistant", "tool_call"), "assistant": ("user",), "tool_call": ("tool",)}
_NEXT_ROLES["tool"] = ("tool", "assistant", "tool_call")
UNANSWERED = "?"
"""The text of the placeholder answer of a question without one."""
_IN_CONVERSATIONS = ("images", "videos", "audio", "placeholder")
_IN_MESSAGES = ("join", "values", "repeat", "options", "verbalizer", "boxes", "points", "quads", "references")


class Join(TemplateSection):
    """A join: each row with the matching row of another list, which Jinja reads as `joined`."""

    by: str = Field(description="The row's field with the join key.")
    to: str | None = Field(default=None, description="The other list's field with the same value; null: the same name as `by`.")
    rows: str | None = Field(default=None, description="Location of the other list in its file, like `rows` of the template.")
    same_file: bool = Field(
        default=False, description="Whether the other list is in the same file; otherwise the source names its file in `join`."
    )


class DataTemplate(TemplateSection):
    """A data template. Exactly one of `conversation` and `messages` is set."""

    description: str
    rows: str | None = Field(
        default=None,
        description="Location of the rows in a JSON file: a key, or '*' for an object with a row under every key; null: a list.",
    )
    join: Join | None = None
    conversation: Conversation | None = None
    images: str | tuple[str, ...] | None = Field(
        default=None, description="The row's field with an image or a list of images; of several fields, each row uses one."
    )
    videos: str | None = Field(default=None, description="The row's field with a video or a list of videos.")
    audio: str | None = Field(default=None, description="The row's field with an audio clip or a list of clips.")
    placeholder: str = Field(
        default=PLACEHOLDERS["image"], min_length=1, description="The placeholder for an image in a turn's text."
    )
    messages: tuple[TurnTemplate, ...] = ()
    values: dict[str, str] = Field(
        default_factory=dict, description="More Jinja variables besides the row's columns; a source can replace their values."
    )
    repeat: dict[str, str] = Field(
        default_factory=dict, description="Jinja variable to the row's list; the messages are repeated for each item."
    )
    leave_out_empty: str | None = Field(
        default=None, description="The row's list that must have items: rows with an empty list are skipped."
    )
    options: Options | None = None
    verbalizer: Verbalizer | None = None
    boxes: BoxDeclaration | None = None
    points: PointDeclaration | None = None
    quads: QuadDeclaration | None = None
    references: str | None = Field(
        default=None, description="Jinja: the list of all accepted answers; an answer of several people several times."
    )
    metric: str | None = Field(
        default=None, description="The metric of an evaluation on these rows, where the recipe names none; null: exact_match."
    )
    task: str | None = Field(
        default=None, description="The row's field with the name of its task; a.b is b inside a; or Jinja for the name."
    )
    cluster: str | None = Field(
        default=None,
        description="The row's field with the document that it is about; null: questions on one image belong together.",
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="The row's fields that refer to media and are not used; any other unread media field is an error."
    )
    example: dict[str, Any] = Field(description="A row in this format, for `--rehearse` and the tests.")

    _awaits_answer: bool = PrivateAttr(default=False)

    def awaiting_answer(self, changes: Mapping[str, Any]) -> DataTemplate:
        """A copy with changed sections, for rows whose last answer may be missing: each sample ends with a placeholder answer."""
        copy = self.model_copy(update=changes)
        copy._awaits_answer = True
        return copy

    @model_validator(mode="after")
    def _one_form(self) -> DataTemplate:
        if (self.conversation is None) == (not self.messages):
            raise ValueError("set exactly one of 'conversation' and 'messages'")
        form, other = ("messages", _IN_CONVERSATIONS) if self.messages else ("conversation", _IN_MESSAGES)
        for name in other:
            if name in self.model_fields_set:
                raise ValueError(f"'{name}' cannot be used with '{form}'; remove it")
        roles = self.conversation.roles.values() if self.conversation else [turn.role for turn in self.messages]
        known_roles = CONVERSATION_ROLES if self.conversation else ROLES
        for role in roles:
            if role not in known_roles:
                raise ValueError(f"unknown role '{role}'; expected one of {', '.join(known_roles)}")
        if self.options is not None and self.verbalizer is not None:
            raise ValueError("set only one of 'options' and 'verbalizer'")
        joined = self.example.get("joined")
        if self.join is not None and (not isinstance(joined, dict) or (self.join.to or self.join.by) not in joined):
            raise ValueError("a template with a join needs the joined row in its example, under 'joined'")
        for source in (self.references, self.task if is_jinja(self.task or "") else None):
            if source is not None:
                check_jinja(source)
        return self

    def sample(
        self,
        row_id: str,
        row: Row,
        rules: MediaRules,
        prompting: PromptSettings = DEFAULT_PROMPT_SETTINGS,
        settings: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    ) -> Sample:
        """Convert a row to a sample, and check it without decoding any image.

        Args:
            row_id: the row's id, for errors and for the seed of its random draws.
            row: the row, with the joined row under `joined` if the template has a join.
            rules: which files and URLs the row may use.
            prompting: the source's prompt settings.
            settings: the source's image settings.

        Raises:
            RowError: a missing field, an unknown role, turns out of order, an empty answer, a tool call or schema that is not
                valid, an image that is missing or outside the media root, different numbers of images and placeholders, a region
                outside the image, or a box in a text that `settings` does not transform with the image.
        """
        row = self.unpack_shard_row(row_id, row)
        read = self.fields_read | prompting.ignore | {*self.ignore, *ID_FIELDS}
        check_unread(row_id, "", row, read, self._advice, provenance=True)
        answers: dict[str, Any] = {}
        tools: tuple[dict[str, Any], ...] = ()
        if self.conversation:
            check_no_row_weights(row_id, row, read)
            fields = {modality: names for modality, names in self._media_fields().items() if names}
            awaits = self._awaits_answer
            messages = self.conversation.messages(row_id, row, rules, fields, self.placeholder, prompting.add_images, awaits)
            _check_objects(row_id, row, messages)
            if awaits:
                messages = [*messages[: -1 if messages[-1]["role"] == "assistant" else None], unanswered_turn()]
            if self.conversation.tools is not None:
                tools = read_tools(row_id, self.conversation.tools, row.get(self.conversation.tools))
        else:
            messages, answers = self.columns().messages(row_id, row, rules, prompting, settings)
        if not any(map(has_media, messages)):
            check_unread(row_id, "", row, read, self._advice)
        if not self.regions:
            settings.apply_to_messages(row_id, messages)
        if prompting.system is not None and messages[0]["role"] != "system":
            messages.insert(0, text_message("system", prompting.system))
        _check_turns(row_id, messages)
        if self.task is not None and is_jinja(self.task):
            task: str | None = render_expression(row_id, "task", self.task, row, row)
        else:
            task = name_in(row_id, row, self.task)
        return Sample(row_id, messages, task=task, cluster=name_in(row_id, row, self.cluster), tools=tools, **answers)

    @cached_property
    def fields_read(self) -> frozenset[str]:
        """The fields of a row that the template reads, including `joined`."""
        field_names = [*chain.from_iterable(self._media_fields().values()), self.cluster, *self.repeat.values()]
        jinja_sources = [self.references or ""]
        (jinja_sources if is_jinja(self.task or "") else field_names).append(self.task or "")
        if self.conversation is not None:
            field_names += self.conversation.fields
        if self.join is not None:
            field_names.append(self.join.by)
        for turn in self.messages:
            jinja_sources += [*turn.images, *turn.videos, *turn.audio, *turn.text]
        if self.options is not None:
            jinja_sources += [self.options.choices, self.options.answer]
        if self.verbalizer is not None:
            jinja_sources.append(self.verbalizer.label)
        in_jinja = {name for source in jinja_sources for name in names_read(source)}
        in_jinja |= {name for section in self.regions.values() for name in section.names_read}
        return frozenset(in_jinja | {name.split(".")[0] for name in field_names if name})

    def unpack_shard_row(self, row_id: str, row: Row) -> Row:
        """For a shard's row with a conversation in its `json` member: that object as the row, with the shard's media.

        File names in the object refer to the members of the same name. If no file name matches a member, the members are used in
        the order of their names. Any other row is returned unchanged.

        Raises:
            RowError: the object refers to more or fewer files of a modality than there are members, or only to some members.
        """
        inner = row.get("json")
        if self.conversation is None or not isinstance(inner, dict) or self.conversation.fields & row.keys():
            return row
        members = {name: value for name, value in row.items() if name != "json" and name not in inner}
        unpacked = {**inner, **members}
        for modality, fields in self._media_fields().items():
            media = {
                name: value
                for name, value in members.items()
                if isinstance(value, EmbeddedMedia) and modality_of_file(value.name) == modality
            }
            if not media or not fields:
                continue
            field = next((name for name in fields if not is_empty_value(inner.get(name))), fields[0])
            unpacked = {name: value for name, value in unpacked.items() if name not in media}
            unpacked[field] = _members_in_order(row_id, field, inner.get(field), media)
        return unpacked

    @cached_property
    def _advice(self) -> str:
        """How to fix media that the template does not read."""
        reads = ", ".join(chain.from_iterable(self._media_fields().values()))
        fields = ", ".join(sorted(self.fields_read))
        read = f"media in {reads}" if reads else f"the fields {fields}"
        return f"the template reads {read}; rename the key, or add it to the source's `ignore`"

    def _media_fields(self) -> dict[str, tuple[str, ...]]:
        """The row's media fields by modality."""
        fields = {"image": self.images, "video": self.videos, "audio": self.audio}
        return {modality: (names,) if isinstance(names, str) else (names or ()) for modality, names in fields.items()}

    def columns(self) -> ColumnTemplate:
        """The column template of a data template without `conversation`."""
        return ColumnTemplate(
            self.messages, self.values, self.repeat, self.options, self.verbalizer, self.regions, self.references
        )

    @property
    def regions(self) -> dict[str, RegionDeclaration]:
        """The declared boxes, points and quadrilaterals, by the name of their section."""
        sections = {"boxes": self.boxes, "points": self.points, "quads": self.quads}
        return {name: section for name, section in sections.items() if section is not None}

    @property
    def native_kinds(self) -> list[RegionKind]:
        """The kinds of declared regions, if a text has regions in the convention of the model's family; else none."""
        is_native = any(has_filter(text, "native") for turn in self.messages for text in turn.text)
        return [section.kind for section in self.regions.values()] if is_native else []

    def undeclared_boxes(self) -> str | None:
        """A column with the name of a box that a text reads unchanged; None if none, or the template declares regions."""
        read = {name for turn in self.messages for text in turn.text for name in names_read(text)}
        return next((name for name in BOX_FIELDS if name in read and not self.regions), None)


def _check_objects(row_id: str, row: Row, messages: list[Message]) -> None:
    """Check that no text of a conversation has a place for the row's boxes, which would be trained as it is spelled."""
    places = [place[0] for message in messages if (place := _OBJECTS_IN_TEXT.search(text_of(message)))]
    if places and row.get("objects"):
        detail = f"the text has {places[0]}, the place of a value of `objects`, which the data template does not fill"
        raise RowError(row_id, "objects", detail, "box_placeholder")


def lookup(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field, where `a.b` is the field `b` of the object in field `a`; None if there is no such field."""
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def name_in(row_id: str, row: Mapping[str, Any], field: str | None) -> str | None:
    """The value of a field as text, as by `lookup`; None without a field.

    Raises:
        RowError: a value that is not a text or a number.
    """
    value = lookup(row, field) if field else None
    if value is not None and not isinstance(value, (str, int, float)):
        raise RowError(row_id, str(field), f"expected a text or a number, got {type(value).__name__}", "field_type")
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


def unanswered_turn() -> Message:
    """The placeholder answer of a question without one."""
    return text_message("assistant", UNANSWERED)


def _check_turns(row_id: str, messages: list[Message]) -> None:
    roles = ["tool_call" if "tool_calls" in message else message["role"] for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[1:]):
        raise RowError(row_id, "messages", "expected a system message only as the first message", "role_order")
    if not roles or roles[0] != "user" or any(after not in _NEXT_ROLES[role] for role, after in pairwise(roles)):
        detail = "expected turns that alternate between user and assistant"
        if "tool_call" in roles or "tool" in roles:
            detail += ", and after a tool call its results, then the assistant"
        raise RowError(row_id, "messages", f"{detail}, got {', '.join(roles) or 'none'}"[:600], "role_order")
    check_result_ids(row_id, messages)
    has_answer = "assistant" in roles or "tool_call" in roles
    if has_answer and not any(map(is_supervised, messages)):
        raise RowError(row_id, "messages", "every answer has weight 0, so the row has no supervised token", "nothing_supervised")
    if roles[-1] not in ("assistant", "tool_call"):
        raise RowError(
            row_id,
            "messages",
            f"expected an answer as the last turn, got a turn of the {roles[-1]}",
            "answer_missing" if has_answer else "nothing_supervised",
        )
    for number, message in enumerate(messages):
        media = [block["type"] for block in message["content"] if block["type"] != "text"]
        if message["role"] == "assistant" and "tool_calls" not in message and not text_of(message).strip():
            raise RowError(row_id, f"messages[{number}]", "the answer is empty", "answer_empty")
        if message["role"] == "assistant" and media:
            detail = f"expected only text in an answer, got {_with_article(media[0])}"
            raise RowError(row_id, f"messages[{number}]", detail, "image_in_answer")


def _members_in_order(row_id: str, field: str, references: Any, members: Mapping[str, EmbeddedMedia]) -> list[EmbeddedMedia]:
    """The members of one modality of a shard's row, in the order of the file names in its `json` member.

    Args:
        row_id: the row's id.
        field: the field of the `json` member with the file names.
        references: the field's value: a path, a list of paths, or an empty value.
        members: the shard's members by extension.

    Raises:
        RowError: the numbers differ, or only some paths match a member, or a member is not referenced.
    """
    if is_empty_value(references):
        return [members[key] for key in sorted(members, key=_numeric_order)]
    items = references if isinstance(references, list) else [references]
    paths = [item.get("path") if isinstance(item, Mapping) else item for item in items]
    keys = [next((key for key in members if _refers_to_member(path, key, members[key])), None) for path in paths]
    available = ", ".join(members)
    if any(key is not None for key in keys):
        if None in keys:
            path = str(paths[keys.index(None)])[:100]
            detail = f"`json` refers to {path!r}, which is not a member of the shard's row ({available})"
            raise RowError(row_id, field, detail, "media_missing")
        if unreferenced := [key for key in members if key not in keys]:
            detail = f"`json` refers to the member {keys[0]} of the shard's row, but not to {unreferenced[0]}"
            raise RowError(row_id, field, detail, "placeholder_count")
        return [members[key] for key in keys if key is not None]
    if len(paths) != len(members):
        detail = f"expected as many files in `json` as members of the shard, got {len(paths)} and {len(members)} ({available})"
        raise RowError(row_id, field, detail, "placeholder_count")
    return [members[key] for key in sorted(members, key=_numeric_order)]


def _refers_to_member(path: Any, key: str, member: EmbeddedMedia) -> bool:
    """Whether a path ends in the key or the name of a member."""
    if not isinstance(path, str):
        return False
    ending = f"/{path}".replace("\\", "/").lower()
    return any(ending.endswith(f"/{name}".lower()) for name in (key, member.name, PurePosixPath(member.name).name))


def _numeric_order(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _with_article(modality: str) -> str:
    return {"image": "an image", "video": "a video"}.get(modality, modality)


def shipped_templates() -> dict[str, Path]:
    """The shipped data templates by name, as `yaml_files`."""
    return yaml_files(shipped_dir("data_templates"))


def load_data_template(name: str) -> DataTemplate:
    """Load a shipped template by its name, or another one by the path of its YAML file, which can also be an evaluation task.

    Raises:
        UserError: an unknown name, or a file that is not a valid data template, with one problem per line.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UserError(missing_path_message(name, "data template"))
    else:
        shipped = shipped_templates()
        if name not in shipped:
            raise UserError(
                f"unknown data template '{name}'; expected a shipped one or a .yaml file{nearest(name, set(shipped))}"
            )
        path = shipped[name]
    document = read_document(path, "data template", "description, conversation or messages, example")
    values, above = document.values, ""
    if isinstance(values.get("template"), dict):  # the file of a task, which has its template inside
        values, above = {"description": values.get("description"), **values["template"]}, "template."
    template = None
    try:
        template = DataTemplate.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            key = above + (".".join(map(str, detail["loc"])) or "data template")
            document.report(key, _message(detail["type"], detail["loc"], detail["msg"]))
    document.raise_problems()
    assert template is not None
    return template


def _message(error_type: str, where: tuple[int | str, ...], message: str) -> str:
    """The message for a validation error of pydantic, in the style of recipe errors."""
    if error_type == "missing":
        return "required key is missing"
    if error_type == "extra_forbidden":
        return f"unknown key{nearest(str(where[0]), set(DataTemplate.model_fields)) if len(where) == 1 else ''}"
    return message.removeprefix("Value error, ")
