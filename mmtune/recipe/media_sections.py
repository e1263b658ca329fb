"""Recipe keys of a source's images: `window` and `augment`."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, StrictFloat, StrictInt
from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.section import Section

WINDOW = (
    "The values of grey images with more than 8 bits that become black and white: [LOW, HIGH]. null: 16 bits keep the upper 8, "
    "DICOM has its own window or its full range, others are refused."
)

Share = Annotated[StrictFloat, Field(ge=0, le=1)]


class Augment(Section):
    """Random changes to the training images, drawn again every time that a row trains."""

    resize: Annotated[StrictInt, Field(ge=32)] | None = Field(
        default=None, description="Bring an image's longer side down to so many pixels; smaller images stay. Not random."
    )
    crop: Annotated[StrictFloat, Field(gt=0, le=1)] = Field(
        default=1.0, description="The least share of each side that a random cut keeps; the cut is resized to the image's size."
    )
    flip: Share = Field(default=0.0, description="The probability that left and right change places.")
    brightness: Share = Field(default=0.0, description="A factor is drawn from 1 - this to 1 + this.")
    contrast: Share = Field(default=0.0, description="As brightness.")
    saturation: Share = Field(default=0.0, description="As brightness.")

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        return given, [error_at((), "names nothing to change; leave it out")] if given == {} else []

    @property
    def moves(self) -> bool:
        """Whether it changes where things are in an image."""
        return self.resize is not None or self.crop < 1 or self.flip > 0


def window_errors(given: Any) -> list[InitErrorDetails]:
    """Check a source's `window`, two numbers."""
    window = given.get("window") if isinstance(given, dict) else None
    if window is None:
        return []
    pair = list(window) if isinstance(window, (list, tuple)) else []
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in pair)
    if len(pair) == 2 and numbers and pair[0] < pair[1]:
        given["window"] = tuple(map(float, pair))
        return []
    given["window"] = None
    told = "a window of center c and width w is [c - w/2, c + w/2]"
    return [error_at("window", f"expected [LOW, HIGH], two numbers, the lower one first, got {format_value(window)}; {told}")]


def evaluation_augment_errors(given: Any) -> list[InitErrorDetails]:
    """Refuse `augment` in the sources of the evaluation."""
    sources = given.get("data") if isinstance(given, dict) else None
    sources = sources if isinstance(sources, (list, tuple)) else ()
    having = [number for number, source in enumerate(sources) if isinstance(source, dict) and source.get("augment") is not None]
    return [error_at(("data", number, "augment"), "held-out rows are never augmented; leave it out") for number in having]
