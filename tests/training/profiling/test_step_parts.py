"""Parts of a step: they add up to it, whatever is assigned to them; waits are split from transfers; advice names what exists."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import TrainingArguments

from mmtune.recipe.recipe import DataSection
from mmtune.training.profiling.advice import LoaderLoad, RunFacts, advise
from mmtune.training.profiling.module_hooks import hook_compiled
from mmtune.training.profiling.step_parts import (
    PARTS,
    Interval,
    Segment,
    assign,
    seconds_by_part,
    split_communication,
    subtract,
    union,
)
from mmtune.training.profiling.timeline import CudaClock, HostClock, StepTimeline
from mmtune.training.profiling.torch_trace import (
    LAUNCH_NS,
    DeviceWork,
    IncompleteTraceError,
    read_device_work,
    read_events,
    wait_for_others,
    write_trace,
)


def moments(intervals: Iterable[tuple[Any, ...]]) -> set[int]:
    return {moment for start, end, *_ in intervals for moment in range(start, end)}


@pytest.mark.parametrize("seed", range(30))
def test_intervals_equal_sets_of_moments(seed: int) -> None:
    drawn = random.Random(seed)

    def draw(count: int) -> list[Interval]:
        return [(start, start + drawn.randrange(12)) for start in drawn.choices(range(100), k=count)]

    first, second = draw(8), draw(8)
    assert moments(union(first)) == moments(first)
    left = subtract(union(first), union(second))
    assert moments(left) == moments(first) - moments(second)
    assert left == union(left)

    edges = [0, *sorted(drawn.sample(range(1, 100), 6)), 100]
    segments = [Segment(*each, drawn.choice(["other", "loader"])) for each in pairwise(edges)]
    changed = assign(segments, union(second), "decode", within="loader")
    loader = moments(each for each in segments if each.part == "loader")
    assert moments(each for each in changed if each.part == "decode") == moments(second) & loader
    assert [each.end for each in changed[:-1]] == [each.start for each in changed[1:]], "no gap and no overlap"
    assert sum(seconds_by_part(changed).values()) == pytest.approx(100e-9, rel=1e-12)


def test_the_rank_that_is_ready_last_does_not_wait_and_hidden_collectives_are_no_communication() -> None:
    """Two collectives of 10 ns. It is ready for the first 30 ns early; the second runs behind its operators for 6 ns."""
    own, other = [(0, 40), (100, 110)], [(30, 40), (100, 110)]
    waits = wait_for_others(own, [[end - start for start, end in each] for each in (own, other)])
    assert waits == [(0, 30), (100, 100)]
    communication, wait = DeviceWork(own, busy=[(95, 106)]).exposed(waits)
    assert (communication, wait) == ([(30, 40), (106, 110)], [(0, 30)])
    assert wait_for_others(own, [[40, 10], [10]]) is None


def test_communication_of_traced_steps_has_the_same_share_of_timed_ones() -> None:
    """In the trace a quarter of the backward pass is communication, a quarter is the wait; the language model is not in it."""
    traced = [Segment(0, 40, "backward"), Segment(40, 50, "loss")]
    seconds = split_communication({"backward": 2.0, "language": 1.0, "loss": 3.0}, traced, [(30, 40)], [(0, 10)])
    expected = {"backward": 1.0, "communication": 0.5, "processes": 0.5, "language": 1.0, "loss": 3.0}
    assert {part: each for part, each in seconds.items() if each} == pytest.approx(expected)


def event(name: str, category: str, start_us: float, us: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": start_us, "dur": us, "tid": thread}


def test_collectives_and_work_are_read_from_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gloo on its own thread, and of NCCL as GPU kernels; host operators are no work of a GPU."""
    gap = LAUNCH_NS / 1e3
    events = [
        event("aten::mm", "cpu_op", 1000, 10),
        event("step 7", "user_annotation", 1000, 5000),
        event("aten::mm", "cpu_op", 1010 + gap, 10),
        event("c10d::allreduce_", "cpu_op", 3000, 10),
        event("aten::mm", "cpu_op", 3000, 10, thread=2),
        event("gloo:all_reduce", "user_annotation", 3000, 500, thread=2),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "kernel", 2000, 300, thread=7),
        event("ampere_sgemm_128x64", "kernel", 1500, 600, thread=8),
        event("Memcpy HtoD", "gpu_memcpy", 5000, 1, thread=8),
        {"ph": "M", "name": "process_name", "args": {"name": "a, ] and }"}},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"schemaVersion": 1, "deviceProperties": [{}], "traceEvents": events, "traceName": "x"}, indent=1))
    monkeypatch.setattr("mmtune.training.profiling.torch_trace.CHUNK", 7)  # a read ends in the middle of everything
    assert list(read_events(path)) == events
    (cpu, offset), (gpu, _) = (read_device_work(path, {"step 7": 50}, on_gpu) for on_gpu in (False, True))
    start = 50  # of the step, in nanoseconds
    assert offset == start - 1_000_000
    assert cpu.collectives == [(start + 2_000_000, start + 2_500_000)]
    assert cpu.busy == [(start, start + 20_000 + LAUNCH_NS)], "an operator shortly after another; none of gloo's thread"
    assert gpu.collectives == [(start + 1_000_000, start + 1_300_000)]
    assert gpu.busy == [(start + 500_000, start + 1_100_000), (start + 4_000_000, start + 4_001_000)]
    assert gpu.during(0, start + 1_000_000) == []

    write_trace(tmp_path / "out.json.gz", path, offset, [[Segment(start, start + 2000, "loss")]], [])
    merged = json.loads(gzip.decompress((tmp_path / "out.json.gz").read_bytes()))
    assert merged["traceEvents"][-len(events) :] == events and merged["traceName"] == "x"
    assert {**merged["traceEvents"][2], "pid": 0} == {**event("loss", "mmtune", 1000, 2, thread=0), "pid": 0}
    path.write_text(path.read_text()[:300])
    with pytest.raises(IncompleteTraceError):
        list(read_events(path))


class Ticks(HostClock):
    """A clock that is one nanosecond further at every look."""

    def __init__(self) -> None:
        self._now = 0

    def mark(self) -> int:
        self._now += 1
        return self._now


def test_time_belongs_to_the_innermost_part_and_after_the_head_to_the_loss() -> None:
    timeline = StepTimeline(Ticks())  # 1
    timeline.push("other")  # 2: the forward pass
    timeline.push("vision")  # 3
    timeline.push("projector")  # 4
    timeline.pop()  # 5
    timeline.pop()  # 6
    timeline.push("language")  # 7: the head
    timeline.end_head()  # 8
    timeline.push("frozen")  # 9: a teacher
    timeline.pop()  # 10
    timeline.end_forward()  # 11
    timeline.push("optimizer")  # 12
    timeline.push("optimizer")  # 13
    timeline.pop()  # 14
    timeline.pop()  # 15
    seconds = {part: round(each * 1e9) for part, each in seconds_by_part(timeline.finish()).items() if each}  # 16
    assert seconds == {"other": 5, "vision": 2, "projector": 1, "language": 1, "loss": 2, "frozen": 1, "optimizer": 3}


def test_a_module_that_checkpointing_runs_in_the_backward_pass_is_backward() -> None:
    timeline, module = StepTimeline(Ticks()), nn.Identity()
    with hook_compiled(module, lambda: timeline):
        timeline.push("backward")
        module(1)
        timeline.pop()
    module(1)
    assert not module._forward_hooks and not module._forward_pre_hooks
    assert {each.part for each in timeline.finish()} == {"other", "backward"}


def test_a_gpu_measures_its_own_time_from_where_the_host_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host submits all work at once, 5 ns after it waited; the device then needs 2 ms for each piece."""
    submitted: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            submitted.append(self)

        def elapsed_time(self, end: Event) -> float:
            return 2.0 * (submitted.index(end) - submitted.index(self))

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("time.perf_counter_ns", lambda: 5)
    timeline = StepTimeline(CudaClock())
    timeline.push("backward")
    timeline.pop()
    ms = 1_000_000
    expected = [("other", 2, 4), ("backward", 4, 6), ("other", 6, 8)]
    assert timeline.finish() == [Segment(5 + start * ms, 5 + end * ms, part) for part, start, end in expected]


FACTS = RunFacts("cuda", 0, False, 2, 16, 1, False, False, False, False, False, False)
"""Without workers, the tower is trained."""


@pytest.mark.parametrize(
    ("shares", "changes", "padding", "load", "expected"),
    [
        ({"backward": 1.0}, {}, 0.0, None, []),
        # Data preparation of 0.6 steps beside a computation of 0.4: 0.6 / 0.4 x 1.25 workers.
        ({"decode": 0.4, "preprocess": 0.2}, {}, 0.0, None, ["train.dataloader_num_workers: 2; decoding is most"]),
        (
            {"loader": 0.5},
            {"workers": 2},
            0.0,
            LoaderLoad(1.0, False, False),
            ["busy 100% of the time: set train.dataloader_num_workers: 5"],
        ),
        (
            {"loader": 0.5},
            {"workers": 2, "cores": 4},
            0.0,
            LoaderLoad(1.0, False, False),
            ["takes 5 cores to hide it where each process has 4 cores"],
        ),
        ({"loader": 0.2}, {"workers": 2}, 0.0, LoaderLoad(0.1, False, False), ["set train.dataloader_prefetch_factor: 4"]),
        # A step takes 16 batches at once, 8 from each worker.
        ({"loader": 0.2}, {"workers": 2, "accumulation": 16}, 0.0, LoaderLoad(0.1, False, False), ["prefetch_factor: 10"]),
        ({"loader": 0.2}, {"workers": 2}, 0.0, LoaderLoad(0.1, True, False), ["train.dataloader_persistent_workers: true"]),
        ({"processes": 0.2}, {}, 0.0, None, ["data.plan: true"]),
        ({"communication": 0.3}, {}, 0.0, None, ["train.gradient_accumulation_steps above 1"]),
        ({"communication": 0.3}, {"sharded": True}, 0.0, None, ["DDP or ZeRO-1"]),
        ({"optimizer": 0.3}, {}, 0.4, None, ["padding: 40% of the positions; data.packing: true", "the optimizer: 30%"]),
        ({"vision": 0.4}, {"tower_frozen": True}, 0.0, None, ["the frozen vision tower: 40%"]),
        ({"vision": 0.4}, {}, 0.0, None, []),
        ({"other": 0.4}, {}, 0.0, None, ["the trace shows what it is"]),
    ],
)
def test_advice_follows_from_the_numbers(
    shares: dict[str, float], changes: dict[str, Any], padding: float, load: LoaderLoad | None, expected: list[str]
) -> None:
    facts = RunFacts(**{**vars(FACTS), **changes})
    advice = advise(dict.fromkeys(PARTS, 0.0) | shares, padding, facts, load)
    assert len(advice) == len(expected)
    assert all(text in line for text, line in zip(expected, advice, strict=True)), advice
    for line in advice:  # every key exists
        for key in (word.rstrip(":;,)") for word in line.split() if word.strip("(").startswith(("train.", "data."))):
            section, name = key.strip("(").split(".")
            assert name in (TrainingArguments.__dataclass_fields__ if section == "train" else DataSection.model_fields), key
