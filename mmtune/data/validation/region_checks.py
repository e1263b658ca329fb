"""Checks of regions: conventions that contradict the rows, and fields that look like boxes and that no template reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmtune.data.message import RowError
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.source import Row
from mmtune.data.templates.region_declaration import RegionDeclaration
from mmtune.data.templates.regions import BOX_FIELDS, LAYOUTS, UNITS, RowConvention
from mmtune.data.validation.issues import DataIssueError, Issue, new_issue

CONTRADICTED = 0.1
"""The share of rows that contradict their declared convention, from which another one is looked for."""
COMPARED_ROWS = 1000
"""About this many rows of a source, evenly spaced, are compared with every convention: it takes a millisecond a row."""
NAMED_CONVENTIONS = 3
"""At most this many conventions are named, where several fit equally well."""

RowConventions = Mapping[str, frozenset[RowConvention]]
"""For each section of regions of a data template, the conventions in which all regions of a row are possible."""


def row_conventions(reader: SourceReader, position: int, rows: int, row_id: str, row: Row) -> RowConventions | None:
    """The conventions that fit a row.

    Args:
        position: of the row in its source.
        rows: the number of rows of the source.

    Returns:
        None if the row is not one of `COMPARED_ROWS`, the template declares no regions, or the row has none that can be read.
    """
    if not reader.template.regions or position % max(1, rows // COMPARED_ROWS):
        return None
    try:
        return reader.fitting_conventions(row_id, row)
    except (RowError, DataIssueError):
        return None


class ConventionCounts:
    """Counts the rows of a source by the conventions that fit their regions.

    Args:
        sections: the declared regions, by name.
    """

    def __init__(self, sections: Mapping[str, RegionDeclaration]) -> None:
        self._sections = sections
        self._rows = 0
        self._fitting: dict[str, Counter[RowConvention]] = {name: Counter() for name in sections}
        self._contradicting: dict[str, list[str]] = {name: [] for name in sections}

    def add(self, row_id: str, conventions: RowConventions, faulty: Sequence[Issue]) -> None:
        """Count a row; `faulty` are its issues."""
        self._rows += 1
        for name, fitting in conventions.items():
            self._fitting[name].update(fitting)
            if any(issue.field == name and issue.issue.startswith("box_") for issue in faulty):
                self._contradicting[name].append(row_id)

    def issues(self) -> Iterator[Issue]:
        """The sections that many rows contradict, with the conventions that fit nearly all, at the first such row."""
        for name, section in self._sections.items():
            rows = self._contradicting[name]
            if len(rows) <= CONTRADICTED * self._rows:
                continue
            best, count = self._best(name, section)
            declared = f"{section.convention}{' of an image of `size`' if section.size else ''}"
            detail = f"{len(rows):,} of {self._rows:,} compared rows contradict {declared}"
            if self._rows - count <= CONTRADICTED * len(rows):
                detail += f"; {count:,} rows fit {' or '.join(map(str, best))}"
            else:
                detail += f"; no convention fits the rows: the best one, {best[0]}, fits {count:,}"
            yield new_issue(rows[0], name, "box_convention", detail)

    def _best(self, name: str, section: RegionDeclaration) -> tuple[list[RowConvention], int]:
        """The conventions that fit the most rows, the likeliest first, and how many rows they fit."""
        counts = self._fitting[name]
        in_order = [RowConvention(section.kind, layout, unit) for unit in UNITS for layout in LAYOUTS[section.kind]]
        most = max(counts[each] for each in in_order)
        best = [each for each in in_order if counts[each] == most]
        units = {each.unit: each for each in reversed(best)}  # the first layout of each unit
        return [each for each in best if units[each.unit] == each][:NAMED_CONVENTIONS], most


def suspect_boxes(row_id: str, row: Row, size: tuple[int, int]) -> Iterator[Issue]:
    """Issues of fields with the name of a box that the template does not read, and that are outside the image in both layouts."""
    for name in BOX_FIELDS:
        value: Any = row.get(name)
        is_list_of_boxes = isinstance(value, list) and bool(value) and all(isinstance(box, list) for box in value)
        boxes: list[Any] = value if is_list_of_boxes else [value]
        for number, box in enumerate(boxes):
            is_box = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)
            if is_box and not _is_inside(box, size):
                where = f"{name}[{number}]" if is_list_of_boxes else name
                yield new_issue(row_id, where, "box_suspect", f"{box} in an image of {size[0]} x {size[1]} pixels")


def _is_inside(box: list[float], size: tuple[int, int]) -> bool:
    left, top, third, fourth = box
    if not all(math.isfinite(edge) and edge >= 0 for edge in box):
        return False
    corners = left < third <= size[0] and top < fourth <= size[1]
    return corners or (left + third <= size[0] and top + fourth <= size[1])
