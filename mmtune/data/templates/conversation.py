"""Conversation templates: turns with placeholders or typed content blocks, converted to messages."""

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
"""Media placeholders in a turn's text. A template can set another one for images."""

TURN_MEDIA = {"image": ("images", "image"), "video": ("videos", "video"), "audio": ("audios", "audio")}
"""A turn's keys for its own media."""

WEIGHTS = ("weight", "loss", "loss_scale", "train", "training")
"""A turn's keys that exclude it from the loss: OpenAI's `weight`, ms-swift's `loss` and `loss_scale`, axolotl's `train`."""

UNSUPPORTED_WEIGHTS = ("train_detail", "loss_mask")
"""Keys of a turn or a row with weights of parts of an answer, or of all turns in one list."""

SPEAKER_NAME = "name"
"""A turn's key with the name of its speaker, in OpenAI's format. It is not read, and can look like a file name."""


class Conversation(TemplateSection):
    """The location of a row's turns: one list, or a question and its answer."""

    field: str | None = Field(default=None, description="The row's field with the list of turns.")
    question: str | None = Field(
        default=None, description="Instead of `field`: the row's field with the question (text or turns) before the answer."
    )
    answer: str | None = Field(default=None, description="With `question`: the row's field with the answer (text or turns).")
    history: str | None = Field(
        default=None, description="With `question`: the row's field with earlier turns, as pairs of a question and an answer."
    )
    role: str = Field(default="role", description="The turn's key with the speaker.")
    text: str = Field(default="content", description="The turn's key with the text, or a list of typed blocks.")
    roles: dict[str, str] = Field(
        default_factory=lambda: {"user": "user", "assistant": "assistant", "system": "system"},
        description="Speaker name to user, assistant or system.",
    )
    system: str | None = Field(default=None, description="The row's field with an optional system prompt.")
    joined_by_space: bool = Field(
        default=False,
        description="With `question`: `question` and `answer` are two parts of one text, and a space at the start of the answer "
        "separates them. That space is removed from the answer.",
    )

    @model_validator(mode="after")
    def _one_form(self) -> Conversation:
        if (self.field is None) == (self.question is None) or (self.question is None) != (self.answer is None):
            raise ValueError("set either 'field', or both 'question' and 'answer'")
        if self.history is not None and self.question is None:
            raise ValueError("'history' cannot be used with 'field'; remove it")
        if self.joined_by_space and self.question is None:
            raise ValueError("'joined_by_space' cannot be used with 'field'; remove it")
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
        """Convert the row's turns to messages, with media in the positions of their placeholders or blocks.

        Args:
            row_id: the row's id.
            row: the row with the turns.
            rules: which files and URLs the row may use.
            fields: modality (`image`, `video`, `audio`) to the row's fields for its media; a row uses one of them.
            placeholder: the placeholder of an image.
            add_images: put the images of a row without placeholders at the start of the first user turn.

        Raises:
            RowError: a missing field, an unknown role, media that are missing or not read, different numbers of media and
                placeholders, or a weight of a turn that is neither 0 nor 1.
        """
        media = _RowMedia(row_id, row, rules, fields, PLACEHOLDERS | {"image": placeholder})
        messages = self._system(row_id, row)
        read = {self.role, self.text, SPEAKER_NAME, *_TURN_MEDIA_KEYS}
        advice = "media of a turn are read from images, videos, audios; rename the key"
        for turn in self._turns(row_id, row):
            supervised = _is_supervised_turn(row_id, turn)
            message: Message = {"role": turn.role, "content": media.content(turn)}
            check_unread(row_id, turn.where, turn.keys, read, advice, provenance=has_media(message))
            messages.append(message if supervised else message | {"supervised": False})
        media.check(self.field or str(self.question), messages if add_images else None)
        return messages

    def _turns(self, row_id: str, row: Mapping[str, Any]) -> Iterator[_Turn]:
        if self.field is not None:
            expected = "expected a list of turns" + missing_field_hint(row, self.field)
            yield from self._parse_turns(row_id, self.field, row.get(self.field), expected, row)
            return
        question, answer = (_required(row_id, row, str(name)) for name in (self.question, self.answer))
        for number, pair in enumerate(self._history(row_id, row)):
            where = f"{self.history}[{number}]"
            yield _Turn(where, "user", pair[0])
            yield _Turn(where, "assistant", pair[1])
        if self.joined_by_space and isinstance(question, str) and isinstance(answer, str):
            answer = _without_separator(question, answer)
        expected = "expected a text or a list of turns"
        if isinstance(question, str):
            yield _Turn(str(self.question), "user", question)
        else:  # answers within the question are context; only the row's answer is supervised
            turns = self._parse_turns(row_id, str(self.question), question, expected, row)
            yield from (turn._replace(supervised=turn.role != "assistant") for turn in turns)
        if isinstance(answer, str):
            yield _Turn(str(self.answer), "assistant", answer)
        else:
            yield from self._parse_turns(row_id, str(self.answer), answer, expected, row)

    def _parse_turns(self, row_id: str, name: str, turns: Any, expected: str, row: Mapping[str, Any]) -> Iterator[_Turn]:
        if not isinstance(turns, list) or not turns:
            raise RowError(row_id, name, expected, "field_type" if name in row else "field_missing")
        for number, turn in enumerate(turns):
            where = f"{name}[{number}]"
            if not isinstance(turn, dict) or self.role not in turn or self.text not in turn:
                raise RowError(row_id, where, f"expected an object with '{self.role}' and '{self.text}'", "field_missing")
            speaker = turn[self.role]
            if not isinstance(speaker, str) or speaker not in self.roles:
                hint = nearest(str(speaker)[:100], set(self.roles))
                raise RowError(row_id, f"{where}.{self.role}", f"unknown role {speaker!r}"[:200] + hint, "role_unknown")
            yield _Turn(where, self.roles[speaker], turn[self.text], f"{where}.{self.text}", turn)

    def _history(self, row_id: str, row: Mapping[str, Any]) -> list[list[str]]:
        pairs = row.get(self.history) if self.history else None
        if not pairs:
            return []
        for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs]):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                detail = f"expected a question and an answer, [text, text], got {pair!r}"[:200]
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
        where: the part of the row with the turn.
        role: user, assistant or system.
        text: a text, or a list of typed blocks.
        at: the part of the row with the text; empty if it is `where`.
        keys: all keys of the turn in the row.
        supervised: whether the loss includes the turn, unless its keys have a weight.
    """

    where: str
    role: str
    text: Any
    at: str = ""
    keys: Mapping[str, Any] = {}
    supervised: bool = True


_WEIGHT_KEYS = {*WEIGHTS, *UNSUPPORTED_WEIGHTS}
_TURN_MEDIA_KEYS = {name for names in TURN_MEDIA.values() for name in names}


def _required(row_id: str, row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(row_id, name, "expected a text or a list of turns" + missing_field_hint(row, name), "field_missing")
    return row[name]


def _without_separator(question: str, answer: str) -> str:
    """The answer without the single space that separates it from the question; more white space belongs to the answer."""
    has_separator = answer[:1] == " " and not answer[1:2].isspace() and question and not question[-1].isspace()
    return answer[1:] if has_separator else answer


def _is_supervised_turn(row_id: str, turn: _Turn) -> bool:
    """Whether the loss includes a turn, according to its weight.

    Raises:
        RowError: a weight that is neither 0 nor 1, two different weights, or a weight of 1 for a turn that is not an answer.
    """
    if _WEIGHT_KEYS.isdisjoint(turn.keys):
        return turn.supervised
    _check_no_unsupported_weights(row_id, f"{turn.where}.", turn.keys)
    weights = {name: turn.keys[name] for name in WEIGHTS if turn.keys.get(name) is not None}
    for name, weight in weights.items():
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            detail = f"expected 0, 1, true or false, got {weight!r}"[:200]
            raise RowError(row_id, f"{turn.where}.{name}", detail, "turn_weight")
        if weight and turn.role != "assistant":
            detail = f"expected weight 0 for a turn of the {turn.role}, got {weight!r}; only assistant turns can be supervised"
            raise RowError(row_id, f"{turn.where}.{name}", detail, "turn_weight")
    if len(set(weights.values())) > 1:
        detail = f"expected equal weights, got different ones in {' and '.join(weights)}; keep one of them"
        raise RowError(row_id, turn.where, detail, "turn_weight")
    return turn.role != "assistant" or bool(next(iter(weights.values()), turn.supervised))


def check_no_row_weights(row_id: str, row: Mapping[str, Any], read: Collection[str]) -> None:
    """Check that a row has no weight of its own, because weights belong to turns.

    Args:
        row_id: the row's id.
        row: the row with the turns.
        read: the row's fields that are read or ignored.

    Raises:
        RowError: the row has a weight.
    """
    for name in (*WEIGHTS, *UNSUPPORTED_WEIGHTS):
        if name not in read and row.get(name) is not None:
            detail = (
                f"weights of whole rows are not supported; set {WEIGHTS[0]}: 0 or 1 for each turn of the assistant, exclude the "
                "row with the source's `where`, or add the field to the source's `ignore` if it means something else"
            )
            raise RowError(row_id, name, detail, "turn_weight")


def _check_no_unsupported_weights(row_id: str, where: str, keys: Mapping[str, Any]) -> None:
    for name in UNSUPPORTED_WEIGHTS:
        if keys.get(name) is not None:
            detail = (
                f"not supported: a turn is supervised as a whole or not at all; set {WEIGHTS[0]}: 0 or 1 for each turn instead"
            )
            raise RowError(row_id, f"{where}{name}", detail, "turn_weight")


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


class _RowMedia:
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

    def content(self, turn: _Turn) -> list[dict[str, Any]]:
        """The blocks of one turn. The turn's own media replace its placeholders, or precede its text if it has none."""
        self._turn = {}
        if not _TURN_MEDIA_KEYS.isdisjoint(turn.keys):
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
