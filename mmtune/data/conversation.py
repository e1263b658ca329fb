"""Rows that hold a conversation: turns with placeholders, or with typed blocks, become messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

from mmtune.data.expressions import Declaration
from mmtune.data.findings import kind_of
from mmtune.data.media import Media, MediaRules, resolve_media
from mmtune.data.message import Message, RowError
from mmtune.errors import nearest

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""What stands in a turn's text where a medium goes. A template may name another one for images."""


class Conversation(Declaration):
    """Where a row keeps its turns."""

    field: str = Field(description="The row's field that holds the list of turns.")
    role: str = Field(description="The turn's key that names the speaker.")
    text: str = Field(description="The turn's key that holds the text, or a list of typed blocks.")
    roles: dict[str, str] = Field(description="Speaker name to user, assistant or system.")
    system: str | None = Field(default=None, description="The row's field with a system prompt, if it has one.")

    def messages(
        self, row_id: str, row: Mapping[str, Any], rules: MediaRules, fields: Mapping[str, str], placeholder: str
    ) -> list[Message]:
        """The row's turns, each medium where its placeholder or block is.

        Args:
            row_id: of the row.
            row: holds the turns.
            rules: what media it may name.
            fields: `image`, `video` or `audio` to the row's field with the paths of that kind.
            placeholder: stands for an image.

        Raises:
            RowError: a missing field, an unknown speaker, media that are not there, or more or fewer than placeholders.
        """
        turns = row.get(self.field)
        if not isinstance(turns, list) or not turns:
            raise RowError(
                row_id,
                self.field,
                "expected a list of turns" + among(row, self.field),
                "field_type" if self.field in row else "field_missing",
            )
        waiting = _Waiting(row_id, row, rules, fields, PLACEHOLDERS | {"image": placeholder})
        messages = self._system(row_id, row)
        for number, turn in enumerate(turns):
            where = f"{self.field}[{number}]"
            if not isinstance(turn, dict) or self.role not in turn or self.text not in turn:
                raise RowError(row_id, where, f"expected an object with '{self.role}' and '{self.text}'", "field_missing")
            speaker, text = turn[self.role], turn[self.text]
            if not isinstance(speaker, str) or speaker not in self.roles:
                hint = nearest(str(speaker)[:100], set(self.roles))
                raise RowError(row_id, f"{where}.{self.role}", f"unknown speaker {speaker!r}"[:200] + hint, "role_unknown")
            role = self.roles[speaker]
            where = f"{where}.{self.text}"
            if isinstance(text, list):
                content = [waiting.block(f"{where}[{index}]", block) for index, block in enumerate(text)]
            elif isinstance(text, str):
                content = waiting.split(text) if role != "assistant" else [{"type": "text", "text": text}]
            else:
                raise RowError(row_id, where, f"expected text, found {type(text).__name__}", "field_type")
            messages.append({"role": role, "content": content})
        waiting.check(self.field)
        return messages

    def _system(self, row_id: str, row: Mapping[str, Any]) -> list[Message]:
        text = row.get(self.system) if self.system else None
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise RowError(row_id, str(self.system), f"expected text, found {type(text).__name__}", "field_type")
        return [{"role": "system", "content": [{"type": "text", "text": text}]}]


class _Waiting:
    """The media of one row, given out in order to the placeholders that ask for them."""

    def __init__(
        self, row_id: str, row: Mapping[str, Any], rules: MediaRules, fields: Mapping[str, str], placeholders: Mapping[str, str]
    ) -> None:
        self._row_id = row_id
        self._rules = rules
        self._fields = fields
        self._placeholders = placeholders
        # A kind that the template does not know of has no placeholder: the text stays text.
        kinds = {placeholders[kind]: kind for kind in fields}
        self._kinds = kinds
        self._pattern = re.compile("|".join(map(re.escape, kinds))) if kinds else None
        self._given = {
            kind: [media(row_id, field, name, rules) for name in _names(row.get(field))] for kind, field in fields.items()
        }
        self._left: dict[str, Iterator[Media]] = {kind: iter(given) for kind, given in self._given.items()}
        self._asked = dict.fromkeys(PLACEHOLDERS, 0)

    def split(self, text: str) -> list[dict[str, Any]]:
        """Text around placeholders; the line break that sets a placeholder apart belongs to it, not to the text."""
        if self._pattern is None:
            return [{"type": "text", "text": text}] if text else []
        content: list[dict[str, Any]] = []
        pieces, marks = self._pattern.split(text), self._pattern.findall(text)
        for number, piece in enumerate(pieces):
            if number > 0:
                content.append(self._next(self._kinds[marks[number - 1]]))
                piece = piece.removeprefix("\n")
            if number < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                content.append({"type": "text", "text": piece})
        return content

    def block(self, where: str, block: Any) -> dict[str, Any]:
        """One typed block; a medium that it does not name is the next of the row's."""
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            return {"type": "text", "text": block["text"]}
        if isinstance(kind, str) and kind in PLACEHOLDERS:
            named = block.get(kind) or block.get("path") or block.get("url")
            return {"type": kind, kind: media(self._row_id, where, named, self._rules)} if named else self._next(kind)
        if kind == "image_url" and block.get("image_url") is not None:
            given = block["image_url"]
            named = given.get("url") if isinstance(given, dict) else given
            return {"type": "image", "image": media(self._row_id, where, named, self._rules)}
        raise RowError(self._row_id, where, f"expected a text, image, video or audio block, found {block!r}"[:200], "field_type")

    def check(self, field: str) -> None:
        """
        Raises:
            RowError: when some kind has more media than were asked for, or fewer.
        """
        for kind, asked in self._asked.items():
            given = len(self._given.get(kind, ()))
            if given != asked:
                detail = (
                    f"{given} {kind if kind == 'audio' else f'{kind}s'} for {asked} '{self._placeholders[kind]}' placeholders"
                )
                raise RowError(self._row_id, self._fields.get(kind, field), detail, "placeholder_count")

    def _next(self, kind: str) -> dict[str, Any]:
        self._asked[kind] += 1
        return {"type": kind, kind: next(self._left.get(kind, iter(())), None)}


def _names(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value):
        return []
    return value if isinstance(value, list) else [value]


def media(row_id: str, field: str, value: Any, rules: MediaRules) -> Media:
    """What a row says of a medium, resolved.

    Raises:
        RowError: naming the field, for a medium that the rules do not allow or that is not there.
    """
    try:
        return resolve_media(value, rules)
    except ValueError as error:
        raise RowError(row_id, field, str(error), kind_of(error)) from error


def among(row: Mapping[str, Any], field: str) -> str:
    """A hint for a field that a row does not have."""
    return "" if field in row else nearest(field, {str(key) for key in row})
