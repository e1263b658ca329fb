"""Box conventions: the coordinates, their order and the text in which the models of a family write a bounding box."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2: upper left and lower right corner, as fractions of the image's width and height, from 0 to 1."""

Size = tuple[int, int]
"""(width, height) in pixels, of the image as the image processor resizes it."""

UNKNOWN_CONVENTION = (
    "it is not known how its models write boxes, so the filter `native` cannot be used; write them with {{ box | thousandths }}, "
    "fractions or pixels in the data template"
)
"""The error of a family without a convention."""

KOSMOS2_CELLS = 32
"""Cells in a row and in a column of Kosmos-2's grid."""


@dataclass(frozen=True)
class BoxConvention:
    """How the models of a family write a box.

    Attributes:
        coordinates: a function from the corners and the size of the resized image to the numbers of the text.
        form: format string of a box, of the numbers `{0}`, `{1}`, ...
        labelled: format string of a box with its `{label}`.
        meaning: the coordinate system, in words.
        source: where the family's authors document it.
        label_text: how a label is written.
    """

    coordinates: Callable[[Corners, Size], tuple[int, ...]]
    form: str
    labelled: str
    meaning: str
    source: str
    label_text: Callable[[str], str] = str

    def write(self, corners: Corners, size: Size, label: str | None = None) -> str:
        """The text of a box.

        Args:
            corners: the box.
            size: of the image as the image processor resizes it.
            label: the name or the description of the object; None: the box alone.
        """
        numbers = self.coordinates(corners, size)
        return self.form.format(*numbers) if label is None else self.labelled.format(*numbers, label=self.label_text(label))


def _json_text(text: str) -> str:
    """A text as a JSON string; characters that are not ASCII stay."""
    return json.dumps(text, ensure_ascii=False)


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _thousandths(corners: Corners, size: Size) -> tuple[int, ...]:
    return tuple(_round(1000 * share) for share in corners)


def _pixels(corners: Corners, size: Size) -> tuple[int, ...]:
    sides = (*size, *size)
    return tuple(min(_round(share * side), side - 1) for share, side in zip(corners, sides, strict=True))


def _1024_locations(corners: Corners, size: Size) -> tuple[int, ...]:
    return tuple(_round(1023 * share) for share in corners)


def _1000_bins(corners: Corners, size: Size) -> tuple[int, ...]:
    return tuple(min(math.floor(1000 * share), 999) for share in corners)


def _cells(corners: Corners, size: Size) -> tuple[int, ...]:
    """The cells with the upper left and with the lower right corner, counted along the rows."""
    x1, y1 = (min(math.floor(share * KOSMOS2_CELLS), KOSMOS2_CELLS - 1) for share in corners[:2])
    x2, y2 = (max(math.ceil(share * KOSMOS2_CELLS) - 1, 0) for share in corners[2:])
    return y1 * KOSMOS2_CELLS + x1, y2 * KOSMOS2_CELLS + x2


_JSON_FORMS = ('{{"bbox_2d": [{0}, {1}, {2}, {3}]}}', '{{"bbox_2d": [{0}, {1}, {2}, {3}], "label": {label}}}')
_QWEN = "https://github.com/QwenLM/Qwen3-VL"

QWEN2_VL = BoxConvention(
    _thousandths,
    "<|box_start|>({0},{1}),({2},{3})<|box_end|>",
    "<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({0},{1}),({2},{3})<|box_end|>",
    "thousandths of the image",
    f"{_QWEN}/issues/105, qwen-vl-finetune/tools/process_bbox.ipynb",
)
QWEN2_5_VL = BoxConvention(
    _pixels,
    *_JSON_FORMS,
    "pixels of the resized image",
    f"{_QWEN}/issues/676, qwen-vl-finetune/tools/process_bbox.ipynb",
    _json_text,
)
QWEN3_VL = BoxConvention(_thousandths, *_JSON_FORMS, "thousandths of the image", f"{_QWEN}/issues/1486", _json_text)
INTERNVL = BoxConvention(
    _thousandths,
    "<box>[[{0}, {1}, {2}, {3}]]</box>",
    "<ref>{label}</ref><box>[[{0}, {1}, {2}, {3}]]</box>",
    "thousandths of the image",
    "https://internvl.readthedocs.io/en/latest/get_started/chat_data_format.html",
)
PALIGEMMA = BoxConvention(
    _1024_locations,
    "<loc{1:04d}><loc{0:04d}><loc{3:04d}><loc{2:04d}>",
    "<loc{1:04d}><loc{0:04d}><loc{3:04d}><loc{2:04d}> {label}",
    "1,024 positions, y before x",
    "arXiv 2407.07726; `refcoco_mask2str` of google-research/big_vision",
)
FLORENCE2 = BoxConvention(
    _1000_bins,
    "<loc_{0}><loc_{1}><loc_{2}><loc_{3}>",
    "{label}<loc_{0}><loc_{1}><loc_{2}><loc_{3}>",
    "1,000 bins of the image",
    "arXiv 2311.06242; transformers' Florence2PostProcessor",
)
KOSMOS2 = BoxConvention(
    _cells,
    "<object><patch_index_{0:04d}><patch_index_{1:04d}></object>",
    "<phrase>{label}</phrase><object><patch_index_{0:04d}><patch_index_{1:04d}></object>",
    "32 x 32 cells of the image",
    "arXiv 2306.14824; transformers' Kosmos2Processor",
)
