"""Box conventions: the coordinates, their order and the text in which the models of a family write a region of an image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

RegionKind = Literal["box", "point", "quad"]
"""A box, a point or a quadrilateral."""

KIND_NAMES: Mapping[RegionKind, str] = {"box": "boxes", "point": "points", "quad": "quadrilaterals"}
"""The plural of each kind, for messages."""

Shares = tuple[float, ...]
"""x1, y1, x2, y2, ... as fractions of the image's width and height: of a point, of the upper left and the lower right corner of a
box, or of the four corners of a quadrilateral."""

Size = tuple[int, int]
"""(width, height) in pixels, of the image as the image processor resizes it."""

KOSMOS2_CELLS = 32
"""Cells in a row and in a column of Kosmos-2's grid."""


def unknown_convention(kind: RegionKind) -> str:
    """The error of a family without a convention for a kind of region."""
    return (
        f"it is not known how its models write {KIND_NAMES[kind]}, so the filter `native` cannot be used; write them with "
        f"{{{{ {kind} | thousandths }}}}, fractions or pixels in the data template"
    )


@dataclass(frozen=True)
class BoxConvention:
    """How the models of a family write a region.

    Attributes:
        coordinates: a function from the fractions and the size of the resized image to the numbers of the text.
        scale: the number at the image's right and lower edge; None: its width and height as the image processor resizes it.
        box: format strings of a box, of the numbers `{0}`, `{1}`, ...: alone, and with its `{label}`.
        meaning: the coordinate system, in words.
        source: where the family's authors document it.
        label_text: how a label is written.
        others: the format strings of further kinds of regions that the family's authors document.
    """

    coordinates: Callable[[Shares, Size], tuple[int, ...]]
    scale: int | None
    box: tuple[str, str]
    meaning: str
    source: str
    label_text: Callable[[str], str] = str
    others: Mapping[RegionKind, tuple[str, str]] = field(default_factory=dict)

    @property
    def forms(self) -> Mapping[RegionKind, tuple[str, str]]:
        """The format strings of each kind of region that the models write."""
        return {"box": self.box, **self.others}

    def write(self, kind: RegionKind, shares: Shares, size: Size, label: str | None = None) -> str:
        """The text of a region.

        Args:
            kind: one of `forms`.
            shares: the region.
            size: of the image as the image processor resizes it.
            label: the name or the description of the object; None: the region alone.
        """
        numbers = self.coordinates(shares, size)
        alone, labelled = self.forms[kind]
        return alone.format(*numbers) if label is None else labelled.format(*numbers, label=self.label_text(label))

    def extent(self, size: Size) -> Size:
        """The coordinates of the image's lower right corner, in an image of a size after resizing."""
        return size if self.scale is None else (self.scale, self.scale)


def _json_text(text: str) -> str:
    """A text as a JSON string; characters that are not ASCII stay."""
    return json.dumps(text, ensure_ascii=False)


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def _thousandths(shares: Shares, size: Size) -> tuple[int, ...]:
    return tuple(_round(1000 * share) for share in shares)


def _pixels(shares: Shares, size: Size) -> tuple[int, ...]:
    sides = size * (len(shares) // 2)
    return tuple(min(_round(share * side), side - 1) for share, side in zip(shares, sides, strict=True))


def _1024_locations(shares: Shares, size: Size) -> tuple[int, ...]:
    return tuple(_round(1023 * share) for share in shares)


def _1000_bins(shares: Shares, size: Size) -> tuple[int, ...]:
    return tuple(min(math.floor(1000 * share), 999) for share in shares)


def _cells(shares: Shares, size: Size) -> tuple[int, ...]:
    """The cells with the upper left and with the lower right corner, counted along the rows."""
    x1, y1 = (min(math.floor(share * KOSMOS2_CELLS), KOSMOS2_CELLS - 1) for share in shares[:2])
    x2, y2 = (max(math.ceil(share * KOSMOS2_CELLS) - 1, 0) for share in shares[2:])
    return y1 * KOSMOS2_CELLS + x1, y2 * KOSMOS2_CELLS + x2


_JSON_BOX = ('{{"bbox_2d": [{0}, {1}, {2}, {3}]}}', '{{"bbox_2d": [{0}, {1}, {2}, {3}], "label": {label}}}')
_JSON_POINT = ('{{"point_2d": [{0}, {1}]}}', '{{"point_2d": [{0}, {1}], "label": {label}}}')
_QWEN = "https://github.com/QwenLM/Qwen3-VL"
_QUAD_LOCATIONS = "".join(f"<loc_{{{number}}}>" for number in range(8))

QWEN2_VL = BoxConvention(
    _thousandths,
    1000,
    (
        "<|box_start|>({0},{1}),({2},{3})<|box_end|>",
        "<|object_ref_start|>{label}<|object_ref_end|><|box_start|>({0},{1}),({2},{3})<|box_end|>",
    ),
    "thousandths of the image",
    f"{_QWEN}/issues/105, qwen-vl-finetune/tools/process_bbox.ipynb",
)
QWEN2_5_VL = BoxConvention(
    _pixels,
    None,
    _JSON_BOX,
    "pixels of the resized image",
    f"{_QWEN}/issues/676, qwen-vl-finetune/tools/process_bbox.ipynb, cookbooks/spatial_understanding.ipynb",
    _json_text,
    {"point": _JSON_POINT},
)
QWEN3_VL = BoxConvention(
    _thousandths,
    1000,
    _JSON_BOX,
    "thousandths of the image",
    f"{_QWEN}/issues/1486, cookbooks/2d_grounding.ipynb",
    _json_text,
    {"point": _JSON_POINT},
)
INTERNVL = BoxConvention(
    _thousandths,
    1000,
    ("<box>[[{0}, {1}, {2}, {3}]]</box>", "<ref>{label}</ref><box>[[{0}, {1}, {2}, {3}]]</box>"),
    "thousandths of the image",
    "https://internvl.readthedocs.io/en/latest/get_started/chat_data_format.html",
)
PALIGEMMA = BoxConvention(
    _1024_locations,
    1024,
    ("<loc{1:04d}><loc{0:04d}><loc{3:04d}><loc{2:04d}>", "<loc{1:04d}><loc{0:04d}><loc{3:04d}><loc{2:04d}> {label}"),
    "1,024 positions, y before x",
    "arXiv 2407.07726; `refcoco_mask2str` of google-research/big_vision",
)
FLORENCE2 = BoxConvention(
    _1000_bins,
    1000,
    ("<loc_{0}><loc_{1}><loc_{2}><loc_{3}>", "{label}<loc_{0}><loc_{1}><loc_{2}><loc_{3}>"),
    "1,000 bins of the image",
    "arXiv 2311.06242; transformers' Florence2PostProcessor",
    others={"quad": (_QUAD_LOCATIONS, "{label}" + _QUAD_LOCATIONS)},
)
KOSMOS2 = BoxConvention(
    _cells,
    KOSMOS2_CELLS,
    (
        "<object><patch_index_{0:04d}><patch_index_{1:04d}></object>",
        "<phrase>{label}</phrase><object><patch_index_{0:04d}><patch_index_{1:04d}></object>",
    ),
    "32 x 32 cells of the image",
    "arXiv 2306.14824; transformers' Kosmos2Processor",
)
