"""Section of a source of rows: where they are, how to read them, and what is done to their images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, StrictBool, StrictFloat, StrictInt
from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.prompt_sections import (
    WHERE,
    FieldsToValues,
    HeldOut,
    LabelsToWords,
    NamesToText,
    Shots,
    held_out_errors,
    values_errors,
    verbalizer_errors,
    where_errors,
)
from mmtune.recipe.section import PathText, Section, Text

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
    def is_random(self) -> bool:
        """Whether a row's images differ between its visits."""
        return self.crop < 1 or self.flip > 0 or max(self.brightness, self.contrast, self.saturation) > 0

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


def evaluation_source_errors(values: Any) -> list[InitErrorDetails]:
    """Reject `augment` and `held_out` in the sources of the evaluation."""
    sources = values.get("data") if isinstance(values, dict) else None
    sources = sources if isinstance(sources, (list, tuple)) else ()
    reasons = {
        "augment": "held-out rows are not augmented; leave it out",
        "held_out": "all rows of this source are held out; give it to a source of data.train, or leave it out",
    }
    return [
        error_at(("data", number, key), f"not supported in evaluate.data: {reason}")
        for number, source in enumerate(sources)
        for key, reason in reasons.items()
        if isinstance(source, dict) and source.get(key) is not None
    ]


class Source(Section):
    """Source of rows: where they are and how to read them."""

    path: PathText = Field(
        description="A file of rows (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .tar), a glob or brace list of such files, a "
        "folder of them, a directory that datasets saved, or a hub id (org/name@config:split)."
    )
    template: PathText = Field(description="The name of a shipped data template, or a .yaml file.")
    media_root: PathText | None = Field(
        default=None, description="The directory that media paths are relative to; null: the directory of the file."
    )
    allow_outside_root: StrictBool = Field(
        default=False, description="Allow media paths outside media_root: .., absolute paths and symbolic links."
    )
    allow_urls: StrictBool = Field(
        default=False, description="Download media from http and https URLs, within limits, into a cache."
    )
    window: tuple[StrictFloat, StrictFloat] | None = Field(default=None, description=WINDOW)
    augment: Augment | None = Field(default=None, description="Random changes to the training images; null: none.")
    limit: Annotated[StrictInt, Field(ge=1)] | None = Field(default=None, description="Use only this many first rows; null: all.")
    weight: Annotated[StrictFloat, Field(gt=0)] = Field(
        default=1.0,
        description="How often an epoch repeats the source (data.mix: repeats), or its share of an epoch (data.mix: ratio).",
    )
    where: FieldsToValues | None = Field(default=None, description=WHERE)
    held_out: HeldOut | None = Field(
        default=None,
        description="Training sources: hold out this fraction of the rows, or this number, and evaluate on them. Rows that share "
        "an image stay together.",
    )
    image_placeholder: Literal["error", "add"] = Field(
        default="error",
        description="A row with images and no placeholder: an error, or add the images at the start of the first user turn.",
    )
    ignore: tuple[Text, ...] = Field(
        default=(),
        description="Fields of the rows with media that are left out on purpose; other unread media fields are an error.",
    )
    join: PathText | None = Field(
        default=None, description="A second file whose rows are joined to the rows, for templates that need one (vqa_v2)."
    )
    values: NamesToText | None = Field(
        default=None, description="Values of the template's parameters, such as {images: val2014} for vqa_v2."
    )
    system: Text | None = Field(default=None, description="A system message for rows without one.")
    shots: Shots | None = Field(default=None, description="Few-shot examples before each question.")
    shuffle_options: StrictBool = Field(
        default=False, description="Shuffle the answer options, for templates that declare options."
    )
    verbalizer: LabelsToWords | None = Field(
        default=None,
        description="Answer words by label, {'0': cat, '1': dog}, or as a list for labels 0, 1, ...; for templates that declare "
        "labels.",
    )
    seed: StrictInt = Field(
        default=0,
        description="Seed of the choice of prompts and examples, of the option order (the same in every epoch), of augment and "
        "of held_out.",
    )

    _is_held_out: bool = PrivateAttr(default=False)

    @property
    def is_held_out(self) -> bool:
        """Whether the source has the held-out rows only; otherwise, with `held_out`, it has the others."""
        return self._is_held_out

    def held_out_part(self) -> Source:
        """The source of the rows that `held_out` takes from the training data, without augmentation."""
        part = self.model_copy(update={"augment": None, "weight": 1.0})
        part._is_held_out = True
        return part

    def training_part(self) -> Source:
        """The source of the rows that train."""
        part = self.model_copy()
        part._is_held_out = False
        return part

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if isinstance(values, dict) and isinstance(values.get("shots"), Mapping) and "path" in values:
            values["shots"] = {"path": values["path"], **values["shots"]}
        checks = (where_errors, held_out_errors, verbalizer_errors, values_errors, window_errors)
        return values, [error for check in checks for error in check(values)]


def source_names(sources: Sequence[Source]) -> list[str]:
    """Display names of the sources: the file name, or the path if file names are not unique; sources of one file are numbered."""
    files = Counter(Path(path).name for path in {source.path for source in sources})
    repeats: Counter[str] = Counter()
    names = []
    for source in sources:
        name = source.path if files[Path(source.path).name] > 1 else Path(source.path).name
        repeats[name] += 1
        names.append(name if repeats[name] == 1 else f"{name} ({repeats[name]})")
    return names
