"""Types of pass-through arguments: annotations to plain data (JSON) and back, and their description in messages."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mmtune.methods.setting_types import NumberedName, numbered
from mmtune.utils.errors import nearest

_NAMES: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "null": types.NoneType,
    "any": Any,
    "dict": dict,
    "list": list,
}
_WORDS = {"int": "an integer", "float": "a number", "str": "a string", "bool": "true or false", "null": "null", "any": "a value"}


def plain_type(annotation: Any, nested: bool) -> Any:
    """The part of an annotation that YAML can express, as plain data; None when nothing is left.

    Args:
        annotation: of a dataclass field, with its names resolved.
        nested: whether the library builds nested dataclasses from mappings.

    Returns:
        A name (`int`, `float`, `str`, `bool`, `null`, `any`, `dict`, `list`), or a mapping with one key: `choices` (values),
        `numbered` (the stem of names that end in a number), `any_of`, `list`, `dict` (types), or `keys` (of a nested
        dataclass, with their descriptions).
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    for name, kind in _NAMES.items():
        if annotation is kind:
            return name
    if dataclasses.is_dataclass(annotation):
        description = f"See {getattr(annotation, '__name__', annotation)}."
        return {"keys": {field.name: description for field in dataclasses.fields(annotation) if field.init}} if nested else None
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return {"choices": [member.value for member in annotation]}
    if origin is Literal:
        # PEFT writes 'pissa_niter_[number of iters]' for a family of names.
        stems = [value.partition("[")[0] for value in inner if isinstance(value, str) and "[" in value]
        choices = {"choices": [value for value in inner if not (isinstance(value, str) and "[" in value)]}
        return _any_of([choices, *({"numbered": stem} for stem in stems)])
    if origin in (Union, types.UnionType):
        if any(isinstance(a, type) and issubclass(a, Enum) for a in inner):
            # `SchedulerType | str` is converted to the enumeration later; other names are invalid.
            inner = tuple(a for a in inner if a is not str)
        return _any_of([plain for a in inner if (plain := plain_type(a, nested)) is not None])
    if origin in (list, dict):
        items = [plain_type(a, nested) for a in inner]
        return None if None in items else {origin.__name__: items}
    return None


def _any_of(kinds: list[Any]) -> Any:
    # typing caches unions, and unions of the same members are equal: their order differs between processes.
    kinds = sorted(kinds, key=lambda kind: (kind == "null", json.dumps(kind)))
    return (kinds[0] if len(kinds) == 1 else {"any_of": kinds}) if kinds else None


def annotation_of(kind: Any) -> Any:
    """The inverse of `plain_type`: an annotation, as far as YAML can express it."""
    if isinstance(kind, str):
        return _NAMES[kind]
    ((what, inner),) = kind.items()
    if what == "choices":
        return Literal[tuple(inner)]
    if what == "numbered":
        return numbered(inner)
    if what == "keys":
        return _mapping_with(inner)
    if what == "any_of":
        return functools.reduce(operator.or_, map(annotation_of, inner))
    return {"list": list, "dict": dict}[what][tuple(map(annotation_of, inner))]  # type: ignore[index]


def _mapping_with(keys: dict[str, str]) -> Any:
    def check(value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in keys:
                raise PydanticCustomError("recipe", "{text}", {"text": f"unknown key '{name}'{nearest(name, set(keys))}"})
        return value

    properties = {name: {"description": description} for name, description in keys.items()}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return Annotated[dict[str, Any], AfterValidator(check), WithJsonSchema(schema)]


def describe(annotation: Any, format_value: typing.Callable[[object], str]) -> str:
    """The values that an annotation allows, for a message.

    Args:
        format_value: formats a value as it is written in a recipe.
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        stems = [m.stem for m in inner if isinstance(m, NumberedName)]
        if stems:
            return f"'{stems[0]}' and a number"
        bounds = [f">= {m.ge}" for m in inner if isinstance(m, Ge)] + [f"> {m.gt}" for m in inner if isinstance(m, Gt)]
        bounds += [f"< {m.lt}" for m in inner if isinstance(m, Lt)]
        return " ".join([describe(inner[0], format_value), *([" and ".join(bounds)] if bounds else [])])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a, format_value) for a in inner))
    if origin is Literal:
        return ", ".join(format_value(v) for v in inner) if len(inner) <= 12 else f"one of {len(inner)} names"
    if origin is list:
        return f"a list ({describe(inner[0], format_value)} each)"
    if annotation is dict or origin is dict:
        return "a mapping"
    return next((words for name, words in _WORDS.items() if _NAMES[name] is annotation), str(annotation))


def choices_of(annotation: Any) -> list[str]:
    """The names that an annotation's Literal allows; none for other annotations."""
    inner = typing.get_args(annotation)
    members = inner if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [v for a in members if typing.get_origin(a) is Literal for v in typing.get_args(a) if isinstance(v, str)]
