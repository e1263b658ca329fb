"""Declarations of a data template: where the regions of a row's image are, and their convention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmtune.data.media.media import Media, image_size
from mmtune.data.message import RowError
from mmtune.data.templates.expressions import TemplateSection, check_jinja, evaluate_expression, names_read
from mmtune.data.templates.regions import Region, RowConvention, Unit, conventions_that_fit, read_regions
from mmtune.data.validation.issues import DataIssueError, issue_type_of
from mmtune.families.box_convention import RegionKind

Rounds = Sequence[Mapping[str, Any]]
"""The Jinja variables of each repetition of the messages."""


class RegionDeclaration(TemplateSection):
    """Regions of one kind in the row's image, and the convention of their numbers."""

    kind: ClassVar[RegionKind]

    value: str = Field(description="Jinja: the numbers of one region, or a list of them.")
    layout: str
    unit: Unit = Field(
        default="pixels",
        description="What the numbers are: pixels of the upright image, fractions (0 to 1), percent (0 to 100), or thousandths.",
    )
    size: str | None = Field(
        default=None, description="Jinja: [width, height] of the resized image that pixels are of; null: the image itself."
    )
    outside: Literal["error", "clip"] = Field(
        default="error", description="Whether a region partly outside the image is an error of the row, or is clipped."
    )

    @field_validator("value", "size")
    @classmethod
    def _jinja(cls, source: str | None) -> str | None:
        if source is not None:
            check_jinja(source)
        return source

    @model_validator(mode="after")
    def _size_of_pixels(self) -> RegionDeclaration:
        if self.size is not None and self.unit != "pixels":
            raise ValueError(f"'size' is of pixels and cannot be used with unit: {self.unit}; remove it")
        return self

    @property
    def convention(self) -> RowConvention:
        """The convention of the rows."""
        return RowConvention(self.kind, self.layout, self.unit)

    @property
    def names_read(self) -> set[str]:
        """The variables that the Jinja reads."""
        return names_read(self.value) | names_read(self.size or "")

    def read(
        self, section: str, row_id: str, row: Mapping[str, Any], rounds: Rounds, images: Sequence[Media]
    ) -> list[list[Region]]:
        """The regions for each repetition of the messages.

        Args:
            section: the name of the declaration in the template.

        Raises:
            RowError: an invalid region, one outside the image, or not exactly one image in the row.
        """
        try:
            size = image_size(only_image(section, row_id, images))
            return [
                read_regions(value, self.convention, size, self.outside == "clip", self._resized(section, row_id, row, context))
                for value, context in self._values(section, row_id, row, rounds)
            ]
        except ValueError as error:
            raise RowError(row_id, section, str(error), issue_type_of(error)) from error

    def fitting(
        self, section: str, row_id: str, row: Mapping[str, Any], rounds: Rounds, images: Sequence[Media]
    ) -> frozenset[RowConvention]:
        """The conventions in which all regions of the row are possible; arguments as `read`.

        Raises:
            RowError: the row has no value for the regions, or no image.
        """
        size = image_size(only_image(section, row_id, images))
        fitting = [conventions_that_fit(value, self.kind, size) for value, _ in self._values(section, row_id, row, rounds)]
        return frozenset.intersection(*fitting)

    def _values(
        self, section: str, row_id: str, row: Mapping[str, Any], rounds: Rounds
    ) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        for context in rounds:
            yield evaluate_expression(row_id, section, self.value, context, row), context

    def _resized(
        self, section: str, row_id: str, row: Mapping[str, Any], context: Mapping[str, Any]
    ) -> tuple[float, float] | None:
        if self.size is None:
            return None
        size = evaluate_expression(row_id, f"{section}.size", self.size, context, row)
        sides = isinstance(size, (list, tuple)) and all(isinstance(side, (int, float)) and 0 < side < 1e9 for side in size)
        if not sides or len(size) != 2:
            raise DataIssueError("field_type", f"size: expected [width, height] of the resized image, got {size!r}"[:200])
        return size[0], size[1]


class BoxDeclaration(RegionDeclaration):
    """Boxes. Jinja reads the first one as `box` and all of them as `boxes`."""

    kind = "box"
    layout: Literal["xyxy", "xywh", "cxcywh", "yxyx"] = Field(
        description="Two corners; corner with width and height; center with width and height; or two corners with y before x."
    )


class PointDeclaration(RegionDeclaration):
    """Points. Jinja reads the first one as `point` and all of them as `points`."""

    kind = "point"
    layout: Literal["xy", "yx"] = "xy"


class QuadDeclaration(RegionDeclaration):
    """Quadrilaterals. Jinja reads the first one as `quad` and all of them as `quads`."""

    kind = "quad"
    layout: Literal["xyxyxyxy", "yxyxyxyx"] = "xyxyxyxy"


def only_image(section: str, row_id: str, images: Sequence[Media]) -> Media:
    """The image of the regions. Raises RowError if the row does not have exactly one."""
    if len(images) != 1:
        raise RowError(row_id, section, f"expected one image in a row with {section}, got {len(images)}", "box_malformed")
    return images[0]
