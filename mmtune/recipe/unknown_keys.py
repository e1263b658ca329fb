"""Messages about unknown keys of a recipe and overrides of the wrong form: the key that was meant, one message per mistake."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from mmtune.methods.method import DEFAULT_METHOD
from mmtune.recipe.other_toolkits import OTHER_NAMES
from mmtune.recipe.pass_through.arguments import MISSING, UNKNOWN, method_arguments, train_arguments
from mmtune.recipe.sections import DataSection, EvaluateSection, ModelSection, Recipe, Source


def error_messages(errors: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Keys and messages of a recipe's validation errors.

    For an unknown key, the message names the recipe's own key where another toolkit or another section has a key of that name.
    A key is not reported as missing if an unknown key beside it is a misspelling of it.

    Args:
        errors: pydantic's error details.
    """
    messages, meant = [], set()
    for error in errors:
        key, message = ".".join(map(str, error["loc"])), error["msg"]
        if error["type"] == UNKNOWN:
            message, sibling = _suggestion(key) or (message, error["ctx"]["closest"])
            if sibling is not None:
                meant.add(".".join(filter(None, (key.rpartition(".")[0], sibling))))
        messages.append((key, message, error["type"] == MISSING))
    return ((key, message) for key, message, is_missing in messages if not (is_missing and key in meant))


def _suggestion(key: str) -> tuple[str, str | None] | None:
    """The message about an unknown key that another toolkit or section has, and the key beside it that was meant, if any.

    None where no toolkit or section has a key of that name.
    """
    parent, _, name = key.rpartition(".")
    target = OTHER_NAMES.get(name) or _key_in_other_section(name)
    if target is None:
        train = train_arguments()
        reason = None if parent else train.renamed.get(name) or train.managed.get(name)
        return (f"unknown key; in the train section: {reason}", None) if reason else None
    path, colon, value = target.partition(":")
    if path.startswith("--"):
        return f"unknown key; give {path}", None
    target_parent, _, target_name = path.rpartition(".")
    if target_parent == parent:
        return f"unknown key; {'write' if value else 'its name here is'} {target_name}{colon}{value}", target_name
    if parent.startswith("tune.") and target_parent == "tune.language":
        return f"unknown key; write {parent}.{target_name}{colon}{value}", None
    return f"unknown key; write {target}", None if parent else path.partition(".")[0]


def _key_in_other_section(name: str) -> str | None:
    """The dotted key of that name in another section."""
    sections: dict[str, Collection[str]] = {
        "model": ModelSection.model_fields,
        "data": DataSection.model_fields,
        "evaluate": EvaluateSection.model_fields,
        "train": train_arguments().arguments,
        "data.train.0": Source.model_fields,
        "tune.language": method_arguments(DEFAULT_METHOD).arguments,
    }
    if name in Recipe.model_fields:
        return None
    return next((f"{section}.{name}" for section, names in sections.items() if name in names), None)


def override_error(text: str) -> str | None:
    """What is wrong with the form of an override `key=value`; None if it is valid."""
    key, equals, value = text.partition("=")
    dotted = re.sub(r"\[(\d+)\]", r".\1", key)
    if equals and dotted != dotted.strip():
        return f"expected key=value without spaces: write {dotted.strip()}={value.strip()}"
    if equals and dotted != key:
        return f"the index of a list item follows a dot: write {dotted}={value}"
    return None


def split_override_error(overrides: Sequence[str]) -> str | None:
    """What is wrong where spaces divided one override `key=value` into several arguments; None if none was divided."""
    for first, second, third in zip(overrides, [*overrides[1:], ""], [*overrides[2:], "", ""], strict=False):
        if "=" not in first and second.startswith("="):
            value = second[1:] or third
        elif second and "=" not in second and (first.endswith("=") or re.fullmatch(r"\w+(\.\w+)+", first)):
            value = second
        else:
            continue
        return f"command line: {first}: expected key=value without spaces: write {first.removesuffix('=')}={value}"
    return None


def key_of_option(name: str) -> str | None:
    """The recipe's key that was given as an option `--NAME`, if there is one."""
    if re.fullmatch(r"(model|tune|data|evaluate|train)\.[\w.]+|output_dir", name):
        return name
    key = (OTHER_NAMES.get(name) or _key_in_other_section(name) or "").partition(":")[0]
    return key if re.fullmatch(r"[\w.]+", key) else None
