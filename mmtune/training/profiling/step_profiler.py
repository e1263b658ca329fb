"""Profiler of training steps: measures steps after a warm-up by part, and writes `profile.json` and a trace."""

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

from mmtune.data.time_spans import SpanLog, TimeSpan, WorkerSpans
from mmtune.distributed.context import DistributedContext
from mmtune.families.structure import find_components
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.training.profiling.advice import RunFacts
from mmtune.training.profiling.profile_table import ProcessProfile, profile_lines, summarize_profile
from mmtune.training.profiling.step_parts import Segment, assign, union
from mmtune.training.profiling.timeline import StepTimeline, clock_of
from mmtune.training.profiling.torch_trace import clock_offset, device_work, wait_for_others, write_trace
from mmtune.utils.files import read_json_object, replace_text, report_disk_errors
from mmtune.utils.threads import usable_cores

WARMUP = 4
"""Steps before the profiled ones: the first is slow, the last starts torch.profiler, and those between are timed without it."""


def run_facts(recipe: Recipe, arguments: TrainingArguments, dist: DistributedContext, model: nn.Module) -> RunFacts:
    """What the advice of a profile needs to know of its run.

    Args:
        model: the tuned model.
    """
    section, towers = recipe.data, find_components(model).towers
    return RunFacts(
        device=arguments.device.type,
        workers=arguments.dataloader_num_workers,
        cores=max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1),
        processes=dist.size,
        accumulation=arguments.gradient_accumulation_steps,
        packing=section.packing,
        by_tokens=section.tokens_per_batch is not None,
        stream=section.stream,
        balanced=section.planned,
        tower_frozen=not any(parameter.requires_grad for path in towers for parameter in model.get_submodule(path).parameters()),
        sharded=dist.sharded,
    )


@dataclass(frozen=True)
class ProfileSettings:
    """What a profile needs to know of its run.

    Attributes:
        steps: how many steps are profiled.
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
        """The timeline of the present step; None outside of a step that is measured."""
        self._settings, self._dist, self._device = settings, dist, device
        self._instrument, self._pause = instrument, pause
        self._clock = clock_of(device)
        self._begun = 0
        self._is_done = False
        self._installed = ExitStack()
        self._mark = ExitStack()
        self._marks: dict[str, int] = {}
        self._unprofiled: list[float] = []
        self._steps: dict[int, list[Segment]] = {}
        self._spans: list[TimeSpan] = []
        self._batches: list[WorkerSpans] = []
        self._tokens = self._positions = 0

    def begin_step(self, step: int) -> None:
        """Begin the optimizer step with this number."""
        if self._is_done:
            return
        self._begun += 1
        if self._begun == WARMUP:
            self._start()
        elif self._begun > WARMUP:
            self._profile.step()
        self._settings.log.take()
        if self._begun > 1:
            if self._begun > WARMUP:
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
        if self._begun > WARMUP and not self._is_done:
            self._tokens += tokens
            self._positions += positions
            self._batches += [] if spans is None else [spans]

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
        segments = timeline.finish()
        self._mark.close()
        if self._begun < WARMUP:
            self._unprofiled.append((segments[-1].end - segments[0].start) / 1e9)
        elif self._begun > WARMUP:
            self._steps[state.global_step] = segments
            self._spans += self._settings.log.take()
            if len(self._steps) == self._settings.steps:
                self._finish()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_done:
            return
        if self._steps:
            print(f"profile: the run ended after {len(self._steps)} of the {self._settings.steps} steps to profile")
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

    def _start(self) -> None:
        """Install the hooks, and begin the warm-up of torch.profiler."""
        self._installed.enter_context(self._instrument())
        # kineto prints every start and stop. What it cannot record is found in the trace.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        actions = {0: ProfilerAction.WARMUP}
        self._profile = profile(activities=activities, schedule=lambda step: actions.get(step, ProfilerAction.RECORD))
        self._profile.start()
        self._installed.callback(self._profile.stop)

    def _finish(self) -> None:
        self.close()
        with self._pause():
            trace = self._read_trace()
            events, on_gpu, settings = trace["traceEvents"], self._device.type == "cuda", self._settings
            work, offset = device_work(events, self._marks, on_gpu), clock_offset(events, self._marks)
            numbers = list(self._steps)
            collectives = [work.during(each[0].start, each[-1].end) for each in self._steps.values()]
            durations = self._dist.all_gather_object([[end - start for start, end in each] for each in collectives])
            waits = [
                wait_for_others(each, of_step) for each, of_step in zip(collectives, zip(*durations, strict=True), strict=True)
            ]
            communication, wait = work.exposed([interval for each in waits for interval in each or ()])
            steps = [self._parts(segments, communication, wait) for segments in self._steps.values()]
            own = ProcessProfile(
                steps=steps,
                shift=time.time_ns() - time.perf_counter_ns(),
                tokens=self._tokens,
                positions=self._positions,
                spans=[span for batch in self._batches for span in batch.spans],
                collectives=[interval for each in collectives for interval in each],
                is_split=None not in waits,
                is_traced=not on_gpu or bool(work.busy),
            )
            processes: list[ProcessProfile] = self._dist.all_gather_object(own)
            if not self._dist.is_main_process:
                return
            summary = summarize_profile(numbers, processes, self._unprofiled, settings.facts)
            run = settings.run
            with report_disk_errors(run.profile):
                replace_text(run.profile, summary.to_json())
                lanes = [each.segments_at(own.shift) for each in processes]
                write_trace(run.trace, trace, offset, lanes, self._batches)
            tqdm.write("\n".join([*profile_lines(summary), f"profile: {run.profile}, {run.trace} (open it in ui.perfetto.dev)"]))

    def _parts(self, segments: list[Segment], communication: list[Any], wait: list[Any]) -> list[Segment]:
        """A step's segments, with the data preparation and the communication of this process in them."""
        prepared = union((span.start, span.end) for span in self._spans)
        decoded = union((span.start, span.end) for span in self._spans if span.part == "decode")
        segments = assign(segments, prepared, "preprocess", within="loader")
        segments = assign(segments, decoded, "decode", within="preprocess")
        return assign(assign(segments, communication, "communication"), wait, "processes")

    def _read_trace(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="mmtune-profile-") as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return read_json_object(path)
