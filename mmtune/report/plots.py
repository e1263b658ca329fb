"""Line plots as inline SVG: axes, ticks, a legend, values for the script of the page, and a table for screen readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtune.evaluation.metrics.metric_table import is_held_out_loss
from mmtune.report.curves import Point, RunCurves

STYLES = 8
"""Colors and dash patterns of lines in the style sheet."""
SHOWN_LINES = 12
"""Lines in one plot."""
DOTS = 24
"""A line with at most this many points has a dot at each."""
TABLE_ROWS = 40
"""Steps in the table of a plot."""
SMALLEST = 1e-200
"""Smaller values are drawn as 0."""
GRID = 1000
"""The path of a line has coordinates from 0 to this."""


@dataclass(frozen=True)
class Plot:
    """Lines over optimizer steps.

    Attributes:
        title: what is plotted.
        unit: of the values, under the title.
        lines: the points of each line by its name.
    """

    title: str
    unit: str
    lines: Mapping[str, Sequence[Point]]


WAITS = {"data_wait": "for data", "cpu_wait": "for CPU"}
MEMORY = {"resident_memory_mb": "process", "accelerator_memory_mb": "accelerator"}
NOT_PLOTTED = {"epoch", "tokens", "seconds", "seconds_left", "total_flos", "samples_per_second"}
NOT_PLOTTED |= {"eval_runtime", "eval_samples_per_second"}


def run_plots(read: RunCurves) -> list[Plot]:
    """The plots of a run: losses, held-out scores, learning rates, norm of the gradients, speed, waits and memory."""
    points = {name: curve.points() for name, curve in read.curves.items() if name not in NOT_PLOTTED}

    def take(names: Mapping[str, str]) -> dict[str, list[Point]]:
        return {label: points.pop(name) for name, label in names.items() if name in points}

    def starting(prefix: str) -> dict[str, str]:
        return {name: name.removeprefix(prefix) for name in points if name.startswith(prefix)}

    plots = [
        Plot("Loss", "per supervised token", take({"loss": "training", "eval_loss": "held out"})),
        Plot("Loss by source", "per supervised token", take(starting("loss/"))),
        Plot("Terms of the loss", "", take(starting("loss_"))),
    ]
    held_out = starting("eval_")
    losses = {name: label.removeprefix("loss_") for name, label in held_out.items() if is_held_out_loss(label)}
    plots += [
        Plot("Held-out loss by source and term", "per supervised token", take(losses)),
        Plot("Held-out scores", "", take(held_out)),
        Plot("Learning rate", "", take({"learning_rate": "the run's own"} | starting("learning_rate/"))),
        Plot("Norm of the gradients", "before clipping", take({"grad_norm": "norm"})),
        Plot("Throughput", "tokens per second", take({"tokens_per_second": "tokens"})),
        Plot("Waits", "% of the time", _scaled(take(WAITS), 100)),
        Plot("MFU", "% of the device's peak", _scaled(take({"mfu": "MFU"}), 100)),
        Plot("Memory", "GB, the peak so far", _scaled(take(MEMORY), 1e-3)),
    ]
    plots += [Plot(name, "", {name: values}) for name, values in points.items()]
    return [plot for plot in plots if plot.lines]


def _scaled(lines: Mapping[str, Sequence[Point]], factor: float) -> dict[str, list[Point]]:
    return {name: [(step, value * factor) for step, value in points] for name, points in lines.items()}


def plot_values(plot: Plot) -> dict[str, Any]:
    """The values of the template `plots.html.jinja` for one plot."""
    shown = dict([*plot.lines.items()][:SHOWN_LINES])
    every = [point for points in shown.values() for point in points]
    steps, values = ([point[axis] for point in every] for axis in (0, 1))
    left, right = min(steps), max(steps)
    if left == right:
        left, right = left - 1, right + 1
    y_ticks = _ticks(*_value_range(min(values), max(values)), 5)
    bottom, top = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return (step - left) / (right - left)

    def y(value: float) -> float:
        return (top - value) / (top - bottom)

    return {
        "title": plot.title,
        "unit": plot.unit,
        "lines": [
            {"name": name, "style": number % STYLES, **_paths([(x(step), y(value)) for step, value in points])}
            for number, (name, points) in enumerate(shown.items())
        ],
        "left_out": len(plot.lines) - len(shown),
        "x_ticks": [
            (f"{100 * x(tick):.2f}%", f"{tick:,.0f}")
            for tick in _ticks(left, right, 4)
            if left <= tick <= right and tick == round(tick)
        ],
        "y_ticks": [(f"{100 * y(tick):.2f}%", _tick_text(tick, y_ticks[1] - y_ticks[0])) for tick in y_ticks],
        "about": f"{plot.title}. " + "; ".join(_about(name, points) for name, points in shown.items()),
        "columns": list(shown),
        "table": _table(shown),
        "values": {
            "range": [left, right, bottom, top],
            "lines": [[name, [[step, float(f"{value:.6g}")] for step, value in points]] for name, points in shown.items()],
        },
    }


def _value_range(low: float, high: float) -> tuple[float, float]:
    """The range of the axis: from 0 where that costs less than half of it."""
    size = max(abs(low), abs(high))
    if size < SMALLEST:
        return 0.0, 1.0
    if high - low <= 1e-9 * size:
        low, high = low - size / 2, high + size / 2
    return (0.0, high) if 0 < low < high / 2 else (low, high)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    size = (high - low) / count
    power = 10.0 ** math.floor(math.log10(size))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= size * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _tick_text(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.3g}"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{value:,.{decimals}f}"
    return text if abs(float(text.replace(",", "")) - value) < step / 100 else f"{value:,.{decimals + 1}f}"


def _paths(points: Sequence[Point]) -> dict[str, str]:
    """The `path` of a line, and `dots` where it has few points, from fractions of the width and the height."""
    places = [f"{GRID * x:.1f} {GRID * y:.1f}" for x, y in points]
    dots = "".join(f"M{place}h.01" for place in places) if len(places) <= DOTS else ""
    return {"path": f"M{'L'.join(places)}", "dots": dots}


def _about(name: str, points: Sequence[Point]) -> str:
    """A line in words, for a reader who does not see it."""
    lowest, highest = (choose(points, key=lambda point: point[1]) for choose in (min, max))
    (first, start), (last, end) = points[0], points[-1]
    return (
        f"{name}: {start:.4g} at step {first:,}, {end:.4g} at step {last:,}, lowest {lowest[1]:.4g} at {lowest[0]:,}, "
        f"highest {highest[1]:.4g} at {highest[0]:,}"
    )


def _table(lines: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Rows of a step and the values of all lines, of up to `TABLE_ROWS` steps spread over them, with the last."""
    by_line = [dict(points) for points in lines.values()]
    steps = sorted({step for points in by_line for step in points})
    if len(steps) > TABLE_ROWS:
        steps = [steps[round(number * (len(steps) - 1) / (TABLE_ROWS - 1))] for number in range(TABLE_ROWS)]
    return [[f"{step:,}", *(f"{points[step]:.5g}" if step in points else "" for points in by_line)] for step in steps]
