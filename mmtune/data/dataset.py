"""The training set: rows of every source, encoded lazily in data-loader workers, with the faults counted by row."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from mmtune.data.encode import IGNORE_INDEX, OverLength, encode_sample
from mmtune.data.media import Media, image_size
from mmtune.data.message import RowError, Sample
from mmtune.data.reader import readers
from mmtune.errors import UserError
from mmtune.recipe import Source


class Samples(Sequence[Sample]):
    """The rows of several sources in order, turned into samples when asked for."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """
        Raises:
            UserError: a missing or unreadable file, or an unknown template.
        """
        self._parts = []
        for reader in readers(sources):
            rows = reader.open()
            self._parts.append((reader, rows, min(len(rows), reader.source.limit or len(rows))))
        self._ends = list(accumulate(count for *_, count in self._parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """The sample, or a RowError that names the row."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        reader, rows, count = self._parts[part]
        row_id, row = rows[index - self._ends[part] + count]
        return reader.sample(row_id, row)


@dataclass(frozen=True)
class Fault:
    """A row that did not train, and why."""

    row: str
    field: str
    detail: str


@dataclass
class DataReport:
    """What became of the rows: written to the run directory as `data_report.json`."""

    rows: int
    checked: int = 0
    dropped_over_length: list[Fault] = field(default_factory=list)
    quarantined: list[Fault] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)

    def add(self, error: RowError) -> None:
        """Count a row once, however many epochs meet it.

        Raises:
            StopRun: the error itself, when it is one that no bound excuses.
        """
        if isinstance(error, StopRun):
            raise error
        if error.row in self._seen:
            return
        self._seen.add(error.row)
        faults = self.dropped_over_length if isinstance(error, OverLength) else self.quarantined
        faults.append(Fault(error.row, error.field, error.detail))

    def stop_past(self, max_bad_fraction: float) -> None:
        """
        Raises:
            UserError: when more rows are quarantined than the recipe allows, naming the first ten.
        """
        if len(self.quarantined) > max_bad_fraction * self.rows:
            raise UserError(
                f"{len(self.quarantined)} of {self.rows} rows cannot train, more than data.max_bad_fraction: "
                f"{max_bad_fraction:g} allows:\n{self.listing()}"
            )

    def listing(self) -> str:
        """The first ten quarantined rows, a line each."""
        return "\n".join(f"  {fault.row}: {fault.field}: {fault.detail}" for fault in self.quarantined[:10])

    def summary(self) -> str:
        """One line for the terminal."""
        counts = (
            f"{self.rows:,} rows, {len(self.quarantined):,} quarantined, {len(self.dropped_over_length):,} dropped as too long"
        )
        return f"data: {counts}"

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        report = {name: value for name, value in asdict(self).items() if name != "_seen"}
        # A file name that is not UTF-8 reaches Python as lone surrogates; written as \udcXX they are valid JSON.
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")


def check_rows(samples: Samples, report: DataReport, limit: int) -> None:
    """Read up to `limit` rows, spread evenly, and their images' headers; faults go to the report. Decodes nothing."""
    count = min(limit, len(samples))
    for step in range(count):
        try:
            sample = samples[step * len(samples) // count]
            for media in sample.images:
                _check_header(sample.id, media)
        except RowError as error:
            report.add(error)
    report.checked = count


def _check_header(row_id: str, media: Media) -> None:
    try:
        image_size(media)
    except ValueError as error:
        raise RowError(row_id, "image", str(error)) from error


class StopRun(RowError):
    """A row that the recipe says ends the run, whatever `data.max_bad_fraction` allows."""


class TrainingSet(torch.utils.data.Dataset[dict[str, torch.Tensor] | RowError]):
    """Encoded samples by index; a row that fails comes back as its RowError, for the collator to set aside."""

    def __init__(self, samples: Samples, processor: ProcessorMixin, max_tokens: int | None, over_length: str) -> None:
        self._samples = samples
        self._processor = processor
        self._max_tokens = max_tokens
        self._over_length = over_length

    def __len__(self) -> int:
        return len(self._samples)

    def with_image(self) -> dict[str, torch.Tensor] | None:
        """The first row with an image that can be encoded, with no position supervised; None if there is none."""
        for index in range(len(self)):
            with contextlib.suppress(RowError):  # met again, and counted, when it is trained on
                if self._samples[index].images:
                    row = encode_sample(self._samples[index], self._processor, self._max_tokens)
                    return {**row, "labels": torch.full_like(row["labels"], IGNORE_INDEX)}
        return None

    def __getitem__(self, index: int) -> dict[str, torch.Tensor] | RowError:
        try:
            return encode_sample(self._samples[index], self._processor, self._max_tokens)
        except OverLength as error:
            if self._over_length == "error":
                return StopRun(error.row, error.field, f"{error.detail} (data.over_length: drop_sample would drop it)")
            return error
        except RowError as error:
            return error


def iterate_rows(samples: Samples) -> Iterator[Sample]:
    """Every sample in order; raises at the first row that fails."""
    return (samples[index] for index in range(len(samples)))
