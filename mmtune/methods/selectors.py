"""Regular expressions that select modules by their paths, with a bound on the time that one may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import regex

from mmtune.utils.errors import UserError

NAMED = ("all-linear", "all-norm")
"""Selectors of modules that are names, not expressions."""
ALL_EXPERTS = "all-experts"
"""The selector of the stacked weights of all experts."""
SECONDS = 1.0

if TYPE_CHECKING:
    from torch import nn


def compile_selector(text: str) -> regex.Pattern[str]:
    """
    Raises:
        UserError: it is not a regular expression.
    """
    try:
        return regex.compile(text)
    except regex.error as error:
        raise UserError(f"{text!r} is not a regular expression: {error}") from error


def is_match(pattern: regex.Pattern[str], path: str) -> bool:
    """Whether an expression matches a whole path.

    Raises:
        UserError: matching takes longer than `SECONDS`, as with repeats inside repeats.
    """
    try:
        return pattern.fullmatch(path, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise UserError(
            f"{pattern.pattern!r} takes more than {SECONDS:g} s to match {path}; write it without repeats inside repeats"
        ) from error


def is_router(module: nn.Module) -> bool:
    """Whether a linear layer of a model's own code returns more than its product, as the routers of Llama 4 and PhiMoE do.

    An update beside such a layer would be added to a tuple.
    """
    from torch import nn

    is_linear = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return is_linear and type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
