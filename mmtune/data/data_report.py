"""Data report of a run: quarantined, dropped and changed rows by id, written to `data_report.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmtune.data.encoding.encode import OverLength
from mmtune.data.message import RowError
from mmtune.data.validation.issues import ISSUE_TYPES
from mmtune.utils.errors import UserError
from mmtune.utils.files import report_disk_errors


class StopRunError(RowError):
    """A row error that ends the run regardless of `data.max_bad_fraction`, according to the recipe."""


class MediaChanged(RowError):
    """A note, not an error: media of the row were dropped or resized so that it fits `data.max_tokens`."""


@dataclass(frozen=True)
class RowIssue:
    """A row that was not used, or was changed, with the reason; `issue` is the issue type, a key of `ISSUE_TYPES`."""

    row: str
    field: str
    detail: str
    issue: str = "row_unusable"


NOT_FINITE = "its gradients are not finite"
NO_SAMPLE = "none of its rows can train"
"""Reasons for skipping a step."""


@dataclass(frozen=True)
class SkippedStep:
    """A skipped optimizer step, with the rows of its batches in all processes."""

    step: int
    rows: list[str]
    reason: str


@dataclass
class DataReport:
    """The quarantined, dropped and changed rows of a run.

    Attributes:
        rows: number of rows of the data; for a stream, the number of rows that the run reads.
        checked: number of rows checked (text and image headers) before weights were loaded.
        streamed: whether rows are counted again in every epoch, as in `rows` of a stream.
        held_out: by the name of a source, the counts of its split into training and held-out rows.
        dropped_over_length: rows dropped as too long.
        media_changed: rows with dropped or resized media.
        quarantined: rows with errors.
        skipped_steps: steps without a usable sample, and those allowed by `data.max_nonfinite_steps`.
    """

    rows: int
    checked: int = 0
    streamed: bool = False
    held_out: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped_over_length: list[RowIssue] = field(default_factory=list)
    media_changed: list[RowIssue] = field(default_factory=list)
    quarantined: list[RowIssue] = field(default_factory=list)
    skipped_steps: list[SkippedStep] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)
    _bad_count: int = field(default=0, init=False, repr=False)

    def add(self, error: UserError) -> None:
        """Report a row; a row that occurs in several epochs is listed once.

        Raises:
            UserError: the error itself, if it is a StopRunError or not the error of one row.
        """
        if isinstance(error, StopRunError) or not isinstance(error, RowError):
            raise error
        if type(error) not in (OverLength, MediaChanged):
            self._bad_count += 1
        if error.row in self._seen:
            return
        self._seen.add(error.row)
        lists = {OverLength: self.dropped_over_length, MediaChanged: self.media_changed}
        lists.get(type(error), self.quarantined).append(RowIssue(error.row, error.field, error.detail, error.issue))

    def stop_past(self, max_bad_fraction: float) -> None:
        """Stop the run if too many rows are quarantined.

        Raises:
            UserError: more rows are quarantined than `data.max_bad_fraction` allows (listed by issue type), or no row is left.
        """
        bad = self._bad_count if self.streamed else len(self.quarantined)
        if bad > max_bad_fraction * self.rows:
            raise UserError(
                f"{bad} of {self.rows} rows cannot train, more than data.max_bad_fraction: "
                f"{max_bad_fraction:g} allows:\n{self.listing()}"
            )
        if len(self.quarantined) + len(self.dropped_over_length) >= self.rows:
            raise UserError("no row can train: every one was dropped or quarantined; see data_report.json in the run directory")

    def load(self, path: Path) -> None:
        """Add the report of an earlier part of the run."""
        earlier = json.loads(path.read_text(encoding="utf-8"))
        self.skipped_steps += [SkippedStep(**each) for each in earlier.get("skipped_steps", [])]
        for rows, name in (
            (self.dropped_over_length, "dropped_over_length"),
            (self.media_changed, "media_changed"),
            (self.quarantined, "quarantined"),
        ):
            for issue in (RowIssue(**each) for each in earlier[name]):
                if issue.row not in self._seen:
                    self._seen.add(issue.row)
                    rows.append(issue)

    def listing(self) -> str:
        """The quarantined rows by issue type: the first row of each type, and the number of others, as in `mmtune data check`."""
        by_type: dict[str, list[RowIssue]] = {}
        for issue in self.quarantined:
            by_type.setdefault(issue.issue, []).append(issue)
        lines = []
        for name, (first, *others) in by_type.items():
            lines.append(f"  {first.row}: {first.field}: {first.detail}")
            if others:
                rows = ", ".join(issue.row for issue in others[:2]) + (", ..." if len(others) > 2 else "")
                lines.append(f"    and {len(others):,} more ({name}): {rows}; {ISSUE_TYPES[name].fix}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line for the terminal."""
        counts = (
            f"{self.rows:,} rows, {len(self.quarantined):,} quarantined, {len(self.dropped_over_length):,} dropped as too long"
        )
        changed = f", {len(self.media_changed):,} with media dropped or resized" if self.media_changed else ""
        reasons = ((reason, self.count_skipped(reason)) for reason in (NO_SAMPLE, NOT_FINITE))
        skipped = "".join(f", {count:,} steps skipped ({reason})" for reason, count in reasons if count)
        return f"data: {counts}{changed}{skipped}"

    def count_skipped(self, reason: str) -> int:
        """Number of steps that were skipped for a reason."""
        return sum(step.reason == reason for step in self.skipped_steps)

    def metrics(self) -> dict[str, int]:
        """Counts for the summary of a run."""
        return {
            "rows": self.rows,
            "dropped_over_length": len(self.dropped_over_length),
            "quarantined": len(self.quarantined),
            "skipped_steps": len(self.skipped_steps),
            "steps_without_samples": self.count_skipped(NO_SAMPLE),
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        report = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        # A file name that is not UTF-8 has lone surrogates in Python, which are valid JSON as escapes \udcXX.
        with report_disk_errors(path):
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
