"""Jinja over one row, in a sandbox: a text made of the row's columns, or the plain value of one expression."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateRuntimeError, Undefined, UndefinedError, meta, nodes, pass_context
from jinja2.environment import TemplateExpression
from jinja2.runtime import Context
from pydantic import BaseModel, ConfigDict

from mmtune.data.message import RowError
from mmtune.data.templates.boxes import Box, fractions, pixels, thousandths
from mmtune.utils import bounded_jinja
from mmtune.utils.bounded_jinja import BUDGET, COMPILE_FAULTS, RENDER_FAULTS, BoundedEnvironment, Budget, TooMuchWork

DRAW_VARIABLE = "drawn by mmtune"
"""The name under which an expression finds the row's draw; no name that Jinja could write, so no row has it."""


class NotText(TemplateRuntimeError):
    """A value other than text that a template would write."""


class TemplateSection(BaseModel):
    """A part of a data template; an unknown key in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_jinja(source: str) -> None:
    """
    Raises:
        ValueError: for what is no Jinja.
    """
    try:
        _text(source)
        _value(source)
        names_read(source)
    except COMPILE_FAULTS as error:
        raise ValueError(f"not valid Jinja{bounded_jinja.failure(error)}: {source[:300]}") from error


def names_read(source: str) -> set[str]:
    """The names that a piece of Jinja reads from its context."""
    return meta.find_undeclared_variables(_environment().parse(source))


def render_expression(row_id: str, where: str, source: str, context: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The text of a piece of Jinja.

    Args:
        row_id: of the row, for the error.
        where: the part of the template, for the error.
        source: the Jinja.
        context: what it can read.
        row: the row itself, whose columns an error lists.

    Raises:
        RowError: when it cannot be made of this row.
    """
    try:
        return "".join(bounded_jinja.render_bounded(_text(source), context))
    except RENDER_FAULTS as error:
        raise _row_error(row_id, where, error, row) from error


def evaluate_expression(row_id: str, where: str, source: str, context: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """The value of Jinja that is one `{{ expression }}` and nothing else: a list stays a list. Other Jinja gives its text.

    Args and errors are those of `render_expression`.
    """
    try:
        compiled = _value(source)
        if compiled is None:
            return "".join(bounded_jinja.render_bounded(_text(source), context))
        value = compiled({**context, BUDGET: Budget(context)})
        value = list(value) if isinstance(value, Iterator) else value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Undefined):
                str(item)  # raises, and says what is not defined
        return value
    except RENDER_FAULTS as error:
        raise _row_error(row_id, where, error, row) from error


def as_text(value: Any) -> str:
    """A value of a row as a text would show it.

    Raises:
        ValueError: for null, true, lists, objects and bytes, which Python would write in its words, and for what is no number.
    """
    if value is None or isinstance(value, bool):
        raise ValueError(f"a text cannot be made of {'null' if value is None else str(value).lower()}")
    if isinstance(value, Box):
        raise ValueError("a box is written by a filter: {{ box | thousandths }}, fractions or pixels")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"a text cannot be made of a {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a text cannot be made of {value}")
    return str(value)


def _row_error(row_id: str, where: str, error: Exception, row: Mapping[str, Any]) -> RowError:
    columns = ", ".join(map(str, row)) or "nothing"
    of_row = isinstance(error, (UndefinedError, NotText))
    detail = str(error)[:300] if of_row else f"the template fails{bounded_jinja.failure(error)}"
    if isinstance(error, UndefinedError):
        issue = "field_missing"
    else:
        issue = "template_fails" if isinstance(error, (TooMuchWork, RecursionError, MemoryError)) else "field_type"
    return RowError(row_id, where, f"{detail}; the row has: {columns[:300]}", issue)


def _written(value: Any) -> Any:
    if isinstance(value, Undefined):
        return value
    try:
        return as_text(value)
    except ValueError as error:
        raise NotText(str(error)) from error


def _commonest(values: Any) -> Any:
    """The value that a list has most often, and of equals the first."""
    values = list(values)
    if not values:
        raise ValueError("commonest of an empty list")
    return max(values, key=values.count)


@pass_context
def _pick(context: Context, values: Any) -> Any:
    """One item of a list, by the row's draw; from its later digits, so that it has nothing to do with the phrasing."""
    values = list(values)
    if not values:
        raise ValueError("pick from an empty list")
    return values[int(context[DRAW_VARIABLE] * 2**20 % 1 * len(values))]


@cache
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(finalize=_written, undefined=StrictUndefined, autoescape=False)
    own = {"commonest": _commonest, "pick": _pick, "thousandths": thousandths, "fractions": fractions, "pixels": pixels}
    environment.filters.update(own)
    del environment.filters["random"]  # it would draw again in every epoch; `pick` is the row's own draw
    environment.globals.clear()  # a row without a column of such a name has no such word either
    environment.bound()
    return environment


@cache
def _text(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _value(source: str) -> TemplateExpression | None:
    body = _environment().parse(source).body
    alone = len(body) == 1 and isinstance(body[0], nodes.Output) and len(body[0].nodes) == 1
    if not alone or isinstance(body[0].nodes[0], nodes.TemplateData):  # type: ignore[attr-defined]
        return None
    inner = re.sub(r"^\s*\{\{[-+]?|[-+]?\}\}\s*$", "", source)
    return _environment().compile_expression(inner, undefined_to_none=False)
