"""Rows that hold a conversation: turns with placeholders, or with typed blocks, become messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from mmtune.data.media.media import Media, MediaRules, resolve_media
from mmtune.data.message import Message, RowError, has_media
from mmtune.data.templates.expressions import TemplateSection
from mmtune.data.templates.unread_media import check_unread, is_empty_value
from mmtune.data.validation.issues import issue_type_of
from mmtune.utils.errors import nearest

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""What stands in a turn's text where a medium goes. A template may name another one for images."""

TURN_MEDIA = {"image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio")}
"""A turn's keys for media of its own."""

WEIGHTS = ("weight", "loss", "loss_scale", "train", "training")
"""A turn's keys that take it out of the loss: OpenAI's `weight`, ms-swift's `loss` and `loss_scale`, axolotl's `train`."""

OTHER_WEIGHTS = ("train_detail", "loss_mask")
"""Keys of a turn or a row that weigh parts of an answer, or all turns in one list."""

SPEAKER = "name"
"""A turn's key with the name of its speaker, in OpenAI's format. It is not read and may look like a file's name."""


class Conversation(TemplateSection):
    """Where a row keeps its turns: as one list, or as a question and its answer."""

    field: str | None = Field(default=None, description="The row's field that holds the list of turns.")
    question: str | None = Field(
        default=None, description="Instead of `field`: the row's field with what comes before the answer, a text or turns."
    )
    answer: str | None = Field(default=None, description="With `question`: the row's field with the answer, a text or turns.")
    history: str | None = Field(
        default=None, description="With `question`: the row's field with earlier turns, pairs of a question and an answer."
    )
    role: str = Field(default="role", description="The turn's key that names the speaker.")
    text: str = Field(default="content", description="The turn's key that holds the text, or a list of typed blocks.")
    roles: dict[str, str] = Field(
        default_factory=lambda: {"user": "user", "assistant": "assistant", "system": "system"},
        description="Speaker name to user, assistant or system.",
    )
    system: str | None = Field(default=None, description="The row's field with a system prompt, if it has one.")
    joined_by_space: bool = Field(
        default=False,
        description="With `question`: a text `question` and a text `answer` are parts of one text, with ' ' between where the "
        "answer begins with it. That space is left out of the answer.",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Conversation:
        if (self.field is None) == (self.question is None) or (self.question is None) != (self.answer is None):
            raise ValueError("give either 'field', or 'question' and 'answer'")
        if self.history is not None and self.question is None:
            raise ValueError("'history' means nothing beside 'field'")
        if self.joined_by_space and self.question is None:
            raise ValueError("'joined_by_space' means nothing beside 'field'")
        return self

    @property
    def fields(self) -> set[str]:
        """The row's fields that are read."""
        return {name for name in (self.field, self.question, self.answer, self.history, self.system) if name is not None}

    def messages(
        self,
        row_id: str,
        row: Mapping[str, Any],
        rules: MediaRules,
        fields: Mapping[str, tuple[str, ...]],
        placeholder: str,
        add_images: bool = False,
    ) -> list[Message]:
        """The row's turns, each medium where its placeholder or block is.

        Args:
            row_id: of the row.
            row: holds the turns.
            rules: what media it may name.
            fields: `image`, `video` or `audio` to the row's fields that may hold the media of that kind, of which a row has one.
            placeholder: stands for an image.
            add_images: put the images of a row without any placeholder at the start of the first user turn.

        Raises:
            RowError: a missing field, an unknown speaker, media that are not there or not read, more or fewer than placeholders,
                or a weight of a turn that is neither 0 nor 1.
        """
        media = _RowMedia(row_id, row, rules, fields, PLACEHOLDERS | {"image": placeholder})
        messages = self._system(row_id, row)
        read = {self.role, self.text, SPEAKER, *_OWN_MEDIA}
        advice = "media of a turn are read from images, videos, audios; rename the key"
        for turn in self._turns(row_id, row):
            trains = _trains(row_id, turn)
            message: Message = {"role": turn.role, "content": media.content(turn)}
            check_unread(row_id, turn.where, turn.keys, read, advice, provenance=has_media(message))
            messages.append(message if trains else message | {"supervised": False})
        media.check(self.field or str(self.question), messages if add_images else None)
        return messages

    def _turns(self, row_id: str, row: Mapping[str, Any]) -> Iterator[_Turn]:
        if self.field is not None:
            yield from self._listed(
                row_id, self.field, row.get(self.field), "expected a list of turns" + missing_field_hint(row, self.field), row
            )
            return
        question, answer = (_present(row_id, row, str(name)) for name in (self.question, self.answer))
        for number, pair in enumerate(self._history(row_id, row)):
            where = f"{self.history}[{number}]"
            yield _Turn(where, "user", pair[0])
            yield _Turn(where, "assistant", pair[1])
        if self.joined_by_space and isinstance(question, str) and isinstance(answer, str):
            answer = _without_joint(question, answer)
        expected = "expected a text or a list of turns"
        if isinstance(question, str):
            yield _Turn(str(self.question), "user", question)
        else:  # what the answers in a question say is context: the answer is what trains
            turns = self._listed(row_id, str(self.question), question, expected, row)
            yield from (turn._replace(trains=turn.role != "assistant") for turn in turns)
        if isinstance(answer, str):
            yield _Turn(str(self.answer), "assistant", answer)
        else:
            yield from self._listed(row_id, str(self.answer), answer, expected, row)

    def _listed(self, row_id: str, name: str, turns: Any, expected: str, row: Mapping[str, Any]) -> Iterator[_Turn]:
        if not isinstance(turns, list) or not turns:
            raise RowError(row_id, name, expected, "field_type" if name in row else "field_missing")
        for number, turn in enumerate(turns):
            where = f"{name}[{number}]"
            if not isinstance(turn, dict) or self.role not in turn or self.text not in turn:
                raise RowError(row_id, where, f"expected an object with '{self.role}' and '{self.text}'", "field_missing")
            speaker = turn[self.role]
            if not isinstance(speaker, str) or speaker not in self.roles:
                hint = nearest(str(speaker)[:100], set(self.roles))
                raise RowError(row_id, f"{where}.{self.role}", f"unknown speaker {speaker!r}"[:200] + hint, "role_unknown")
            yield _Turn(where, self.roles[speaker], turn[self.text], f"{where}.{self.text}", turn)

    def _history(self, row_id: str, row: Mapping[str, Any]) -> list[list[str]]:
        pairs = row.get(self.history) if self.history else None
        if not pairs:
            return []
        for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                detail = f"expected a question and its answer, [text, text], got {pair!r}"[:200]
                raise RowError(row_id, f"{self.history}[{number}]", detail, "field_type")
        return list(pairs)

    def _system(self, row_id: str, row: Mapping[str, Any]) -> list[Message]:
        text = row.get(self.system) if self.system else None
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise RowError(row_id, str(self.system), f"expected text, got {type(text).__name__}", "field_type")
        return [{"role": "system", "content": [{"type": "text", "text": text}]}]


class _Turn(NamedTuple):
    """One turn of a row.

    Attributes:
        where: the part of the row that it is.
        role: user, assistant or system.
        text: a text, or a list of typed blocks.
        at: the part of the row that holds the text; empty where it is `where`.
        keys: the turn as the row has it, for its other keys.
        trains: whether the loss falls on it, where the turn itself says nothing.
    """

    where: str
    role: str
    text: Any
    at: str = ""
    keys: Mapping[str, Any] = {}
    trains: bool = True


_OWN_WEIGHTS = {*WEIGHTS, *OTHER_WEIGHTS}
_OWN_MEDIA = {name for names in TURN_MEDIA.values() for name in names}


def _present(row_id: str, row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(row_id, name, "expected a text or a list of turns" + missing_field_hint(row, name), "field_missing")
    return row[name]


def _without_joint(question: str, answer: str) -> str:
    """An answer without the one space that joins it to a question; deeper indents, and all after white space, are its own."""
    joint = answer[:1] == " " and not answer[1:2].isspace() and question and not question[-1].isspace()
    return answer[1:] if joint else answer


def _trains(row_id: str, turn: _Turn) -> bool:
    """Whether the loss falls on a turn, by its own weight.

    Raises:
        RowError: for a weight that is neither 0 nor 1, two that disagree, or a weight of 1 on a turn that is no answer.
    """
    if _OWN_WEIGHTS.isdisjoint(turn.keys):
        return turn.trains
    _refuse_other_weights(row_id, f"{turn.where}.", turn.keys)
    weights = {name: turn.keys[name] for name in WEIGHTS if turn.keys.get(name) is not None}
    for name, weight in weights.items():
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            detail = f"expected 0, 1, true or false, got {weight!r}"[:200]
            raise RowError(row_id, f"{turn.where}.{name}", detail, "turn_weight")
        if weight and turn.role != "assistant":
            detail = f"{weight!r} asks for loss on a turn of the {turn.role}; loss falls on the assistant's turns only"
            raise RowError(row_id, f"{turn.where}.{name}", detail, "turn_weight")
    if len(set(weights.values())) > 1:
        raise RowError(row_id, turn.where, f"{' and '.join(weights)} disagree", "turn_weight")
    return turn.role != "assistant" or bool(next(iter(weights.values()), turn.trains))


def check_no_row_weights(row_id: str, row: Mapping[str, Any], read: Collection[str]) -> None:
    """Refuse a weight of a whole row: loss falls on turns, each by its own weight.

    Args:
        row_id: of the row.
        row: holds the turns.
        read: the row's fields that are read, or meant to be left out.

    Raises:
        RowError: naming the field and where a weight belongs.
    """
    for name in (*WEIGHTS, *OTHER_WEIGHTS):
        if name not in read and row.get(name) is not None:
            detail = (
                f"a row has no weight; give each of the assistant's turns in a list of turns {WEIGHTS[0]}: 0 or 1, leave the "
            )
            detail += "row out by the source's `where`, or list the field under its `ignore` if it means something else"
            raise RowError(row_id, name, detail, "turn_weight")


def _refuse_other_weights(row_id: str, where: str, keys: Mapping[str, Any]) -> None:
    for name in OTHER_WEIGHTS:
        if keys.get(name) is not None:
            detail = f"cannot be honoured: a turn is in the loss or out of it; give each turn {WEIGHTS[0]}: 0 or 1 instead"
            raise RowError(row_id, f"{where}{name}", detail, "turn_weight")


@dataclass
class _Supply:
    """Media of one kind, taken in order by placeholders and blocks that name none, or by index."""

    media: list[Media]
    asked: int = 0
    indexes: set[int] = field(default_factory=set)

    def take(self) -> Media | None:
        self.asked += 1
        return self.media[self.asked - 1] if self.asked <= len(self.media) else None


class _RowMedia:
    """The media of one row, taken by its placeholders and blocks."""

    def __init__(
        self,
        row_id: str,
        row: Mapping[str, Any],
        rules: MediaRules,
        fields: Mapping[str, tuple[str, ...]],
        placeholders: Mapping[str, str],
    ) -> None:
        self._row_id = row_id
        self._rules = rules
        self._fields = fields
        self._placeholders = placeholders
        self._row = {kind: _Supply([]) for kind in PLACEHOLDERS}
        for kind, names in fields.items():
            self._row[kind] = self._supply("", row, names)
        self._turn: dict[str, _Supply] = {}

    def content(self, turn: _Turn) -> list[dict[str, Any]]:
        """The blocks of one turn. Media of its own stand where its placeholders are, or before its text if it has none."""
        self._turn = {}
        if not _OWN_MEDIA.isdisjoint(turn.keys):
            own = {kind: self._supply(f"{turn.where}.", turn.keys, names) for kind, names in TURN_MEDIA.items()}
            self._turn = {kind: supply for kind, supply in own.items() if supply.media}
        where = turn.at or turn.where
        if isinstance(turn.text, list):
            content = [self._block(f"{where}[{index}]", block) for index, block in enumerate(turn.text)]
        elif not isinstance(turn.text, str):
            raise RowError(self._row_id, where, f"expected text, got {type(turn.text).__name__}", "field_type")
        elif turn.role == "assistant":
            content = [{"type": "text", "text": turn.text}]
        else:
            content = self._split(turn.text)
        for kind, supply in reversed(self._turn.items()):
            if not supply.asked and not supply.indexes:
                content = [*({"type": kind, kind: medium} for medium in supply.media), *content]
            else:
                self._check(turn.where, kind, supply)
        return content

    def check(self, where: str, messages: list[Message] | None) -> None:
        """
        Args:
            where: the field with the turns.
            messages: where to put images that nothing asks for; None: they are an error.

        Raises:
            RowError: when some kind has more media than were asked for, or fewer.
        """
        for kind, supply in self._row.items():
            nowhere = supply.media and not supply.asked and not supply.indexes and kind == "image"
            first = next((message for message in messages or () if message["role"] == "user"), None)
            if nowhere and first is not None:
                first["content"] = [*({"type": kind, kind: medium} for medium in supply.media), *first["content"]]
                continue
            hint = "; `image_placeholder: add` in the source puts them at the start of the first user turn" if nowhere else ""
            self._check(next(iter(self._fields.get(kind, ())), where), kind, supply, hint)

    def _supply(self, where: str, keys: Mapping[str, Any], names: tuple[str, ...]) -> _Supply:
        named = [name for name in names if _values(keys.get(name))]
        if len(named) > 1:
            raise RowError(self._row_id, f"{where}{named[0]}", f"'{named[1]}' is given too; give one of them", "field_type")
        values = _values(keys[named[0]]) if named else []
        return _Supply([resolve_row_media(self._row_id, f"{where}{named[0]}", value, self._rules) for value in values])

    def _check(self, where: str, kind: str, supply: _Supply, hint: str = "") -> None:
        count, several = len(supply.media), kind if kind == "audio" else f"{kind}s"
        if supply.indexes:
            left = sorted(set(range(count)) - supply.indexes)
            if supply.asked or left:
                fault = "some blocks have an index and some do not" if supply.asked else f"no block has index {left[0]}"
                raise RowError(self._row_id, where, f"{count} {several}, and {fault}", "placeholder_count")
        elif count != supply.asked:
            detail = f"{count} {several} for {supply.asked} '{self._placeholders[kind]}' placeholders{hint}"
            raise RowError(self._row_id, where, detail, "placeholder_count")

    def _split(self, text: str) -> list[dict[str, Any]]:
        """Text around placeholders; the line break that sets a placeholder apart belongs to it, not to the text."""
        # A kind that neither the template nor the turn knows of has no placeholder: the text stays text.
        kinds = {self._placeholders[kind]: kind for kind in (*self._fields, *self._turn)}
        if not any(placeholder in text for placeholder in kinds):
            return [{"type": "text", "text": text}] if text else []
        content: list[dict[str, Any]] = []
        pattern = re.compile("|".join(map(re.escape, kinds)))
        pieces, marks = pattern.split(text), pattern.findall(text)
        for number, piece in enumerate(pieces):
            if number > 0:
                content.append(self._next(kinds[marks[number - 1]]))
                piece = piece.removeprefix("\n")
            if number < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                content.append({"type": "text", "text": piece})
        return content

    def _block(self, where: str, block: Any) -> dict[str, Any]:
        """One typed block; a medium that it does not name is one of the row's, by its `index` or the next."""
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            check_unread(self._row_id, where, block, {"type", "text"}, "give the medium a block of its own")
            return {"type": "text", "text": block["text"]}
        kind = str(kind).removesuffix("_url")
        if kind in PLACEHOLDERS:
            names = (kind, f"{kind}_url", "path", "url", "bytes")
            named = [name for name in names if not is_empty_value(block.get(name))]
            if _is_source(block.get("source")):  # Anthropic's
                named.append("source")
            read = {"type", *names, *named}
            advice = f"media of a block are read from {', '.join(names)}"
            check_unread(self._row_id, where, block, read, advice, provenance=bool(named))
            if len(named) > 1 and named != ["path", "bytes"]:
                raise RowError(self._row_id, where, f"both '{named[0]}' and '{named[1]}'; give one of them", "field_type")
            if not named and kind == block["type"]:
                return self._next(kind, where, block.get("index"))
            if not named:
                raise RowError(self._row_id, where, f"expected '{block['type']}' to hold a URL", "field_type")
            value = {"bytes": block["bytes"], "path": block.get("path")} if "bytes" in named else block[named[0]]
            if isinstance(value, dict) and isinstance(value.get("url"), str):  # OpenAI's {"url", "detail"}
                value = value["url"]
            where = f"{where}.source" if named == ["source"] else where
            return {"type": kind, kind: resolve_row_media(self._row_id, where, value, self._rules)}
        raise RowError(self._row_id, where, f"expected a text, image, video or audio block, got {block!r}"[:200], "field_type")

    def _next(self, kind: str, where: str = "", index: Any = None) -> dict[str, Any]:
        supply = self._turn.get(kind) or self._row[kind]
        if index is None:
            return {"type": kind, kind: supply.take()}
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(supply.media):
            several = f"{len(supply.media)} {kind if kind == 'audio' else f'{kind}s'}"
            detail = f"expected an index from 0 on into {several}, got {index!r}"[:200]
            raise RowError(self._row_id, f"{where}.index", detail, "placeholder_count")
        supply.indexes.add(index)
        return {"type": kind, kind: supply.media[index]}


def _is_source(value: Any) -> bool:
    """Whether a block's `source` holds its medium: `{"type": "base64" | "url" | "file", ...}`."""
    return isinstance(value, Mapping) and ("type" in value or "data" in value) and not is_empty_value(value)


def _values(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value) or (isinstance(value, Mapping) and is_empty_value(value)):
        return []
    return value if isinstance(value, list) else [value]


def resolve_row_media(row_id: str, field: str, value: Any, rules: MediaRules) -> Media:
    """What a row says of a medium, resolved.

    Raises:
        RowError: naming the field, for a medium that the rules do not allow or that is not there.
    """
    try:
        return resolve_media(value, rules)
    except ValueError as error:
        raise RowError(row_id, field, str(error), issue_type_of(error)) from error


def missing_field_hint(row: Mapping[str, Any], field: str) -> str:
    """A hint for a field that a row does not have."""
    return "" if field in row else nearest(field, {str(key) for key in row})
