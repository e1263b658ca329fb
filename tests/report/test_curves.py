"""Curves of a run: read as the file grows, bounded, true to the values; and their plots."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from mmtune.report.curves import Curve, RunCurves
from mmtune.report.plots import Plot, plot_values, run_plots


def _curve(values: list[float]) -> Curve:
    curve = Curve()
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    return curve


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 512])
def test_every_value_of_a_short_run_is_a_point(count: int) -> None:
    values = [random.Random(step).random() for step in range(count)]
    assert _curve(values).points() == list(enumerate(values, start=1))


@pytest.mark.parametrize("count", [513, 5000, 100_000])
def test_a_long_run_keeps_a_bounded_number_of_true_points_and_its_spikes(count: int) -> None:
    values = [random.Random(step).random() for step in range(count)]
    low, high = count // 3, count // 2
    values[low], values[high] = -5.0, 9.0
    points = _curve(values).points()
    assert 256 <= len(points) <= 513
    assert all(values[int(step) - 1] == value for step, value in points)
    assert (low + 1, -5.0) in points and (high + 1, 9.0) in points
    assert points[0][0] <= count / 100 and points[-1] == (count, values[-1])
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps)) and max(b - a for a, b in pairwise(steps)) <= count / 50


def test_new_lines_are_read_alone_and_give_the_curves_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": math.sin(step), "epoch": step / 10}) + "\n" for step in range(1, 3001)]
    growing = RunCurves(path).update()
    assert growing.step == 0 and growing.curves == {}
    written = ""
    for end in (1, 700, 701, 2500, 3000):
        written = "".join(lines[:end])
        path.write_text(written + '{"step": 9999, "lo')  # a line that is being written
        growing.update()
        assert growing.step == end
    path.write_text(written)
    whole = RunCurves(path).update()
    assert growing.curves["loss"].points() == whole.curves["loss"].points() and growing.damaged == 0
    path.write_text("".join(lines[:5]))  # cut back by a run that is resumed
    assert growing.update().step == 5 and len(growing.curves["loss"].points()) == 5


def test_damaged_lines_and_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 2, "lo\n[1]\n{"loss": 1}\n\xff\n'
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + damaged + b'{"step": 3, "loss": NaN, "note": "x", "grad_norm": 1}\n')
    read = RunCurves(path).update()
    assert (read.damaged, read.step) == (4, 3)
    assert {name: curve.points() for name, curve in read.curves.items()} == {"loss": [(1, 2)], "grad_norm": [(3, 1)]}


def test_each_metric_is_in_one_plot(tmp_path: Path) -> None:
    names = "loss loss/a.json loss_kl grad_norm learning_rate learning_rate/projector epoch tokens tokens_per_second data_wait"
    record = dict.fromkeys([*names.split(), "cpu_wait", "mfu", "resident_memory_mb", "seconds_left", "mine"], 1.0)
    held_out = {"eval_loss": 1, "eval_loss_a.json": 1, "eval_accuracy": 1, "eval_runtime": 1, "eval_module:loss_f": 1}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, **values}) + "\n" for step in (1, 2) for values in (record, held_out)))
    plots = {plot.title: list(plot.lines) for plot in run_plots(RunCurves(path).update())}
    assert plots == {
        "Loss": ["training", "held out"],
        "Loss by source": ["a.json"],
        "Terms of the loss": ["kl"],
        "Held-out loss by source and term": ["a.json"],
        "Held-out scores": ["accuracy", "module:loss_f"],
        "Learning rate": ["the run's own", "projector"],
        "Norm of the gradients": ["norm"],
        "Throughput": ["tokens"],
        "Waits": ["for data", "for CPU"],
        "MFU": ["MFU"],
        "Memory": ["process"],
        "mine": ["mine"],
    }


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.0)],
        [(7, -3.5)],
        [(1, 5e-324)],
        [(1, -1e299), (2, 1e299)],
        [(1, 1e-9), (2, 3e-9)],
        [(1, 1e12), (100_000, 3e12)],
        [(3, 5.0), (9, 5.0)],
        [(1, -2.0), (5, 4.0)],
        [(1, 2.5), (2, 0.5)],
    ],
)
def test_a_plot_has_its_values_between_its_ticks(points: list[tuple[float, float]]) -> None:
    values = plot_values(Plot("x", "", {"line": points}))
    left, right, bottom, top = values["values"]["range"]
    assert left <= points[0][0] and points[-1][0] <= right and left < right
    assert all(bottom <= value <= top for _, value in points) and bottom < top
    places = [float(place.rstrip("%")) for place, _ in values["y_ticks"]]
    assert places[0] == 100 and places[-1] == 0 and 2 <= len(places) <= 9
    assert len({text for _, text in values["y_ticks"]}) == len(places)  # no two ticks have the same text
    assert values["values"]["lines"] == [["line", [list(point) for point in points]]]
    path = values["lines"][0]["path"]
    numbers = [float(part) for part in path.removeprefix("M").replace("L", " ").split()]
    assert all(0 <= number <= 1000 for number in numbers) and len(numbers) == 2 * len(points)
    for (_, value), height in zip(points, numbers[1::2], strict=True):
        assert height == pytest.approx(1000 * (top - value) / (top - bottom), abs=0.1)


def test_a_plot_of_many_lines_says_how_many_it_leaves_out() -> None:
    values = plot_values(Plot("x", "", {f"line {number}": [(1, 1.0), (2, 2.0)] for number in range(20)}))
    assert len(values["lines"]) == 12 and values["left_out"] == 8
