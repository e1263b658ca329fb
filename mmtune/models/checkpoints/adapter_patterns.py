"""Regular expressions in an adapter's configuration: matched with a time limit and replaced by plain paths.

PEFT matches them with `re`, which has no time limit: an expression with nested repeats may never return.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from mmtune.methods.selectors import compile_selector, is_match
from mmtune.utils.errors import UserError

SELECTORS = ("target_modules", "exclude_modules", "feedforward_modules")
"""Settings that are an expression if they are a string. PEFT matches it against the full path of a module."""
KEYED = ("rank_pattern", "alpha_pattern")
"""Settings whose keys are expressions that match the end of a module's path."""
NAMES = ("layers_pattern", "modules_to_save")
"""Settings with module names, which PEFT inserts into an expression."""
FUSED = ("gate_up_proj", "down_proj")
"""Fused parameters of a mixture of experts, each with one layer of all experts."""
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Names of the unfused expert layers (before transformers 5), which PEFT also looks for."""
_PLAIN = re.compile(r"[\w.-]+")


def expand_patterns(config: PeftConfig, model: nn.Module, file: Path) -> None:
    """Replace each regular expression of a configuration by an alternation of the paths that it matches, in place.

    PEFT adapts the same modules as before. Plain names are unchanged.

    Args:
        config: the adapter's configuration, read from `file`.
        model: its base.
        file: the configuration file, for error messages.

    Raises:
        UserError: an expression that is invalid or exceeds the time limit, or an expression where a name is expected.
    """
    for name in NAMES:
        value = getattr(config, name, None) or ()
        for entry in (value,) if isinstance(value, str) else value:
            if not _is_plain(entry):
                raise UserError(f"{file}: {name}: expected the name of a module, got {entry!r}")
    paths = _paths(model)
    for name in SELECTORS:
        value = getattr(config, name, None)
        if not isinstance(value, str) or value.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND or value == DUMMY_TARGET_MODULES:
            continue
        setattr(config, name, _alternation(value, value, paths, f"{file}: {name}"))
    for name in KEYED:
        value = getattr(config, name, None) or {}
        if not isinstance(value, dict):
            raise UserError(f"{file}: {name}: expected an object with one value per module, got {value!r}")
        if not all(map(_is_plain, value)):
            setattr(config, name, {_key(key, paths, f"{file}: {name}"): setting for key, setting in value.items()})


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def _key(key: str, paths: Collection[str], location: str) -> str:
    """A key as PEFT expects it; PEFT prepends `(.*\\.)?`."""
    if _is_plain(key):
        return key
    return f"^(?:{_alternation(key, rf'(.*[.])?({key})', paths, location)})"


def _alternation(original: str, expression: str, paths: Collection[str], location: str) -> str:
    """An alternation of the paths that `expression` matches; `original`, escaped, if there are none (PEFT prints it)."""
    try:
        pattern = compile_selector(expression)
        matches = [path for path in paths if is_match(pattern, path)]
    except UserError as error:
        raise UserError(f"{location}: {error}") from error
    return "|".join(map(re.escape, matches or [original]))


def _paths(model: nn.Module) -> list[str]:
    """All names that PEFT may match an expression against."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    split = [name.rpartition(".") for name in parameters]
    experts = [f"{holder}.{name}" for holder, _, last in split if last in FUSED for name in EXPERTS]
    return list(dict.fromkeys([*modules, *parameters, *experts, *EMBEDDING_LAYER_NAMES]))
