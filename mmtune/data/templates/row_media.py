"""Media of one row, assigned to the placeholders and typed blocks of its turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmtune.data.media.media import Media, MediaRules, resolve_media
from mmtune.data.message import Message, RowError
from mmtune.data.templates.unread_media import check_unread, is_empty_value
from mmtune.data.validation.issues import issue_type_of
from mmtune.utils.errors import nearest

PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
"""Media placeholders in a turn's text. A template can set another one for images."""

TURN_MEDIA = {"image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio")}
"""A turn's keys for its own media."""

TURN_MEDIA_KEYS = {name for names in TURN_MEDIA.values() for name in names}
"""All keys of a turn for its own media."""


class Turn(NamedTuple):
    """One turn of a row.

    Attributes:
        where: the part of the row with the turn.
        role: user, assistant, system or tool.
        text: a text, or a list of typed blocks.
        at: the part of the row with the text; empty if it is `where`.
        keys: all keys of the turn in the row.
        supervised: whether the loss includes the turn, unless its keys have a weight.
        calls: the tool calls of a turn whose text is tool calls; it continues an assistant turn before it.
    """

    where: str
    role: str
    text: Any
    at: str = ""
    keys: Mapping[str, Any] = {}
    supervised: bool = True
    calls: tuple[dict[str, Any], ...] = ()


@dataclass
class _MediaQueue:
    """Media of one modality, taken in order by placeholders and by blocks without a file, or by index."""

    media: list[Media]
    taken: int = 0
    indexes: set[int] = field(default_factory=set)

    @property
    def is_unused(self) -> bool:
        return bool(self.media) and not self.taken and not self.indexes

    def take(self) -> Media | None:
        self.taken += 1
        return self.media[self.taken - 1] if self.taken <= len(self.media) else None


class RowMedia:
    """The media of one row, assigned to its placeholders and blocks."""

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
        self._row = {modality: _MediaQueue([]) for modality in PLACEHOLDERS}
        for modality, names in fields.items():
            self._row[modality] = self._queue("", row, names)
        self._turn: dict[str, _MediaQueue] = {}

    def content(self, turn: Turn) -> list[dict[str, Any]]:
        """The blocks of one turn. The turn's own media replace its placeholders, or precede its text if it has none."""
        self._turn = {}
        if not TURN_MEDIA_KEYS.isdisjoint(turn.keys):
            queues = {modality: self._queue(f"{turn.where}.", turn.keys, names) for modality, names in TURN_MEDIA.items()}
            self._turn = {modality: queue for modality, queue in queues.items() if queue.media}
        where = turn.at or turn.where
        if isinstance(turn.text, list):
            content = [self._block(f"{where}[{index}]", block) for index, block in enumerate(turn.text)]
        elif not isinstance(turn.text, str):
            raise RowError(self._row_id, where, f"expected text, got {type(turn.text).__name__}", "field_type")
        elif turn.role == "assistant":
            content = [{"type": "text", "text": turn.text}]
        else:
            content = self._split(turn.text)
        for modality, queue in reversed(self._turn.items()):
            if queue.is_unused:
                content = [*({"type": modality, modality: item} for item in queue.media), *content]
            else:
                self._check(turn.where, modality, queue)
        return content

    def check(self, where: str, messages: list[Message] | None) -> None:
        """Check that the row's media and placeholders have the same number.

        Args:
            where: the field with the turns.
            messages: add images of a row without placeholders to these messages; None: they are an error.

        Raises:
            RowError: more or fewer media of a modality than placeholders and blocks.
        """
        for modality, queue in self._row.items():
            no_placeholder = queue.is_unused and modality == "image"
            first = next((message for message in messages or () if message["role"] == "user"), None)
            if no_placeholder and first is not None:
                first["content"] = [*({"type": modality, modality: item} for item in queue.media), *first["content"]]
                continue
            hint = "; set `image_placeholder: add` in the source to put them at the start of the first user turn"
            field_name = next(iter(self._fields.get(modality, ())), where)
            self._check(field_name, modality, queue, hint if no_placeholder else "")

    def _queue(self, where: str, keys: Mapping[str, Any], names: tuple[str, ...]) -> _MediaQueue:
        used = [name for name in names if _values(keys.get(name))]
        if len(used) > 1:
            detail = f"expected one of '{used[0]}' and '{used[1]}', got both; remove one"
            raise RowError(self._row_id, f"{where}{used[0]}", detail, "field_type")
        values = _values(keys[used[0]]) if used else []
        return _MediaQueue([resolve_row_media(self._row_id, f"{where}{used[0]}", value, self._rules) for value in values])

    def _check(self, where: str, modality: str, queue: _MediaQueue, hint: str = "") -> None:
        count = len(queue.media)
        if queue.indexes:
            unused = sorted(set(range(count)) - queue.indexes)
            if queue.taken or unused:
                problem = "some blocks have an index and some do not" if queue.taken else f"no block has index {unused[0]}"
                raise RowError(self._row_id, where, f"{_count_of(count, modality)}, but {problem}", "placeholder_count")
        elif count != queue.taken:
            placeholder = self._placeholders[modality]
            detail = f"expected one '{placeholder}' placeholder for each {modality}, got {queue.taken} for {count}{hint}"
            raise RowError(self._row_id, where, detail, "placeholder_count")

    def _split(self, text: str) -> list[dict[str, Any]]:
        """Split a text at its placeholders. The line break next to a placeholder is removed with it."""
        # Without a field for a modality, its placeholder is ordinary text.
        modalities = {self._placeholders[modality]: modality for modality in (*self._fields, *self._turn)}
        if not any(placeholder in text for placeholder in modalities):
            return [{"type": "text", "text": text}] if text else []
        content: list[dict[str, Any]] = []
        pattern = re.compile("|".join(map(re.escape, modalities)))
        pieces, placeholders = pattern.split(text), pattern.findall(text)
        for number, piece in enumerate(pieces):
            if number > 0:
                content.append(self._next(modalities[placeholders[number - 1]]))
                piece = piece.removeprefix("\n")
            if number < len(pieces) - 1:
                piece = piece.removesuffix("\n")
            if piece:
                content.append({"type": "text", "text": piece})
        return content

    def _block(self, where: str, block: Any) -> dict[str, Any]:
        """Convert one typed block. A block without a file uses media of the row: those with its `index`, or the next."""
        block_type = block.get("type") if isinstance(block, dict) else None
        if block_type == "text" and isinstance(block.get("text"), str):
            check_unread(self._row_id, where, block, {"type", "text"}, "put the media into separate blocks")
            return {"type": "text", "text": block["text"]}
        modality = str(block_type).removesuffix("_url")
        if modality in PLACEHOLDERS:
            names = (modality, f"{modality}_url", "path", "url", "bytes")
            used = [name for name in names if not is_empty_value(block.get(name))]
            if _is_source(block.get("source")):  # Anthropic's
                used.append("source")
            read = {"type", *names, *used}
            advice = f"media of a block are read from {', '.join(names)}"
            check_unread(self._row_id, where, block, read, advice, provenance=bool(used))
            if len(used) > 1 and used != ["path", "bytes"]:
                detail = f"expected one of '{used[0]}' and '{used[1]}', got both; remove one"
                raise RowError(self._row_id, where, detail, "field_type")
            if not used and modality == block["type"]:
                return self._next(modality, where, block.get("index"))
            if not used:
                raise RowError(self._row_id, where, f"expected a URL in the block '{block['type']}', got none", "field_type")
            value = {"bytes": block["bytes"], "path": block.get("path")} if "bytes" in used else block[used[0]]
            if isinstance(value, dict) and isinstance(value.get("url"), str):  # OpenAI's {"url", "detail"}
                value = value["url"]
            where = f"{where}.source" if used == ["source"] else where
            return {"type": modality, modality: resolve_row_media(self._row_id, where, value, self._rules)}
        raise RowError(self._row_id, where, f"expected a text, image, video or audio block, got {block!r}"[:200], "field_type")

    def _next(self, modality: str, where: str = "", index: Any = None) -> dict[str, Any]:
        queue = self._turn.get(modality) or self._row[modality]
        if index is None:
            return {"type": modality, modality: queue.take()}
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(queue.media):
            plural = modality if modality == "audio" else f"{modality}s"
            detail = f"expected 0 <= index < {len(queue.media)} (the number of {plural}), got {index!r}"[:200]
            raise RowError(self._row_id, f"{where}.index", detail, "placeholder_count")
        queue.indexes.add(index)
        return {"type": modality, modality: queue.media[index]}


def _count_of(count: int, modality: str) -> str:
    return f"{count} {modality}" if count == 1 or modality == "audio" else f"{count} {modality}s"


def _is_source(value: Any) -> bool:
    """Whether a block's `source` contains its data: `{"type": "base64" | "url" | "file", ...}`."""
    return isinstance(value, Mapping) and ("type" in value or "data" in value) and not is_empty_value(value)


def _values(value: Any) -> list[Any]:
    if value is None or (isinstance(value, str) and not value) or (isinstance(value, Mapping) and is_empty_value(value)):
        return []
    return value if isinstance(value, list) else [value]


def resolve_row_media(row_id: str, field: str, value: Any, rules: MediaRules) -> Media:
    """Resolve a row's reference to an image, video or audio file (see `resolve_media`).

    Raises:
        RowError: the file is missing or not allowed; names the field.
    """
    try:
        return resolve_media(value, rules)
    except ValueError as error:
        raise RowError(row_id, field, str(error), issue_type_of(error)) from error


def missing_field_hint(row: Mapping[str, Any], field: str) -> str:
    """A hint with the nearest field name, for a field that a row does not have."""
    return "" if field in row else nearest(field, {str(key) for key in row})
