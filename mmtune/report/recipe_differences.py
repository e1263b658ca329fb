"""Differences of a recipe from the defaults, and between recipes, key by key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmtune.methods.method_table import METHODS
from mmtune.recipe.pass_through.arguments import Arguments, method_arguments, train_arguments
from mmtune.recipe.recipe import Recipe
from mmtune.recipe.section import Section
from mmtune.recipe.tune_section import DEFAULT_METHODS

REQUIRED = "required"
"""In place of the default of a key that every recipe gives."""
NOT_SET = "not set"
"""In place of the value of a key that a recipe does not have."""
SHOWN_VALUE = 500
"""Characters of one value."""


def differences_from_defaults(recipe: Recipe) -> list[dict[str, str]]:
    """The keys that a recipe sets to another value than the default, with both, as text by column."""
    written = _flat(recipe.model_dump(mode="json", exclude_defaults=True))
    rows = []
    for key, value in written.items():
        default = _default(recipe, key)
        if default != value:
            rows.append({"key": key, "this run": _text(value), "default": default if default == REQUIRED else _text(default)})
    return rows


def differences_between(recipes: Mapping[str, Recipe]) -> list[dict[str, str]]:
    """The keys in which recipes differ, with the value in each, as text by column.

    Where they are written to does not count, nor a null of a section that another recipe does not have.
    """
    flat = {name: _flat(recipe.model_dump(mode="json")) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = []
    for key in keys:
        own = [values.get(key) for values in flat.values()]
        texts = [_text(value) if key in values else NOT_SET for value, values in zip(own, flat.values(), strict=True)]
        if len(set(texts)) > 1 and key != "output_dir" and any(value is not None for value in own):
            rows.append({"key": key, **dict(zip(flat, texts, strict=True))})
    return rows


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as one mapping by dotted keys, as overrides name them."""
    if isinstance(value, Mapping) and (value or not key):
        parts = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
        parts = [(str(number), each) for number, each in enumerate(value)]
    else:
        return {key: value}
    return {name: each for part, inner in parts for name, each in _flat(inner, f"{key}.{part}" if key else part).items()}


def _default(recipe: Recipe, key: str) -> Any:
    """The default of a key that a recipe has, in the form of `model_dump`."""
    section, _, rest = key.partition(".")
    if section == "train":
        return _argument_default(train_arguments(), rest)
    if section == "tune":
        component, _, name = rest.partition(".")
        method = getattr(recipe.tune, component).method
        if name == "method":
            return DEFAULT_METHODS[component]
        if name == "learning_rate":
            return METHODS[method].learning_rate if method in METHODS else None
        return _argument_default(method_arguments(method), name) if method in METHODS else None
    owner: Any = recipe
    *parents, name = key.split(".")
    for part in parents:
        owner = owner[int(part)] if isinstance(owner, Sequence) else getattr(owner, part, None)
    if not isinstance(owner, Section) or name not in type(owner).model_fields:
        return None
    field = type(owner).model_fields[name]
    if field.is_required():
        return REQUIRED
    default = field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def _argument_default(arguments: Arguments, name: str) -> Any:
    top = name.partition(".")[0]
    if top in arguments.defaults:
        return arguments.defaults[top]
    default = arguments.arguments[top].default if top in arguments.arguments else None
    return None if default is dataclasses.MISSING else default


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_VALUE else f"{text[:SHOWN_VALUE]}..."
