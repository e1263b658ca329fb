"""Recipe keys about the images of a source: `window` and `augment`."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, StrictFloat, StrictInt
from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.section import Section

WINDOW = (
    "Grey images with more than 8 bits: the values that become black and white, [LOW, HIGH]. null: 16 bits keep the upper 8, "
    "DICOM uses its own window or its full range, other images are an error."
)

Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]


class Augment(Section):
    """Augmentation: random changes to the training images, drawn again each time that a row is trained on."""

    resize: Annotated[StrictInt, Field(ge=32)] | None = Field(
        default=None, description="Reduce the longer side of larger images to this many pixels. Not random."
    )
    crop: Annotated[StrictFloat, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="The smallest fraction of each side that a random crop keeps; the crop is resized to the image's size.",
    )
    flip: Fraction = Field(default=0.0, description="The probability of a horizontal flip.")
    brightness: Fraction = Field(default=0.0, description="A random factor from 1 - brightness to 1 + brightness.")
    contrast: Fraction = Field(default=0.0, description="As brightness.")
    saturation: Fraction = Field(default=0.0, description="As brightness.")

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        return values, [error_at((), "expected at least one key; leave augment out for no augmentation")] if values == {} else []

    @property
    def moves(self) -> bool:
        """Whether positions in the image change, so that boxes must change too."""
        return self.resize is not None or self.crop < 1 or self.flip > 0


def window_errors(values: Any) -> list[InitErrorDetails]:
    """Check the `window` of a source and convert it to two floats."""
    window = values.get("window") if isinstance(values, dict) else None
    if window is None:
        return []
    pair = list(window) if isinstance(window, (list, tuple)) else []
    numbers = all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in pair)
    if len(pair) == 2 and numbers and pair[0] < pair[1]:
        values["window"] = tuple(map(float, pair))
        return []
    values["window"] = None
    hint = "a window of center c and width w is [c - w/2, c + w/2]"
    return [error_at("window", f"expected [LOW, HIGH], two numbers, the lower one first, got {format_value(window)}; {hint}")]


def evaluation_augment_errors(values: Any) -> list[InitErrorDetails]:
    """Reject `augment` in the sources of the evaluation."""
    sources = values.get("data") if isinstance(values, dict) else None
    sources = sources if isinstance(sources, (list, tuple)) else ()
    return [
        error_at(("data", number, "augment"), "not supported in evaluate.data: held-out rows are not augmented; leave it out")
        for number, source in enumerate(sources)
        if isinstance(source, dict) and source.get("augment") is not None
    ]
