"""Rows of columns: the template writes the messages, in Jinja over the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmtune.data.media.image_settings import DEFAULT_IMAGE_SETTINGS, ImageSettings
from mmtune.data.media.media import ImageView, Media, MediaRules, image_size
from mmtune.data.message import Message, RowError
from mmtune.data.templates.boxes import Box, read_boxes
from mmtune.data.templates.conversation import missing_field_hint, resolve_row_media
from mmtune.data.templates.expressions import (
    DRAW_VARIABLE,
    TemplateSection,
    as_text,
    check_jinja,
    evaluate_expression,
    render_expression,
)
from mmtune.data.templates.prompts import ClosedAnswers, Options, PromptSettings, Verbalizer, draw
from mmtune.data.validation.issues import issue_type_of

Context = dict[str, Any]


class TurnTemplate(TemplateSection):
    """One message written from the row's columns."""

    role: str
    images: tuple[str, ...] = Field(default=(), description="Jinja for images that are shown before the text.")
    videos: tuple[str, ...] = Field(default=(), description="Jinja for videos.")
    audio: tuple[str, ...] = Field(default=(), description="Jinja for sounds.")
    text: tuple[str, ...] = Field(min_length=1, description="Jinja for the text; of several phrasings one is drawn.")

    @model_validator(mode="before")
    @classmethod
    def _one_phrasing(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("text"), str):
            return given | {"text": (given["text"],)}
        return given

    @field_validator("images", "videos", "audio", "text")
    @classmethod
    def _jinja(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            check_jinja(source)
        return sources

    def media(self, row_id: str, where: str, row: Mapping[str, Any], context: Context) -> list[tuple[str, Any]]:
        """The kind of each medium, and what the row says of it. Jinja that gives a list gives as many."""
        found = []
        for kind, sources in {"image": self.images, "video": self.videos, "audio": self.audio}.items():
            for source in sources:
                value = evaluate_expression(row_id, where, source, context, row)
                found += [(kind, item) for item in (value if isinstance(value, list) else [value])]
        return found

    def said(self, row_id: str, where: str, row: Mapping[str, Any], context: Context) -> str:
        """The text, in the phrasing that the row's draw falls on."""
        return render_expression(row_id, where, self.text[int(context[DRAW_VARIABLE] * len(self.text))], context, row)


class BoxDeclaration(TemplateSection):
    """Boxes in the row's image. Jinja reads the first as `box` and all of them as `boxes`."""

    value: str = Field(description="Jinja: one box of four numbers in pixels, or a list of them.")
    layout: Literal["xywh", "xyxy"] = Field(description="Corner with width and height, or two corners.")
    outside: Literal["error", "clip"] = Field(
        default="error", description="A box that reaches out of the image is an error of the row, or is clipped to the image."
    )

    @field_validator("value")
    @classmethod
    def _jinja(cls, source: str) -> str:
        check_jinja(source)
        return source

    def read(self, row_id: str, row: Mapping[str, Any], rounds: list[Context], images: list[Media]) -> list[list[Box]]:
        """The boxes of each round.

        Raises:
            RowError: for a box that is none or reaches out of the image, or a row that has not exactly one image.
        """
        if len(images) != 1:
            raise RowError(row_id, "boxes", f"boxes are those of one image, and the row has {len(images)}", "box_malformed")
        values = [evaluate_expression(row_id, "boxes", self.value, context, row) for context in rounds]
        try:
            size = image_size(images[0])
            return [read_boxes(value, self.layout, size, self.outside == "clip") for value in values]
        except ValueError as error:
            raise RowError(row_id, "boxes", str(error), issue_type_of(error)) from error


@dataclass(frozen=True)
class ColumnTemplate:
    """What a template without a conversation says of a row.

    Attributes:
        turns: the messages.
        values: names that Jinja can read besides the row's columns.
        repeat: name to the row's list that it runs through; the turns are written once for each item.
        options: the row's answer options.
        verbalizer: labels to words.
        boxes: boxes in the image.
        references: Jinja for all accepted answers.
    """

    turns: tuple[TurnTemplate, ...]
    values: Mapping[str, str]
    repeat: Mapping[str, str]
    options: Options | None
    verbalizer: Verbalizer | None
    boxes: BoxDeclaration | None
    references: str | None

    def messages(
        self,
        row_id: str,
        row: Mapping[str, Any],
        rules: MediaRules,
        prompting: PromptSettings,
        settings: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    ) -> tuple[list[Message], tuple[str, ...], tuple[str, ...]]:
        """The messages, the candidate answers, and the accepted ones. An image with boxes, and they, change by `settings`.

        Raises:
            RowError: naming the part of the template that cannot be made of the row.
        """
        rounds = self._rounds(row_id, row, self._context(row_id, row, prompting))
        blocks: list[list[dict[str, Any]]] = [
            [{"type": kind, kind: _medium(row_id, f"messages[{place}]", row, value, rules)} for kind, value in named]
            for place, named in enumerate(self._named(row_id, row, rounds[0]))
        ]
        if self.boxes is not None:
            images = [block for turn in blocks for block in turn if block["type"] == "image"]
            windowed = replace(settings, augment=None)
            found = self.boxes.read(row_id, row, rounds, [windowed.view(block["image"], row_id, 0) for block in images])
            view = images[0]["image"] = settings.view(images[0]["image"], row_id, 0, [box for boxes in found for box in boxes])
            if isinstance(view, ImageView) and view.change is not None:
                found = [[view.change.box(box) for box in boxes] for boxes in found]
            rounds = [context | {"box": boxes[0], "boxes": boxes} for context, boxes in zip(rounds, found, strict=True)]
        extra: Context = {}
        closed = self._closed(row_id, row, rounds[0], prompting)
        if closed is not None:
            extra |= closed.shared | closed.alternatives[closed.right]
        messages: list[Message] = []
        for number, context in enumerate(rounds):
            for place, turn in enumerate(self.turns):
                if turn.role == "system" and number > 0:
                    continue
                text = {"type": "text", "text": turn.said(row_id, f"messages[{place}]", row, context | extra)}
                messages.append({"role": turn.role, "content": [*(blocks[place] if number == 0 else ()), text]})
        last = rounds[-1] | extra
        return messages, self._choices(row_id, row, last, closed), self._references(row_id, row, last)

    def media_values(self, row: Mapping[str, Any], values: Mapping[str, str] | None = None) -> list[tuple[str, Any]]:
        """The kind of each medium that a row names, and what it says of it, nothing looked up.

        Raises:
            RowError: naming the part of the template that cannot be made of the row.
        """
        context = self._rounds("row", row, self._context("row", row, PromptSettings(values=values or {})))[0]
        return [medium for turn in self._named("row", row, context) for medium in turn]

    def _named(self, row_id: str, row: Mapping[str, Any], context: Context) -> list[list[tuple[str, Any]]]:
        return [turn.media(row_id, f"messages[{place}]", row, context) for place, turn in enumerate(self.turns)]

    def _context(self, row_id: str, row: Mapping[str, Any], prompting: PromptSettings) -> Context:
        return {**row, **self.values, **prompting.values, DRAW_VARIABLE: draw(prompting.seed, row_id, "phrasing")}

    def _rounds(self, row_id: str, row: Mapping[str, Any], context: Context) -> list[Context]:
        """What Jinja can read, once for each repetition."""
        if not self.repeat:
            return [context]
        lists: dict[str, list[Any]] = {}
        for name, field in self.repeat.items():
            values = row.get(field)
            if not isinstance(values, list) or not values:
                raise RowError(
                    row_id,
                    field,
                    "expected a list that is not empty" + missing_field_hint(row, field),
                    "field_type" if field in row else "field_missing",
                )
            lists[name] = values
        counts = {field: len(lists[name]) for name, field in self.repeat.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} {field}" for field, count in counts.items())
            raise RowError(row_id, next(iter(counts)), f"the lists differ in length: {told}", "field_type")
        return [context | dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]

    def _closed(self, row_id: str, row: Mapping[str, Any], context: Context, prompting: PromptSettings) -> ClosedAnswers | None:
        part = self.options or self.verbalizer
        return None if part is None else part.read(row_id, row, context, prompting)

    def _choices(self, row_id: str, row: Mapping[str, Any], context: Context, closed: ClosedAnswers | None) -> tuple[str, ...]:
        """The last answer, once as each alternative would write it."""
        if closed is None or len(closed.alternatives) < 2 or self.turns[-1].role != "assistant":
            return ()
        where = f"messages[{len(self.turns) - 1}]"
        written = [self.turns[-1].said(row_id, where, row, context | alternative) for alternative in closed.alternatives]
        return tuple(dict.fromkeys(written))

    def _references(self, row_id: str, row: Mapping[str, Any], context: Context) -> tuple[str, ...]:
        if self.references is None:
            return ()
        values = evaluate_expression(row_id, "references", self.references, context, row)
        if not isinstance(values, list) or not values:
            raise RowError(row_id, "references", f"expected a list of answers, found {values!r}"[:200], "field_type")
        try:
            return tuple(dict.fromkeys(as_text(value) for value in values))
        except ValueError as error:
            raise RowError(row_id, "references", str(error), "field_type") from error


def _medium(row_id: str, where: str, row: Mapping[str, Any], value: Any, rules: MediaRules) -> Media:
    """As `resolve_row_media`; an error is about the column that holds the value, where exactly one does."""
    try:
        return resolve_row_media(row_id, where, value, rules)
    except RowError as error:
        columns = [
            name for name, field in row.items() if value and (field == value or (isinstance(field, list) and value in field))
        ]
        raise RowError(row_id, columns[0] if len(columns) == 1 else where, error.detail, error.issue) from error
