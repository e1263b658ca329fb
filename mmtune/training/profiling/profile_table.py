"""Summary of a profile over all processes: what `profile.json` and the table say."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmtune.data.time_spans import TimeSpan
from mmtune.report.run_report import ProfileSection
from mmtune.run_directory import RunDirectory
from mmtune.training.profiling.advice import LoaderLoad, RunFacts, advise
from mmtune.training.profiling.step_parts import PARTS, Interval, Segment, seconds_by_part
from mmtune.utils.files import read_json_object

BETWEEN_PROCESSES = {"communication", "processes"}
COMPONENTS = {"vision", "projector", "language"}
BAR = 24
"""Width of the bar of the largest possible part, in columns."""


@dataclass(frozen=True)
class ProcessProfile:
    """What one process measured.

    Attributes:
        seconds: of all timed steps, each from its first to its last moment.
        totals: seconds of every part in them.
        traced: the segments of the traced steps.
        collectives: the time in which any collective ran in the traced steps; disjoint.
        shift: nanoseconds from its `time.perf_counter_ns` to the wall clock.
        tokens: of the rows of the timed steps.
        positions: with padding and dummy samples.
        spans: of its data-loader workers, for the batches of the timed steps.
        epoch_wait: seconds of the wait for the loader that were in steps which start an epoch.
        is_split: whether the wait for other processes is known apart from communication.
        is_recorded: whether torch.profiler recorded any work of the device.
    """

    seconds: float
    totals: dict[str, float]
    traced: list[Segment]
    collectives: list[Interval]
    shift: int
    tokens: int
    positions: int
    spans: list[TimeSpan]
    epoch_wait: float
    is_split: bool
    is_recorded: bool

    @property
    def hidden_communication(self) -> float:
        """Seconds of the traced steps in which collectives ran while the process did other work."""
        exposed = seconds_by_part(self.traced)
        running = sum(end - start for start, end in self.collectives) / 1e9
        return max(running - exposed["communication"] - exposed["processes"], 0.0)

    def segments_at(self, shift: int) -> list[Segment]:
        """The traced segments on the clock of a process with this `shift`."""
        moved = self.shift - shift
        return [Segment(start + moved, end + moved, part) for start, end, part in self.traced]


@dataclass(frozen=True)
class WorkersLoad:
    """The work of the data-loader workers of a process, which runs beside the step.

    Attributes:
        workers: their number.
        decode, preprocess: seconds of work for a step, over all workers.
        busy: the fraction of a step in which the workers work.
    """

    workers: int
    decode: float
    preprocess: float
    busy: float


@dataclass(frozen=True)
class PartTime:
    """Seconds of a part in a step.

    Attributes:
        seconds: the mean of all steps and processes.
        share: of the step, from 0 to 1.
        processes: the mean of each process.
    """

    seconds: float
    share: float
    processes: list[float]


@dataclass(frozen=True)
class ProfileSummary:
    """A profile, as `profile.json` has it.

    Attributes:
        steps: the numbers of the timed steps.
        traced_steps: how many steps were traced after them.
        processes: the number of processes.
        device: torch's name of it.
        step_seconds: the mean of all timed steps and processes. The seconds of the parts add up to it.
        parts: by the names of `PARTS`.
        hidden_communication_seconds: collectives behind other work, in a step; no part of the sum.
        padding: the fraction of the batches' positions that are padding or dummy samples.
        workers: the load of the data-loader workers, the mean of all processes; None without workers.
        notes: what could not be measured.
        advice: what the numbers suggest.
    """

    steps: list[int]
    traced_steps: int
    processes: int
    device: str
    step_seconds: float
    parts: dict[str, PartTime]
    hidden_communication_seconds: float
    padding: float
    workers: WorkersLoad | None
    notes: list[str]
    advice: list[str]

    def to_json(self) -> str:
        """The text of `profile.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def summarize_profile(steps: Sequence[int], traced: int, processes: Sequence[ProcessProfile], facts: RunFacts) -> ProfileSummary:
    """The profile of all processes.

    Args:
        steps: the numbers of the timed steps.
        traced: the number of traced steps.
        processes: in the order of their ranks.
        facts: of the run.
    """
    by_rank = [{part: each / len(steps) for part, each in process.totals.items()} for process in processes]
    means = {part: statistics.fmean(each[part] for each in by_rank) for part in PARTS}
    seconds = statistics.fmean(process.seconds for process in processes) / len(steps)
    shares = {part: mean / seconds for part, mean in means.items()}
    left_out = {"frozen"} | (COMPONENTS if means["compiled"] else {"compiled"})
    left_out |= BETWEEN_PROCESSES if len(processes) == 1 else set()
    positions = sum(process.positions for process in processes)
    padding = 1 - sum(process.tokens for process in processes) / positions if positions else 0.0
    workers = _workers_load(processes, seconds, len(steps), facts.workers) if facts.workers else None
    waited = sum(process.totals["loader"] for process in processes)
    load = None
    if workers is not None:
        at_epochs = sum(process.epoch_wait for process in processes) > waited / 2
        load = LoaderLoad(workers.busy, at_epochs, workers.decode > workers.preprocess)
    return ProfileSummary(
        steps=list(steps),
        traced_steps=traced,
        processes=len(processes),
        device=facts.device,
        step_seconds=seconds,
        parts={
            part: PartTime(mean, shares[part], [each[part] for each in by_rank])
            for part, mean in means.items()
            if mean or part not in left_out
        },
        hidden_communication_seconds=statistics.fmean(each.hidden_communication for each in processes) / max(traced, 1),
        padding=padding,
        workers=workers,
        notes=_notes(processes, traced, shares, facts.device),
        advice=advise(shares, padding, facts, load),
    )


def _workers_load(processes: Sequence[ProcessProfile], seconds: float, steps: int, workers: int) -> WorkersLoad:
    spans = [span for process in processes for span in process.spans]
    everything, decode = (
        sum(span.end - span.start for span in spans if span.part == part) / 1e9 / steps / len(processes)
        for part in ("preprocess", "decode")
    )
    return WorkersLoad(workers, decode, everything - decode, everything / (workers * seconds))


def _notes(processes: Sequence[ProcessProfile], traced: int, shares: Mapping[str, float], device: str) -> list[str]:
    notes = []
    if device not in ("cpu", "cuda"):
        notes.append(f"{device}: the times are those of the host, which runs ahead of the device")
    if not traced and len(processes) > 1:
        notes.append("no step was traced, so communication is counted in the parts that wait for it")
    if not all(process.is_split for process in processes):
        notes.append(
            "the processes took part in different collectives, so the wait for other processes is counted as communication"
        )
    if traced and not all(process.is_recorded for process in processes):
        notes.append(
            "torch.profiler recorded no work of a device"
            + (", so communication is counted in the parts that wait for it" if len(processes) > 1 else "")
            + ("; the driver may allow performance counters to administrators only" if device == "cuda" else "")
        )
    if shares["compiled"]:
        notes.append("train.torch_compile: the forward pass of a compiled model is one part")
    return notes


def profile_rows(profile: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table of a profile, from the content of `profile.json`: a row for every part and one for their sum, by column."""
    rows = []
    for part, time in profile["parts"].items():
        row = {"part of a step": PARTS[part], "seconds": f"{time['seconds']:.4f}", "share": f"{time['share']:.1%}"}
        if profile["processes"] > 1:
            most = max(time["processes"])
            row |= {"least": f"{min(time['processes']):.4f}", "most": f"{most:.4f}"}
            row |= {"in process": str(time["processes"].index(most)) if most else ""}
        rows.append(row)
    total = {"part of a step": "step", "seconds": f"{profile['step_seconds']:.4f}", "share": "100.0%"}
    return [*rows, dict.fromkeys(rows[0], "") | total]


def profile_facts(profile: Mapping[str, Any]) -> list[str]:
    """Sentences on what a profile measured beside its parts, and its advice, from the content of `profile.json`."""
    facts = []
    if workers := profile["workers"]:
        facts.append(
            f"beside the step, in the data-loader workers ({workers['workers']}): decode images {workers['decode']:.4f} s, "
            f"preprocess {workers['preprocess']:.4f} s; they are busy {workers['busy']:.0%} of the time"
        )
    if profile["processes"] > 1:
        facts.append(f"communication behind other work: {profile['hidden_communication_seconds']:.4f} s")
    facts.append(f"padding: {profile['padding']:.0%} of the positions")
    return [*facts, *profile["notes"], *(f"advice: {each}" for each in profile["advice"])]


def profile_title(profile: Mapping[str, Any]) -> str:
    """What was profiled, from the content of `profile.json`."""
    first, *_, last = steps = [*profile["steps"], profile["steps"][-1]]
    which = f"step {first}" if len(steps) == 2 else f"{len(steps) - 1} steps, {first} to {last}"
    return f"Profile of {which}: the parts add up to the step"


def profile_section(run: RunDirectory) -> ProfileSection | None:
    """The section of a run's report; None without a profile."""
    if not run.profile.is_file():
        return None
    profile = read_json_object(run.profile)
    return ProfileSection(profile_title(profile), profile_rows(profile), profile_facts(profile))


def profile_lines(summary: ProfileSummary) -> list[str]:
    """The profile as text."""
    profile = asdict(summary)
    rows = profile_rows(profile)
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    name = next(iter(widths))
    shares = [0.0, *(each.share for each in summary.parts.values()), 0.0]
    lines = [profile_title(profile)]
    for row, share in zip([dict(zip(widths, widths, strict=True)), *rows], shares, strict=True):
        cells = [row[name].ljust(widths[name]), *(row[each].rjust(widths[each]) for each in widths if each != name)]
        lines.append(f"  {'  '.join(cells)}  {'#' * round(BAR * share)}".rstrip())
    return [*lines, *profile_facts(profile)]
