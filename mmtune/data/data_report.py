"""What became of the rows of a run, by row id: `data_report.json`."""

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
    """A row that the recipe says ends the run, whatever `data.max_bad_fraction` allows."""


class MediaChanged(RowError):
    """No fault: a row that trains without some of its media, or with smaller ones, so that it fits `data.max_tokens`."""


@dataclass(frozen=True)
class RowIssue:
    """A row that did not train, or not as it was written, and why; `issue` is the kind of fault, a name in `ISSUE_TYPES`."""

    row: str
    field: str
    detail: str
    issue: str = "row_unusable"


NOT_FINITE = "its gradients are not finite"
NO_SAMPLE = "none of its rows can train"
"""Why a step is skipped."""


@dataclass(frozen=True)
class SkippedStep:
    """An optimizer step that changed nothing: why, and the rows of its batches in all processes."""

    step: int
    rows: list[str]
    reason: str


@dataclass
class DataReport:
    """What became of the rows: written to the run directory as `data_report.json`.

    Attributes:
        rows: how many the data hold; of a stream, how many the run takes.
        streamed: whether a row that comes again, in another epoch, counts again: of a stream, `rows` counts it so too.
        checked: how many had their text and image headers checked before weights were loaded.
        skipped_steps: those without a sample, and those that `data.max_nonfinite_steps` let pass.
    """

    rows: int
    checked: int = 0
    streamed: bool = False
    dropped_over_length: list[RowIssue] = field(default_factory=list)
    media_changed: list[RowIssue] = field(default_factory=list)
    quarantined: list[RowIssue] = field(default_factory=list)
    skipped_steps: list[SkippedStep] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)
    _met: int = field(default=0, init=False, repr=False)

    def add(self, error: UserError) -> None:
        """Count a row once, however many epochs meet it.

        Raises:
            UserError: the error itself, when it is a StopRunError, which no bound excuses, or not of one row.
        """
        if isinstance(error, StopRunError) or not isinstance(error, RowError):
            raise error
        if type(error) not in (OverLength, MediaChanged):
            self._met += 1
        if error.row in self._seen:
            return
        self._seen.add(error.row)
        kinds = {OverLength: self.dropped_over_length, MediaChanged: self.media_changed}
        kinds.get(type(error), self.quarantined).append(RowIssue(error.row, error.field, error.detail, error.issue))

    def stop_past(self, max_bad_fraction: float) -> None:
        """
        Raises:
            UserError: when more rows are quarantined than the recipe allows, by kind of fault, or when none is left to train.
        """
        bad = self._met if self.streamed else len(self.quarantined)
        if bad > max_bad_fraction * self.rows:
            raise UserError(
                f"{bad} of {self.rows} rows cannot train, more than data.max_bad_fraction: "
                f"{max_bad_fraction:g} allows:\n{self.listing()}"
            )
        if len(self.quarantined) + len(self.dropped_over_length) >= self.rows:
            raise UserError("no row can train: every one was dropped or quarantined; see data_report.json in the run directory")

    def load(self, path: Path) -> None:
        """Add what an earlier part of the run has written."""
        written = json.loads(path.read_text(encoding="utf-8"))
        self.skipped_steps += [SkippedStep(**each) for each in written.get("skipped_steps", [])]
        for mine, name in (
            (self.dropped_over_length, "dropped_over_length"),
            (self.media_changed, "media_changed"),
            (self.quarantined, "quarantined"),
        ):
            for fault in (RowIssue(**each) for each in written[name]):
                if fault.row not in self._seen:
                    self._seen.add(fault.row)
                    mine.append(fault)

    def listing(self) -> str:
        """The quarantined rows by kind of fault, as `mmtune data check` groups them: the first row of each, and how many more."""
        kinds: dict[str, list[RowIssue]] = {}
        for fault in self.quarantined:
            kinds.setdefault(fault.issue, []).append(fault)
        lines = []
        for name, (first, *others) in kinds.items():
            lines.append(f"  {first.row}: {first.field}: {first.detail}")
            if others:
                rows = ", ".join(fault.row for fault in others[:2]) + (", ..." if len(others) > 2 else "")
                lines.append(f"    and {len(others):,} more ({name}): {rows}; {ISSUE_TYPES[name].fix}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line for the terminal."""
        counts = (
            f"{self.rows:,} rows, {len(self.quarantined):,} quarantined, {len(self.dropped_over_length):,} dropped as too long"
        )
        changed = f", {len(self.media_changed):,} with media dropped or made smaller" if self.media_changed else ""
        reasons = ((reason, self.count_skipped(reason)) for reason in (NO_SAMPLE, NOT_FINITE))
        skipped = "".join(f", {count:,} steps skipped ({reason})" for reason, count in reasons if count)
        return f"data: {counts}{changed}{skipped}"

    def count_skipped(self, reason: str) -> int:
        """How many steps were skipped for a reason."""
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
        # A file name that is not UTF-8 reaches Python as lone surrogates; written as \udcXX they are valid JSON.
        with report_disk_errors(path):
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")
