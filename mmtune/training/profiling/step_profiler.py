"""Profiler of training steps: times steps by part, traces a few more, and writes `profile.json` and the trace."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.data.time_spans import SpanLog, WorkerSpans
from mmtune.distributed.context import DistributedContext
from mmtune.families.structure import find_components
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.training.profiling.advice import RunFacts
from mmtune.training.profiling.profile_table import ProcessProfile, profile_lines, summarize_profile
from mmtune.training.profiling.step_parts import Segment, assign, seconds_by_part, split_communication, union
from mmtune.training.profiling.timeline import StepTimeline, clock_of
from mmtune.training.profiling.torch_trace import (
    NO_WORK,
    DeviceWork,
    IncompleteTraceError,
    read_device_work,
    wait_for_others,
    write_trace,
)
from mmtune.utils.files import replace_text, report_disk_errors
from mmtune.utils.threads import core_share

WARMUP = 3
"""Steps before those that are timed."""
TRACED_STEPS, TRACED_BATCHES = 3, 32
"""Maximum number of traced steps, and of their batches; one step is always traced. A model of 7B parameters records about 100,000
operations in a batch, 25 MB of a trace."""


def traced_steps(accumulation: int) -> int:
    """The number of traced steps, for the number of batches in a step."""
    return max(min(TRACED_STEPS, TRACED_BATCHES // accumulation), 1)


def run_facts(recipe: Recipe, arguments: TrainingArguments, dist: DistributedContext, model: nn.Module) -> RunFacts:
    """What the advice of a profile needs to know of its run.

    Args:
        model: the tuned model.
    """
    section, towers = recipe.data, find_components(model).towers
    return RunFacts(
        device=arguments.device.type,
        workers=arguments.dataloader_num_workers,
        persistent_workers=arguments.dataloader_persistent_workers,
        prefetched=arguments.dataloader_prefetch_factor or 2,  # torch's default
        cores=core_share(),
        accumulation=arguments.gradient_accumulation_steps,
        packing=section.packing,
        by_length=section.tokens_per_batch is not None or arguments.train_sampling_strategy == "group_by_length",
        stream=section.stream,
        balanced=section.planned,
        tower_frozen=not any(parameter.requires_grad for path in towers for parameter in model.get_submodule(path).parameters()),
        sharded=dist.sharded,
    )


@dataclass(frozen=True)
class ProfileSettings:
    """What a profile needs to know of its run.

    Attributes:
        steps: how many steps are timed.
        log: the time spans of data preparation in this process.
        run: where the profile is written.
        facts: for the advice.
    """

    steps: int
    log: SpanLog
    run: RunDirectory
    facts: RunFacts


class StepProfiler(TrainerCallback):
    """Profiles optimizer steps in every process, and has the main process write the profile.

    torch.profiler makes small operations slower, so it runs in steps of its own after those that are timed. What it shows of
    communication is applied to the timed steps.

    Args:
        settings: of the profile.
        dist: the distributed context.
        device: that runs the model.
        instrument: installs hooks that call `part` and `timeline`; its context's end removes them.
        pause: leaves the time of writing out of the run's throughput.
    """

    def __init__(
        self,
        settings: ProfileSettings,
        dist: DistributedContext,
        device: torch.device,
        instrument: Callable[[], AbstractContextManager[Any]],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.timeline: StepTimeline | None = None
        """The timeline of the present step; None outside of a step that is timed or traced."""
        self._settings, self._dist, self._device = settings, dist, device
        self._instrument, self._pause = instrument, pause
        self._clock = clock_of(device)
        self._last_timed = WARMUP + settings.steps
        self._traced_steps = traced_steps(settings.facts.accumulation)
        self._begun = 0
        self._is_done = self._starts_epoch = False
        self._installed, self._mark = ExitStack(), ExitStack()
        self._profile: profile | None = None
        self._marks: dict[str, int] = {}
        self._timed: dict[int, list[Segment]] = {}
        self._traced: list[list[Segment]] = []
        self._batches: list[WorkerSpans] = []  # of the timed steps
        self._traced_batches: list[WorkerSpans] = []
        self._tokens = self._positions = 0
        self._epoch_wait = 0.0

    def begin_step(self, step: int, starts_epoch: bool) -> None:
        """Begin the optimizer step with this number."""
        if self._is_done:
            return
        self._begun += 1
        self._starts_epoch = starts_epoch
        self._settings.log.take()
        if self._begun == WARMUP + 1:
            self._installed.enter_context(self._instrument())
        if self._begun == self._last_timed + 1:
            self._profile = self._start_profile()  # this step is its warm-up
        elif self._begun > WARMUP:
            if self._profile is not None:
                self._profile.step()
                name = f"mmtune step {step}"
                self._marks[name] = time.perf_counter_ns()
                self._mark.enter_context(record_function(name))
            self.timeline = StepTimeline(self._clock)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Count the time of the block as this part of the step."""
        timeline = self.timeline
        if timeline is None:
            yield
            return
        timeline.push(part)
        yield
        timeline.pop()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the time of the block as the forward pass of a batch and its loss: what no hook counts is `other`."""
        timeline = self.timeline
        if timeline is None:
            yield
            return
        timeline.push("other")
        yield
        timeline.end_forward()

    def add_batch(self, tokens: int, positions: int, spans: WorkerSpans | None) -> None:
        """Count a batch of the present step.

        Args:
            tokens: of its rows.
            positions: with padding and dummy samples.
            spans: of the worker that made it.
        """
        if self.timeline is None:
            return
        batches = self._traced_batches
        if self._profile is None:
            self._tokens += tokens
            self._positions += positions
            batches = self._batches
        batches += [] if spans is None else [spans]

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.timeline is not None:
            self.timeline.push("optimizer")

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.timeline is not None:
            self.timeline.pop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        timeline, self.timeline = self.timeline, None
        if timeline is None:
            return
        segments = self._with_preparation(timeline.finish())
        self._mark.close()
        if self._profile is None:
            self._timed[state.global_step] = segments
            self._epoch_wait += seconds_by_part(segments)["loader"] if self._starts_epoch else 0.0
        else:
            self._traced.append(segments)
            if len(self._traced) == self._traced_steps:
                self._finish()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_done:
            return
        if self._timed:
            print(
                f"profile: the run ended after {len(self._timed)} of {self._settings.steps} timed steps, and {len(self._traced)} "
                f"of {self._traced_steps} traced ones"
            )
            self._finish()
        else:
            print(f"profile: none, the run ended after {self._begun} steps, and the first {WARMUP} are not profiled")

    def close(self) -> None:
        """Remove the hooks and stop torch.profiler, however training ends."""
        self.timeline = None
        self._is_done = True
        self._mark.close()
        self._settings.log.close()
        self._installed.close()

    def _start_profile(self) -> profile:
        # kineto prints every start and stop. What it cannot record is found in the trace.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        actions = {0: ProfilerAction.WARMUP}
        started = profile(activities=activities, schedule=lambda step: actions.get(step, ProfilerAction.RECORD))
        started.start()
        self._installed.callback(started.stop)
        return started

    def _with_preparation(self, segments: list[Segment]) -> list[Segment]:
        """The segments of a step that has just ended, with the data preparation of this process in them."""
        spans = self._settings.log.take()
        prepared = union([(span.start, span.end) for span in spans])
        decoded = union([(span.start, span.end) for span in spans if span.part == "decode"])
        return assign(assign(segments, prepared, "preprocess", within="loader"), decoded, "decode", within="preprocess")

    def _finish(self) -> None:
        self.close()
        with self._pause(), tempfile.TemporaryDirectory(prefix="mmtune-profile-") as folder:
            trace = Path(folder) / "trace.json"
            work, offset = self._read_trace(trace)
            collectives = [work.during(each[0].start, each[-1].end) for each in self._traced]
            durations = self._dist.all_gather_object([[end - start for start, end in each] for each in collectives])
            by_step = zip(collectives, zip(*durations, strict=True), strict=True)
            waits = [wait_for_others(each, of_processes) for each, of_processes in by_step]
            communication, wait = work.exposed([interval for each in waits for interval in each or ()])
            timed = [segment for each in self._timed.values() for segment in each]
            traced = [segment for each in self._traced for segment in each]
            own = ProcessProfile(
                seconds=sum(each[-1].end - each[0].start for each in self._timed.values()) / 1e9,
                totals=split_communication(seconds_by_part(timed), traced, communication, wait),
                traced=assign(assign(traced, communication, "communication"), wait, "processes"),
                collectives=union([interval for each in collectives for interval in each]),
                shift=time.time_ns() - time.perf_counter_ns(),
                tokens=self._tokens,
                positions=self._positions,
                spans=[span for batch in self._batches for span in batch.spans],
                epoch_wait=self._epoch_wait,
                is_split=None not in waits,
                is_recorded=bool(work.busy),
            )
            processes: list[ProcessProfile] = self._dist.all_gather_object(own)
            if self._dist.is_main_process:
                self._write(processes, trace, offset)

    def _read_trace(self, path: Path) -> tuple[DeviceWork, int]:
        """The device's work in the traced steps, from torch.profiler's trace, which is written to a file; none without room."""
        if self._profile is None or not self._traced:
            return NO_WORK
        self._profile.export_chrome_trace(str(path))  # without an error if the disk is full
        self._profile = None  # its events take more memory than the file's size
        try:
            return read_device_work(path, self._marks, on_gpu=self._device.type == "cuda")
        except (FileNotFoundError, IncompleteTraceError):
            path.unlink(missing_ok=True)
            print(f"profile: no trace: it was not written to {path.parent.parent}; make room there, or set TMPDIR")
            return NO_WORK

    def _write(self, processes: list[ProcessProfile], trace: Path, offset: int) -> None:
        run = self._settings.run
        summary = summarize_profile(list(self._timed), len(self._traced), processes, self._settings.facts)
        written = [str(run.profile)]
        with report_disk_errors(run.profile):
            replace_text(run.profile, summary.to_json())
            if trace.is_file():
                lanes = [each.segments_at(processes[0].shift) for each in processes]
                write_trace(run.trace, trace, offset, lanes, self._traced_batches)
                written.append(f"{run.trace} (open it in ui.perfetto.dev)")
        tqdm.write("\n".join([*profile_lines(summary), f"profile: {', '.join(written)}"]))
