"""Jinja with a limit on the work of one rendering: data templates and chat templates are untrusted.

The environment is Jinja's immutable sandbox. Every operation whose cost can grow is charged to a `Budget` before it runs:
operators and methods by the size of their result, filters and tests by the size of what they read, and each pass of a loop, a
macro or a block. A filter added to the parsed template charges the loops, so the output of a well-behaved template does not
change. Time and memory are at most proportional to the budget, which grows with the size of the template's input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mmtune.utils.jinja_counting import CHARGE_PASS, CHARGE_READ, count_work

BUDGET = "budget of mmtune"
"""Key of the budget in a rendering's context; a template cannot use it, because it is not a valid Jinja name."""

UNITS = 10_000_000
"""Base budget of a rendering: one unit per character that a filter reads, `ITEM` per item, `PASS` per pass of a loop."""
UNITS_PER_INPUT = 200
"""Budget added per unit of the input, which counts `ITEM` for each item and one unit for every 8 characters."""
CALL = 100
ITEM = 20
MAX_BITS = 10_000
"""Largest integer, in bits."""

COMPILE_FAULTS = (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError)
"""Errors of compiling a template: Jinja's own, and Python's for too deep nesting and too large numbers."""
RENDER_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    NameError,
    RecursionError,
    MemoryError,
)
"""Errors of rendering: Jinja runs Python's operators and methods, and compiles infinity (1e400) to an undefined name."""

_SHALLOW = (
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map"),
    *("reject", "rejectattr", "reverse", "select", "selectattr"),
)
"""Filters that read the items of their value, but not the contents of the items."""
_DEEP_TESTS = (
    *("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne"),
    *("in", "lower", "upper"),
)
"""Tests that read a whole value."""
_REMOVED = ("lipsum",)
_PERCENT = re.compile(r"[-#0 +]*(\d+|\*)?(?:\.(\d+|\*)?)?")
"""Flags, width and precision of a field of a `%` pattern, after its key."""
_SPEC = re.compile(r"\{[^{}:]*:([^{}]*)")
"""Format specification of a field of a `str.format` pattern, up to a nested field."""


_NESTED = (list, tuple, dict, KeysView, ValuesView, ItemsView, Namespace)


class TooMuchWork(TemplateRuntimeError):
    """A rendering exceeded its budget."""


class Budget:
    """Remaining units of one rendering.

    Args:
        values: the template's variables; their size adds to the budget.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values: Mapping[str, Any] | None = values
        self._left = UNITS

    def charge(self, units: int) -> None:
        """Subtract `units`.

        Raises:
            TooMuchWork: the budget is exceeded.
        """
        self._left -= units
        if self._left < 0:
            if self._values is not None:
                self._left += UNITS_PER_INPUT * sum(_sizes(self._values))
                self._values = None
            if self._left < 0:
                raise TooMuchWork("it does more work than a template may: a loop, a repetition or a width in it is too large")

    def read(self, value: Any) -> None:
        """Charge a value and all nested values; a shared value is charged each time."""
        if isinstance(value, (str, bytes)):
            self.charge(len(value) // 8 + 1)
        elif isinstance(value, _NESTED):
            for size in _sizes(value):
                self.charge(size)

    def size(self, value: Any) -> None:
        """Charge a value by its own length, without nested values."""
        if isinstance(value, (str, bytes)):
            self.charge(len(value) // 8 + 1)
        elif isinstance(value, (list, tuple, dict)):
            self.charge(len(value) + 1)


def _sizes(value: Any) -> Iterator[int]:
    """Units of nested lists and objects: `ITEM` per item and one per 8 characters. A shared item counts each time."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, bytes)):
            yield len(value) // 8 + ITEM
            continue
        yield ITEM
        if isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, Namespace):
            waiting.append(object.__getattribute__(value, "_Namespace__attrs"))
        elif isinstance(value, _NESTED):
            waiting += value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Sandbox whose templates need a `Budget` under `BUDGET` in their context; `render_bounded` provides it.

    Args:
        finalize: Jinja's `finalize`, called with each value before it is output.
        options: further options of Jinja's environment.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, finalize: Callable[[Any], Any] | None = None, **options: Any) -> None:
        @pass_context
        def finalize_and_charge(context: Context, value: Any) -> Any:
            value = value if finalize is None else finalize(value)
            _budget(context).read(value)
            return value

        # Constant folding would run filters at compile time, without a budget.
        super().__init__(optimized=False, finalize=finalize_and_charge, **options)

    def bound(self) -> None:
        """Wrap all filters and tests with charges and remove unbounded globals. Call once, after all filters are registered."""
        for name in _REMOVED:
            self.globals.pop(name, None)
        self.filters = {name: _charged(name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests |= {name: _charged(name, tests[name]) for name in _DEEP_TESTS}
        self.filters |= {CHARGE_PASS: _pass, CHARGE_READ: _read}

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result.

        Raises:
            TooMuchWork: its size exceeds the budget.
        """
        budget = _budget(context)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TooMuchWork(f"a number would have more than {MAX_BITS} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
                    units = len(value) * max(times, 0)
                    budget.charge(units if isinstance(value, (list, tuple)) else units // 8 + 1)
        elif operator == "%" and isinstance(left, (str, bytes)):
            _charge_percent(budget, left, right)
        else:
            budget.size(left)
            budget.size(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call's result.

        Raises:
            TooMuchWork: its work exceeds the budget.
        """
        budget = _budget(__context)
        budget.charge(CALL)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes)):
            budget.charge(_method_units(budget, owner, name, args, kwargs))
        elif name in ("index", "count"):
            budget.read(owner)
        elif name == "to_bytes":
            _charge_numbers(budget, (args, kwargs))
        budget.read(args)
        budget.read(kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.size(result)
        return result

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        count_work(source)
        return super()._generate(source, *args, **kwargs)


def render_bounded(template: Template, values: Mapping[str, Any]) -> Iterator[str]:
    """The output of a template, in pieces.

    Args:
        template: from a `BoundedEnvironment`.
        values: the template's variables.

    Raises:
        TemplateError: or another error of `RENDER_FAULTS`; `failure` gives its message.
    """
    return template.root_render_func(template.new_context({**values, BUDGET: Budget(values)}))


def line_of(error: BaseException) -> int | None:
    """Line of the template at which parsing or rendering failed; None if unknown."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        template = trace.tb_frame.f_globals.get("__jinja_template__")
        if template is not None:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return line


def failure(error: BaseException) -> str:
    """Line and reason of a failure, to append to `the template fails`: ` at line 3: ...`; one line, limited in length."""
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply, or calls itself without end"
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    line = line_of(error)
    return f"{f' at line {line}' if line else ''}: {reason[:300]}"


def _budget(context: Context) -> Budget:
    budget: Budget = context.parent[BUDGET]
    return budget


@pass_context
def _pass(context: Context, units: int) -> bool:
    context.parent[BUDGET].charge(units)
    return True


@pass_context
def _read(context: Context, value: Any) -> Any:
    context.parent[BUDGET].read(value)
    return value


def _charged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter or test so that its input and its result are charged."""
    passes = getattr(function, "jinja_pass_arg", None)
    estimate = _FILTER_UNITS.get(name)

    @pass_context
    @wraps(function)
    def charged(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.charge(1)
        first = args[0] if args else None
        if name in _SHALLOW:
            budget.size(first)
        else:
            if isinstance(first, Iterator):  # the lazy result of another filter
                args = (list(_counted(budget, first)), *args[1:])
            budget.read(args)
            budget.read(kwargs)
            if isinstance(first, str):
                budget.charge(len(first))
        if estimate is not None:
            estimate(budget, *args, **kwargs)
        if passes is not None:
            own = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
            args = (own[passes.name], *args)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return _counted(budget, result)
        budget.size(result)
        return result

    return charged


def _counted(budget: Budget, items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        budget.charge(1)
        yield item


def _charge_numbers(budget: Budget, value: Any) -> None:
    """Charge every integer in a value; it may be a width or a count."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        budget.charge(ITEM)
        if isinstance(value, int):
            budget.charge(max(value, 0))
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def _charge_percent(budget: Budget, pattern: str | bytes, arguments: Any) -> None:
    """Charge a `%` pattern as Python parses it: width and precision of each field, and the arguments once per field."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    fields, place = 0, text.find("%")
    while 0 <= place < len(text) - 1:
        fields, place = fields + 1, place + 1
        if text[place] == "(":  # a key, in which parentheses may be nested
            depth = 1
            while depth and place < len(text) - 1:
                place += 1
                depth += {"(": 1, ")": -1}.get(text[place], 0)
            place += 1
        field = _PERCENT.match(text, place)
        if field is not None:
            if "*" in field.groups():
                _charge_numbers(budget, arguments)
            budget.charge(sum(map(_width, field.groups())))
            place = field.end() + 1
        place = text.find("%", place)
    _charge_arguments(budget, fields, arguments)


def _charge_format(budget: Budget, pattern: str, arguments: Any) -> None:
    """Charge a `str.format` pattern: the widths of its fields, and the arguments once per field."""
    pattern = pattern.replace("{{", "")
    if re.search(r"\{[^{}]*\{", pattern):  # a nested field for the width, perhaps with digits around it
        _charge_numbers(budget, arguments)
        specs = [pattern]
    else:
        specs = _SPEC.findall(pattern)
    budget.charge(sum(_width(digits) for spec in specs for digits in re.findall(r"\d+", spec)))
    _charge_arguments(budget, pattern.count("{"), arguments)


def _width(digits: str | None) -> int:
    """The integer of these digits; 10**12, beyond every budget, for 12 digits or more."""
    return 0 if digits in (None, "*") else int(digits) if len(digits) < 12 else 10**12


def _charge_arguments(budget: Budget, fields: int, arguments: Any) -> None:
    if fields > 1:
        budget.charge(fields * sum(_within(budget, arguments)))
    else:
        budget.read(arguments)


def _within(budget: Budget, value: Any) -> Iterator[int]:
    for size in _sizes(value):
        budget.charge(1)
        yield size


def _method_units(budget: Budget, owner: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Units of a string method, besides those of reading the string."""
    budget.charge(len(owner) // 8 + 1)
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"):
        tabs = _occurrences(owner, "\t") if name == "expandtabs" else 1
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        return max(0, *numbers, 0) * tabs
    if name == "replace" and len(args) > 1 and isinstance(args[0], type(owner)) and isinstance(args[1], type(owner)):
        return (owner.count(args[0]) * len(args[1])) // 8  # type: ignore[arg-type]
    if name == "join":
        return len(owner) * (len(args[0]) if args and isinstance(args[0], (str, bytes, list, tuple, dict)) else 0)
    if name == "translate":
        table = args[0] if args and isinstance(args[0], dict) else {}
        return len(owner) * max((len(value) for value in table.values() if isinstance(value, str)), default=1)
    if name in ("format", "format_map"):
        _charge_format(budget, str(owner), (args, kwargs))
    elif name == "striptags":
        return _tag_units(owner)
    return 0


def _tag_units(text: str | bytes) -> int:
    """Units of removing tags: they are removed one at a time, and the rest of the text is copied each time."""
    return len(text) * (_occurrences(text, "<") + 1) // 8


def _occurrences(text: str | bytes, character: str) -> int:
    return text.count(character) if isinstance(text, str) else text.count(character.encode())


def _per_line(budget: Budget, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    wide = width if isinstance(width, int) else len(width) if isinstance(width, str) else 0
    budget.charge(max(0, wide) * (str(text).count("\n") + 1))


def _widths(budget: Budget, _: Any, *args: Any, **kwargs: Any) -> None:
    _charge_numbers(budget, (args, kwargs))


def _replaced(budget: Budget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    budget.charge(str(text).count(str(old)) * len(str(new)) // 8)


def _joined(budget: Budget, items: Any, between: Any = "", *_: Any, **__: Any) -> None:
    budget.charge(len(str(between)) * (len(items) if isinstance(items, (str, list, tuple, dict)) else 0))


def _formatted(budget: Budget, pattern: Any, *args: Any, **kwargs: Any) -> None:
    _charge_percent(budget, str(pattern), (args, kwargs))


def _stripped_of_tags(budget: Budget, text: Any, *_: Any, **__: Any) -> None:
    budget.charge(_tag_units(str(text)))


def _summed(budget: Budget, items: Any, *_: Any, **__: Any) -> None:
    """Charge the sum of lists: each addition copies the previous result."""
    if isinstance(items, (list, tuple)) and not all(isinstance(item, (int, float)) for item in items):
        budget.charge(len(items) * sum(_within(budget, items)) // 8)


def _compared(budget: Budget, items: Any, *_: Any, **__: Any) -> None:
    """Charge the comparison of each item with every other."""
    if isinstance(items, (list, tuple)):
        budget.charge(len(items) * sum(_within(budget, items)) // 8)


def _by_word(budget: Budget, text: Any, width: Any = 79, *args: Any, **kwargs: Any) -> None:
    """Charge pattern matching on each word, and the splitting of long words."""
    width = kwargs.get("width", width)
    words = str(text).split()
    line = width if isinstance(width, int) and width > 0 else 1
    budget.charge(sum(len(word) ** 2 for word in words) // (8 * line) + 10 * len(str(text)))
    ends = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, str)]
    budget.charge(max(ends, default=1) * (len(words) + len(str(text)) // line))


def _pretty(budget: Budget, value: Any, indent: Any = None, *_: Any, **kwargs: Any) -> None:
    """Charge output with one line per item, indented by its depth."""
    wide = kwargs.get("indent", indent)
    wide = len(wide) if isinstance(wide, str) else max(0, wide) if isinstance(wide, int) else 0
    items = sum(1 for _ in _within(budget, value))
    budget.charge(items * wide * 8)


_FILTER_UNITS: dict[str, Callable[..., None]] = {
    "center": _widths,
    "batch": _widths,
    "slice": _widths,
    "round": _widths,
    "truncate": _widths,
    "indent": _per_line,
    "replace": _replaced,
    "join": _joined,
    "format": _formatted,
    "striptags": _stripped_of_tags,
    "urlize": _by_word,
    "wordwrap": _by_word,
    "sum": _summed,
    "commonest": _compared,
    "tojson": _pretty,
}
"""Charges of filters besides those of reading their value and arguments."""
