"""Column templates: messages written in Jinja from the columns of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field, field_validator, model_validator

from mmtune.data.media.image_settings import DEFAULT_IMAGE_SETTINGS, ImageSettings
from mmtune.data.media.media import ImageView, Media, MediaRules
from mmtune.data.message import Message, RowError
from mmtune.data.templates.expressions import (
    DRAW_VARIABLE,
    WRITTEN_REGIONS,
    TemplateSection,
    WrittenRegions,
    as_text,
    check_jinja,
    evaluate_expression,
    native_pieces,
    render_expression,
)
from mmtune.data.templates.prompts import ClosedAnswers, Options, PromptSettings, Verbalizer, draw
from mmtune.data.templates.region_declaration import RegionDeclaration
from mmtune.data.templates.regions import Region, RowConvention, thousandths
from mmtune.data.templates.row_media import missing_field_hint, resolve_row_media

Context = dict[str, Any]


class TurnTemplate(TemplateSection):
    """One message written from the row's columns."""

    role: str
    images: tuple[str, ...] = Field(default=(), description="Jinja for images before the text.")
    numbered: str | None = Field(
        default=None,
        description="How the text names an image, such as '<image {number}>': image NUMBER, from 1, stands there. Images that it "
        "does not name stand before it.",
    )
    videos: tuple[str, ...] = Field(default=(), description="Jinja for videos.")
    audio: tuple[str, ...] = Field(default=(), description="Jinja for audio clips.")
    text: tuple[str, ...] = Field(min_length=1, description="Jinja for the text; one of several phrasings is drawn at random.")

    @model_validator(mode="before")
    @classmethod
    def _one_phrasing(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("text"), str):
            return values | {"text": (values["text"],)}
        return values

    @field_validator("images", "videos", "audio", "text")
    @classmethod
    def _jinja(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            check_jinja(source)
        return sources

    @field_validator("numbered")
    @classmethod
    def _one_number(cls, numbered: str | None) -> str | None:
        if numbered is not None and numbered.count("{number}") != 1:
            raise ValueError(f"expected {{number}} once, got {numbered[:80]!r}")
        return numbered

    def content(self, row_id: str, where: str, text: str, media: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The blocks of a message: its media before the text, or where the text names them by number.

        Raises:
            RowError: the text names an image that the row does not have.
        """
        if self.numbered is None:
            return [*media, {"type": "text", "text": text}]
        before, after = map(re.escape, self.numbered.split("{number}"))
        parts = re.split(rf"{before}(\d+){after}", text)
        images = [block for block in media if block["type"] == "image"]
        numbers = [int(number) for number in parts[1::2]]
        if missing := [number for number in numbers if not 1 <= number <= len(images)]:
            detail = f"the text names image {missing[0]}; expected 1 to {len(images)}, the images of the row"
            raise RowError(row_id, where, detail, "placeholder_count")
        named = [images[number - 1] for number in numbers]
        content = [block for block in media if not any(block is each for each in named)]
        for text_before, image in zip(parts[::2], [*named, None], strict=True):
            content += [{"type": "text", "text": text_before}] if text_before else []
            content += [] if image is None else [image]
        return content

    def media(self, row_id: str, where: str, row: Mapping[str, Any], context: Context) -> list[tuple[str, Any]]:
        """The modality and the row's value of each image, video and audio clip. Jinja that evaluates to a list gives several."""
        media = []
        for modality, sources in {"image": self.images, "video": self.videos, "audio": self.audio}.items():
            for source in sources:
                value = evaluate_expression(row_id, where, source, context, row)
                media += [(modality, item) for item in (value if isinstance(value, list) else [value])]
        return media

    def render(self, row_id: str, where: str, row: Mapping[str, Any], context: Context) -> str:
        """The text, in the phrasing chosen by the row's random draw."""
        phrasing = self.text[int(context[DRAW_VARIABLE] * len(self.text))]
        return render_expression(row_id, where, phrasing, context, row)


@dataclass(frozen=True)
class ColumnTemplate:
    """The part of a data template that writes messages from columns.

    Attributes:
        turns: the messages.
        values: more Jinja variables besides the row's columns.
        repeat: Jinja variable to the row's list; the turns are repeated for each item.
        options: the row's answer options.
        verbalizer: labels to words.
        regions: boxes, points and quadrilaterals in the image, by the name of their section.
        references: Jinja for the list of all accepted answers.
    """

    turns: tuple[TurnTemplate, ...]
    values: Mapping[str, str]
    repeat: Mapping[str, str]
    options: Options | None
    verbalizer: Verbalizer | None
    regions: Mapping[str, RegionDeclaration]
    references: str | None

    def messages(
        self,
        row_id: str,
        row: Mapping[str, Any],
        rules: MediaRules,
        prompting: PromptSettings,
        settings: ImageSettings = DEFAULT_IMAGE_SETTINGS,
    ) -> tuple[list[Message], dict[str, Any]]:
        """The messages, and further attributes of the sample. `settings` transform an image with its regions.

        Raises:
            RowError: a section of the template fails for this row; names the section.
        """
        rounds = self._rounds(row_id, row, self._context(row_id, row, prompting))
        blocks: list[list[dict[str, Any]]] = [
            [
                {"type": modality, modality: _resolve(row_id, f"messages[{number}]", row, value, rules)}
                for modality, value in media
            ]
            for number, media in enumerate(self._turn_media(row_id, row, rounds[0]))
        ]
        images = [block for turn in blocks for block in turn if block["type"] == "image"]
        regions: list[Region] = []
        if self.regions:
            rounds, regions = self._with_regions(row_id, row, rounds, images, settings)
        answer_variables: Context = {}
        closed = self._closed_answers(row_id, row, rounds[0], prompting)
        if closed is not None:
            answer_variables = closed.shared | closed.alternatives[closed.correct]
        messages: list[Message] = []
        written = WrittenRegions()
        for number, context in enumerate(rounds):
            for index, turn in enumerate(self.turns):
                if turn.role == "system" and number > 0:
                    continue
                written = WrittenRegions()
                text = turn.render(row_id, f"messages[{index}]", row, context | answer_variables | {WRITTEN_REGIONS: written})
                media = blocks[index] if number == 0 else []
                content = turn.content(row_id, f"messages[{index}]", text, media)
                messages.append(
                    {"role": turn.role, "content": _with_native(row_id, f"messages[{index}]", content, written, images)}
                )
        last = rounds[-1] | answer_variables
        options = tuple(each["option"] for each in closed.alternatives) if closed is not None and self.options is not None else ()
        choices, references = self._choices(row_id, row, last, closed), self._references(row_id, row, last)
        answers = {"choices": choices, "options": options, "references": references}
        return messages, {**answers, "regions": tuple(regions), "extent": written.extent()}

    def fitting_conventions(
        self, row_id: str, row: Mapping[str, Any], rules: MediaRules, prompting: PromptSettings
    ) -> dict[str, frozenset[RowConvention]]:
        """For each section of regions, the conventions in which all regions of a row are possible.

        Raises:
            RowError: the row has no such regions, or not one image.
        """
        rounds = self._rounds(row_id, row, self._context(row_id, row, prompting))
        images = [
            resolve_row_media(row_id, "image", value, rules)
            for media in self._turn_media(row_id, row, rounds[0])
            for modality, value in media
            if modality == "image"
        ]
        return {name: section.fitting(name, row_id, row, rounds, images) for name, section in self.regions.items()}

    def _with_regions(
        self, row_id: str, row: Mapping[str, Any], rounds: list[Context], images: list[dict[str, Any]], settings: ImageSettings
    ) -> tuple[list[Context], list[Region]]:
        """The rounds with the variables of their regions, and all regions. The image becomes its view, and they follow it."""
        not_augmented = replace(settings, augment=None)
        views = [not_augmented.view(block["image"], row_id, 0) for block in images]
        by_section = {name: section.read(name, row_id, row, rounds, views) for name, section in self.regions.items()}
        every = [region for each in by_section.values() for regions in each for region in regions]
        view = images[0]["image"] = settings.view(images[0]["image"], row_id, 0, every)
        augmentation = view.augmentation if isinstance(view, ImageView) else None
        moved: list[Region] = []
        for name, section in self.regions.items():
            for number, regions in enumerate(by_section[name]):
                regions = regions if augmentation is None else [augmentation.transform_region(region) for region in regions]
                first = {section.kind: regions[0]} if regions else {}
                rounds[number] = rounds[number] | first | {name: regions}
                moved += regions
        return rounds, moved

    def media_values(self, row: Mapping[str, Any], values: Mapping[str, str] | None = None) -> list[tuple[str, Any]]:
        """The modality and the row's value of each image, video and audio clip; no file is opened.

        Raises:
            RowError: a section of the template fails for this row; names the section.
        """
        context = self._rounds("row", row, self._context("row", row, PromptSettings(values=values or {})))[0]
        return [item for media in self._turn_media("row", row, context) for item in media]

    def _turn_media(self, row_id: str, row: Mapping[str, Any], context: Context) -> list[list[tuple[str, Any]]]:
        return [turn.media(row_id, f"messages[{index}]", row, context) for index, turn in enumerate(self.turns)]

    def _context(self, row_id: str, row: Mapping[str, Any], prompting: PromptSettings) -> Context:
        return {**row, **self.values, **prompting.values, DRAW_VARIABLE: draw(prompting.seed, row_id, "phrasing")}

    def _rounds(self, row_id: str, row: Mapping[str, Any], context: Context) -> list[Context]:
        """The Jinja variables of each repetition."""
        if not self.repeat:
            return [context]
        lists: dict[str, list[Any]] = {}
        for name, field in self.repeat.items():
            values = row.get(field)
            if not isinstance(values, list) or not values:
                raise RowError(
                    row_id,
                    field,
                    "expected a non-empty list" + missing_field_hint(row, field),
                    "field_type" if field in row else "field_missing",
                )
            lists[name] = values
        counts = {field: len(lists[name]) for name, field in self.repeat.items()}
        if len(set(counts.values())) > 1:
            lengths = ", ".join(f"{count} {field}" for field, count in counts.items())
            raise RowError(row_id, next(iter(counts)), f"expected lists of equal length, got {lengths}", "field_type")
        return [context | dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]

    def _closed_answers(
        self, row_id: str, row: Mapping[str, Any], context: Context, prompting: PromptSettings
    ) -> ClosedAnswers | None:
        section = self.options or self.verbalizer
        return None if section is None else section.read(row_id, row, context, prompting)

    def _choices(self, row_id: str, row: Mapping[str, Any], context: Context, closed: ClosedAnswers | None) -> tuple[str, ...]:
        """The text of the last answer for each possible answer."""
        if closed is None or len(closed.alternatives) < 2 or self.turns[-1].role != "assistant":
            return ()
        where = f"messages[{len(self.turns) - 1}]"
        answers = [self.turns[-1].render(row_id, where, row, context | variables) for variables in closed.alternatives]
        return tuple(dict.fromkeys(answers))

    def _references(self, row_id: str, row: Mapping[str, Any], context: Context) -> tuple[str, ...]:
        if self.references is None:
            return ()
        values = evaluate_expression(row_id, "references", self.references, context, row)
        if not isinstance(values, list) or not values:
            raise RowError(row_id, "references", f"expected a non-empty list of answers, got {values!r}"[:200], "field_type")
        try:
            return tuple(as_text(value) for value in values)
        except ValueError as error:
            raise RowError(row_id, "references", str(error), "field_type") from error


def _with_native(
    row_id: str, where: str, content: list[dict[str, Any]], written: WrittenRegions, images: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The blocks of a message, with a block for each native region of its texts, whose text is in thousandths."""
    if not written.native:
        return content
    blocks = []
    for block in content:
        try:
            pieces = native_pieces(block["text"], written.native) if block["type"] == "text" else []
        except (ValueError, LookupError) as error:
            raise RowError(row_id, where, str(error), "template_fails") from error
        blocks += [block] if block["type"] != "text" else []
        for piece in pieces:
            if isinstance(piece, str):
                blocks.append({"type": "text", "text": piece})
            else:
                text = thousandths(piece.region)
                blocks.append({"type": "text", "text": text, "native": piece, "region_image": images[0]["image"]})
    return blocks


def _resolve(row_id: str, where: str, row: Mapping[str, Any], value: Any, rules: MediaRules) -> Media:
    """Like `resolve_row_media`, with errors that name the column with the value, if exactly one column has it."""
    try:
        return resolve_row_media(row_id, where, value, rules)
    except RowError as error:
        columns = [
            name for name, field in row.items() if value and (field == value or (isinstance(field, list) and value in field))
        ]
        raise RowError(row_id, columns[0] if len(columns) == 1 else where, error.detail, error.issue) from error
