"""A metric that is a Python function of the user: `module:function` or `FILE.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmtune.evaluation.metrics.metric import Item, Metric
from mmtune.utils.errors import UserError, nearest, reason_of

ScoreFunction = Callable[[str, list[str], dict[str, Any]], float | None]
"""`function(prediction, references, row)` returns a finite number, or None for an answer that it cannot parse.

`row` has the further fields of the row, such as `question`, `options` and `choices`, and `cluster`. The headline number is the
mean; a greater one is better.
"""


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A metric whose scores are those of a function."""

    function: ScoreFunction = lambda prediction, references, row: None

    def score(self, item: Item) -> float | None:
        """What the function returns.

        Raises:
            UserError: it is not a finite number and not None.
        """
        value = self.function(item.prediction, list(item.references), {**item.fields, "cluster": item.cluster})
        if value is None:
            return None
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"metric {self.name}: expected a finite number or None, got {value!r} for {item.prediction[:80]!r}")
        return float(value)


@cache
def load_function_metric(name: str) -> Metric:
    """The metric of `module:function` or `FILE.py:function`; a file is relative to the working directory.

    Raises:
        UserError: the module, the file or the function does not exist.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser()
        spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
        if spec is None or spec.loader is None:
            raise UserError(f"metric {name}: no file {place}; the path is relative to the working directory")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            hint = "; a file is given as FILE.py:function"
            raise UserError(f"metric {name}: cannot import {place}: {reason_of(error)}{hint}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise UserError(f"metric {name}: {place} has no function '{attribute}'{nearest(attribute, names)}")
    return FunctionMetric(
        name,
        function.__doc__ or "",
        place,
        unparsed="the function returns None",
        percent=False,
        has_baseline=False,
        function=function,
    )
