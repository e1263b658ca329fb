"""Regular expressions of an adapter's configuration, matched with a time limit before PEFT reads them.

PEFT matches them with `re`, which has no time limit: an expression with repeats inside repeats never ends there.
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
"""Settings that are an expression where they are a text. PEFT matches it against the whole path of a module."""
KEYED = ("rank_pattern", "alpha_pattern")
"""Settings whose keys are expressions for the end of a module's path."""
NAMES = ("layers_pattern", "modules_to_save")
"""Settings that PEFT puts into an expression, and that hold names."""
FUSED = ("gate_up_proj", "down_proj")
"""Parameters of a mixture of experts that hold the layers of all of them."""
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Layers that PEFT looks for beside those parameters, by the names that they had before transformers 5 fused them."""
_PLAIN = re.compile(r"[\w.-]+")


def expand_patterns(config: PeftConfig, model: nn.Module, file: Path) -> None:
    """Replace each expression of a configuration by one that lists the paths it matches, in place.

    What PEFT makes of the configuration stays the same. Plain names are left as they are.

    Args:
        config: the adapter's configuration, as read from `file`.
        model: its base.
        file: the configuration file, for errors.

    Raises:
        UserError: an expression that is not valid or takes too long, or an expression where a name is expected.
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
        setattr(config, name, _listed(value, value, paths, f"{file}: {name}"))
    for name in KEYED:
        value = getattr(config, name, None) or {}
        if not isinstance(value, dict):
            raise UserError(f"{file}: {name}: expected an object with a value for each module, got {value!r}")
        if not all(map(_is_plain, value)):
            setattr(config, name, {_key(key, paths, f"{file}: {name}"): of_key for key, of_key in value.items()})


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def _key(key: str, paths: Collection[str], where: str) -> str:
    """A key for PEFT, which matches it after `(.*\\.)?`."""
    if _is_plain(key):
        return key
    return f"^(?:{_listed(key, rf'(.*[.])?({key})', paths, where)})"


def _listed(written: str, matched: str, paths: Collection[str], where: str) -> str:
    """An expression for the paths that `matched` matches; where there are none, one for the text `written`, which PEFT prints."""
    try:
        pattern = compile_selector(matched)
        found = [path for path in paths if is_match(pattern, path)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return "|".join(map(re.escape, found or [written]))


def _paths(model: nn.Module) -> list[str]:
    """All that PEFT may match an expression against."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    split = [name.rpartition(".") for name in parameters]
    experts = [f"{holder}.{name}" for holder, _, last in split if last in FUSED for name in EXPERTS]
    return list(dict.fromkeys([*modules, *parameters, *experts, *EMBEDDING_LAYER_NAMES]))
