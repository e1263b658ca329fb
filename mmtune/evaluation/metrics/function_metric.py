"""A metric that is a Python function of the user: `module:function` or `FILE.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mmtune.evaluation.metrics.metric import Item, Metric, finite_number
from mmtune.utils.errors import UserError, nearest, reason_of

CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Errors of the user's code that are reported in one line. Any other one keeps its traceback."""

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
            UserError: it is not a finite number and not None, or the function raises an error.
        """
        try:
            value = self.function(item.prediction, list(item.references), {**item.fields, "cluster": item.cluster})
        except CODE_ERRORS as error:
            raise UserError(f"metric {self.name}: {_raised(error, self.source)}, for {item.prediction[:80]!r}") from error
        number = finite_number(value)
        if number is None and value is not None:
            raise UserError(
                f"metric {self.name}: expected a finite number or None, got {repr(value)[:80]} for {item.prediction[:80]!r}"
            )
        return number


@cache
def load_function_metric(name: str) -> Metric:
    """The metric of `module:function` or `FILE.py:function`; a file is relative to the working directory.

    Raises:
        UserError: the module, the file or the function does not exist, takes other arguments, or importing it raises an error.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise UserError(f"metric {name}: no file {place}; the path is relative to the working directory")
    try:
        module = _import(place)
    except CODE_ERRORS as error:
        missing = isinstance(error, ModuleNotFoundError) and place.split(".")[0] == error.name
        hint = "; a file is given as FILE.py:function" if missing else ""
        raise UserError(f"metric {name}: cannot import {place}: {_raised(error, place)}{hint}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise UserError(f"metric {name}: {place} has no function '{attribute}'{nearest(attribute, names)}")
    _check_arguments(name, function)
    return FunctionMetric(
        name,
        function.__doc__ or "",
        place,
        unparsed="the function returns None",
        percent=False,
        has_baseline=False,
        function=function,
    )


def _check_arguments(name: str, function: ScoreFunction) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions of compiled code have none
        return
    try:
        signature.bind("", [], {})
    except TypeError as error:
        raise UserError(
            f"metric {name}: expected a function of (prediction, references, row), got one of {signature}: {error}"
        ) from error


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a name that ends with .py has a loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _raised(error: Exception, place: str) -> str:
    """The type and the reason of an error, with the line of the metric's file that led to it."""
    stem = place.removesuffix(".py").replace(".", "/").rpartition("/")[2]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).stem == stem]
    return f"{type(error).__name__}: {reason_of(error)}" + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")
