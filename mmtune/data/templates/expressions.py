"""Sandboxed Jinja over one row: rendering text from the row's columns, or evaluating one expression."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateRuntimeError, Undefined, UndefinedError, meta, nodes, pass_context
from jinja2.environment import TemplateExpression
from jinja2.runtime import Context
from pydantic import BaseModel, ConfigDict

from mmtune.data.message import RowError
from mmtune.data.templates.regions import NativeRegion, Region, fractions, pixels, require_region, thousandths
from mmtune.utils import bounded_jinja
from mmtune.utils.bounded_jinja import BUDGET, COMPILE_FAULTS, RENDER_FAULTS, BoundedEnvironment, Budget, TooMuchWork

DRAW_VARIABLE = "random draw"
"""The context variable with the row's random draw. Not a valid Jinja name, so that it cannot collide with a column."""

WRITTEN_REGIONS = "written regions"
"""The context variable with the `WrittenRegions` of the text of a message."""
NATIVE_MARK = "\ufdd0{}\ufdd1"
"""What `native` writes for the region of a number: noncharacters of Unicode, which no text contains."""
_NATIVE_MARK = re.compile("\ufdd0(\\d+)\ufdd1")


@dataclass
class WrittenRegions:
    """The regions that filters have written into a text.

    Attributes:
        native: those in the convention of the model's family.
        extents: the coordinates of the image's lower right corner, of all others.
    """

    native: list[NativeRegion] = field(default_factory=list)
    extents: set[tuple[float, float]] = field(default_factory=set)

    def extent(self) -> tuple[float, float] | None:
        """The coordinates of the image's lower right corner, if all regions have the same; None also for native ones."""
        return next(iter(self.extents)) if len(self.extents) == 1 and not self.native else None


class NotText(TemplateRuntimeError):
    """A template would write a value that is not text or a number."""


class TemplateSection(BaseModel):
    """A section of a data template; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_jinja(source: str) -> None:
    """Check the syntax of a piece of Jinja.

    Raises:
        ValueError: invalid Jinja.
    """
    try:
        _compile_text(source)
        _compile_value(source)
        names_read(source)
    except COMPILE_FAULTS as error:
        raise ValueError(f"not valid Jinja{bounded_jinja.failure(error)}: {source[:300]}") from error


def is_jinja(text: str) -> bool:
    """Whether a text that can also be the name of a field is Jinja."""
    return "{{" in text or "{%" in text


def names_read(source: str) -> set[str]:
    """The variables that a piece of Jinja reads from its context."""
    return meta.find_undeclared_variables(_environment().parse(source))


def has_filter(source: str, name: str) -> bool:
    """Whether a piece of Jinja uses a filter."""
    return any(node.name == name for node in _environment().parse(source).find_all(nodes.Filter))


def render_expression(row_id: str, where: str, source: str, context: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Render a piece of Jinja to text.

    Args:
        row_id: the row's id, for the error.
        where: the section of the template, for the error.
        source: the Jinja source.
        context: the variables.
        row: the row, whose columns the error lists.

    Raises:
        RowError: the Jinja cannot be rendered for this row.
    """
    try:
        return "".join(bounded_jinja.render_bounded(_compile_text(source), context))
    except RENDER_FAULTS as error:
        raise _row_error(row_id, where, error, row) from error


def evaluate_expression(row_id: str, where: str, source: str, context: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    """Evaluate a piece of Jinja: the value of a single `{{ expression }}` (a list stays a list), or else the rendered text.

    Arguments and errors are those of `render_expression`.
    """
    try:
        compiled = _compile_value(source)
        if compiled is None:
            return "".join(bounded_jinja.render_bounded(_compile_text(source), context))
        value = compiled({**context, BUDGET: Budget(context)})
        value = list(value) if isinstance(value, Iterator) else value
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Undefined):
                str(item)  # raises an error that names the undefined variable
        return value
    except RENDER_FAULTS as error:
        raise _row_error(row_id, where, error, row) from error


def as_text(value: Any) -> str:
    """The text of a row's value.

    Raises:
        ValueError: null, true, false, a list, an object, bytes, NaN or infinity, which have no unique text.
    """
    if value is None or isinstance(value, bool):
        raise ValueError(f"expected text or a number, got {'null' if value is None else str(value).lower()}")
    if isinstance(value, Region):
        filters = f"{{{{ {value.kind} | native }}}}, thousandths, fractions or pixels"
        raise ValueError(f"expected text or a number, got a {value.kind}; use a filter: {filters}")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected text or a number, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected text or a finite number, got {value}")
    return str(value)


def _row_error(row_id: str, where: str, error: Exception, row: Mapping[str, Any]) -> RowError:
    columns = ", ".join(map(str, row)) or "no columns"
    is_row_issue = isinstance(error, (UndefinedError, NotText))
    detail = str(error)[:300] if is_row_issue else f"the template fails{bounded_jinja.failure(error)}"
    if isinstance(error, UndefinedError):
        issue = "field_missing"
    else:
        issue = "template_fails" if isinstance(error, (TooMuchWork, RecursionError, MemoryError)) else "field_type"
    return RowError(row_id, where, f"{detail}; the row has: {columns[:300]}", issue)


def _finalize(value: Any) -> Any:
    if isinstance(value, Undefined):
        return value
    try:
        return as_text(value)
    except ValueError as error:
        raise NotText(str(error)) from error


def _most_common(values: Any) -> Any:
    """The most common value of a list; of several, the first."""
    values = list(values)
    if not values:
        raise ValueError("commonest of an empty list")
    return max(values, key=values.count)


@pass_context
def _pick(context: Context, values: Any) -> Any:
    """One item of a list, chosen by the row's random draw. The low digits are used, so that it is independent of the phrasing."""
    values = list(values)
    if not values:
        raise ValueError("pick from an empty list")
    return values[int(context[DRAW_VARIABLE] * 2**20 % 1 * len(values))]


def _parse_list(text: Any) -> Any:
    """The list that a text holds in the notation of Python; a list stays as it is."""
    if isinstance(text, list):
        return text
    try:
        values = ast.literal_eval(as_text(text).strip())
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"expected a list written as text, got {as_text(text)[:80]!r}") from error
    if not isinstance(values, list):
        raise ValueError(f"expected a list written as text, got {as_text(text)[:80]!r}")
    return values


@pass_context
def _native(context: Context, region: Any, label: Any = None) -> str:
    """A mark for a region; `native_pieces` replaces it."""
    written: WrittenRegions | None = context.get(WRITTEN_REGIONS)
    if written is None:
        raise ValueError("`native` can only write a region in the text of a message, and not in a choice")
    written.native.append(NativeRegion(_declared(region), None if label is None else as_text(label)))
    return NATIVE_MARK.format(len(written.native) - 1)


def _declared(region: Any) -> Region:
    """The region itself. Raises UndefinedError for that of a row without regions, and TypeError for any other value."""
    if isinstance(region, Undefined):
        str(region)
    return require_region(region)


def _recorded(write: Callable[..., str], extent_of: Callable[[Region], tuple[float, float]]) -> Callable[..., str]:
    """A filter that also records the extent of the coordinates which it writes."""

    @pass_context
    def write_and_record(context: Context, region: Any, *arguments: Any, **options: Any) -> str:
        written: WrittenRegions | None = context.get(WRITTEN_REGIONS)
        text = write(_declared(region), *arguments, **options)
        if written is not None:
            written.extents.add(extent_of(region))
        return text

    return write_and_record


def native_pieces(text: str, regions: Sequence[NativeRegion]) -> list[str | NativeRegion]:
    """A rendered text, split at the regions that `native` wrote into it; no piece is empty.

    Raises:
        ValueError: the text has the mark of no region, or that of a region that was changed by another filter.
    """
    pieces = [piece if number % 2 == 0 else regions[int(piece)] for number, piece in enumerate(_NATIVE_MARK.split(text))]
    if any(isinstance(piece, str) and ("\ufdd0" in piece or "\ufdd1" in piece) for piece in pieces):
        raise ValueError("expected text as `native` wrote it, got the mark of a region that another filter changed")
    return [piece for piece in pieces if piece != ""]


@cache
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(finalize=_finalize, undefined=StrictUndefined, autoescape=False)
    environment.filters.update(commonest=_most_common, pick=_pick, parse_list=_parse_list)
    environment.filters["native"] = _native
    environment.filters["thousandths"] = _recorded(thousandths, lambda region: (1000, 1000))
    environment.filters["fractions"] = _recorded(fractions, lambda region: (1, 1))
    environment.filters["pixels"] = _recorded(pixels, lambda region: (region.width, region.height))
    del environment.filters["random"]  # it would draw again in every epoch; `pick` uses the row's draw
    environment.globals.clear()  # a missing column must be an error, not a Jinja global of the same name
    environment.bound()
    return environment


@cache
def _compile_text(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _compile_value(source: str) -> TemplateExpression | None:
    body = _environment().parse(source).body
    is_single_expression = len(body) == 1 and isinstance(body[0], nodes.Output) and len(body[0].nodes) == 1
    if not is_single_expression or isinstance(body[0].nodes[0], nodes.TemplateData):  # type: ignore[attr-defined]
        return None
    inner = re.sub(r"^\s*\{\{[-+]?|[-+]?\}\}\s*$", "", source)
    return _environment().compile_expression(inner, undefined_to_none=False)
