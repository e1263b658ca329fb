"""Conversation templates: turns with placeholders or typed content blocks, converted to messages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from mmtune.data.media.media import MediaRules
from mmtune.data.message import Message, RowError, has_media, is_supervised, text_message, text_of
from mmtune.data.templates.expressions import TemplateSection
from mmtune.data.templates.row_media import PLACEHOLDERS, TURN_MEDIA_KEYS, RowMedia, Turn, missing_field_hint
from mmtune.data.templates.tool_turns import TOOL_TURN_KEYS, has_calls, read_call_text, read_turn_keys
from mmtune.data.templates.unread_media import check_unread
from mmtune.utils.errors import nearest

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
        description="Speaker name to user, assistant, system, tool (the result of a call) or tool_call (a text that is calls).",
    )
    tools: str | None = Field(default=None, description="The row's field with the schemas of the functions that may be called.")
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
        return {
            name for name in (self.field, self.question, self.answer, self.history, self.system, self.tools) if name is not None
        }

    def messages(
        self,
        row_id: str,
        row: Mapping[str, Any],
        rules: MediaRules,
        fields: Mapping[str, tuple[str, ...]],
        placeholder: str,
        add_images: bool = False,
        awaits_answer: bool = False,
    ) -> list[Message]:
        """Convert the row's turns to messages, with media in the positions of their placeholders or blocks.

        Args:
            row_id: the row's id.
            row: the row with the turns.
            rules: which files and URLs the row may use.
            fields: modality (`image`, `video`, `audio`) to the row's fields for its media; a row uses one of them.
            placeholder: the placeholder of an image.
            add_images: put the images of a row without placeholders at the start of the first user turn.
            awaits_answer: with `question`: the row's answer is not read.

        Raises:
            RowError: a missing field, an unknown role, media that are missing or not read, different numbers of media and
                placeholders, a tool call that is not valid, or a weight of a turn that is neither 0 nor 1.
        """
        media = RowMedia(row_id, row, rules, fields, PLACEHOLDERS | {"image": placeholder})
        messages = self._system(row_id, row)
        read = {self.role, self.text, SPEAKER_NAME, *TURN_MEDIA_KEYS, *TOOL_TURN_KEYS}
        advice = "media of a turn are read from images, videos, audios; rename the key"
        for turn in self._turns(row_id, row, awaits_answer):
            supervised = _is_supervised_turn(row_id, turn)
            message: Message = {"role": turn.role, "content": media.content(turn)}
            check_unread(row_id, turn.where, turn.keys, read, advice, provenance=has_media(message))
            message |= read_turn_keys(row_id, turn.where, turn.role, turn.keys)
            if turn.calls:
                message["tool_calls"] = [*turn.calls, *message.get("tool_calls", ())]
            if "tool_calls" in message and not text_of(message).strip():  # white space alone is no answer beside a call
                message["content"] = [block for block in message["content"] if block["type"] != "text"]
            if not supervised:
                message["supervised"] = False
            if turn.calls and messages and messages[-1]["role"] == "assistant":
                messages[-1] = _joined(row_id, turn.where, messages[-1], message)
            else:
                messages.append(message)
        media.check(self.field or str(self.question), messages if add_images else None)
        return messages

    def _turns(self, row_id: str, row: Mapping[str, Any], awaits_answer: bool) -> Iterator[Turn]:
        if self.field is not None:
            expected = "expected a list of turns" + missing_field_hint(row, self.field)
            yield from self._parse_turns(row_id, self.field, row.get(self.field), expected, row)
            return
        question = _required(row_id, row, str(self.question))
        answer = "" if awaits_answer else _required(row_id, row, str(self.answer))
        for number, pair in enumerate(self._history(row_id, row)):
            where = f"{self.history}[{number}]"
            yield Turn(where, "user", pair[0])
            yield Turn(where, "assistant", pair[1])
        if self.joined_by_space and isinstance(question, str) and isinstance(answer, str):
            answer = _without_separator(question, answer)
        expected = "expected a text or a list of turns"
        if isinstance(question, str):
            yield Turn(str(self.question), "user", question)
        else:  # answers within the question are context; only the row's answer is supervised
            turns = self._parse_turns(row_id, str(self.question), question, expected, row)
            yield from (turn._replace(supervised=turn.role != "assistant") for turn in turns)
        if awaits_answer:
            return
        if isinstance(answer, str):
            yield Turn(str(self.answer), "assistant", answer)
        else:
            yield from self._parse_turns(row_id, str(self.answer), answer, expected, row)

    def _parse_turns(self, row_id: str, name: str, turns: Any, expected: str, row: Mapping[str, Any]) -> Iterator[Turn]:
        if not isinstance(turns, list) or not turns:
            raise RowError(row_id, name, expected, "field_type" if name in row else "field_missing")
        for number, turn in enumerate(turns):
            where = f"{name}[{number}]"
            if not isinstance(turn, dict) or self.role not in turn or (self.text not in turn and not has_calls(turn)):
                raise RowError(row_id, where, f"expected an object with '{self.role}' and '{self.text}'", "field_missing")
            speaker = turn[self.role]
            if not isinstance(speaker, str) or speaker not in self.roles:
                hint = nearest(str(speaker)[:100], set(self.roles))
                raise RowError(row_id, f"{where}.{self.role}", f"unknown role {speaker!r}"[:200] + hint, "role_unknown")
            role, at, text = self.roles[speaker], f"{where}.{self.text}", turn.get(self.text)
            calls: list[dict[str, Any]] = []
            if role == "tool_call":
                role = "assistant"
                text, calls = read_call_text(row_id, at, text)
            elif text is None and has_calls(turn):
                text = ""
            yield Turn(where, role, text, at, turn, calls=tuple(calls))

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
        return [text_message("system", text)]


_WEIGHT_KEYS = {*WEIGHTS, *UNSUPPORTED_WEIGHTS}


def _required(row_id: str, row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise RowError(row_id, name, "expected a text or a list of turns" + missing_field_hint(row, name), "field_missing")
    return row[name]


def _without_separator(question: str, answer: str) -> str:
    """The answer without the single space that separates it from the question; more white space belongs to the answer."""
    has_separator = answer[:1] == " " and not answer[1:2].isspace() and question and not question[-1].isspace()
    return answer[1:] if has_separator else answer


def _joined(row_id: str, where: str, message: Message, calls: Message) -> Message:
    """An assistant message with the tool calls of the turn after it, which belong to the same answer.

    Raises:
        RowError: the loss includes one of them and not the other.
    """
    if is_supervised(message) != is_supervised(calls):
        detail = "expected the weight of the assistant's turn before it: a text and its tool calls are supervised as a whole"
        raise RowError(row_id, where, detail, "turn_weight")
    tool_calls = [*message.get("tool_calls", ()), *calls["tool_calls"]]
    return {**message, "content": [*message["content"], *calls["content"]], "tool_calls": tool_calls}


def _is_supervised_turn(row_id: str, turn: Turn) -> bool:
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
