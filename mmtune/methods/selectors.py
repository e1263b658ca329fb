"""Regular expressions that select modules by their paths, with a bound on the time that one may take."""

from __future__ import annotations

import regex

from mmtune.utils.errors import UserError

NAMED = ("all-linear", "all-norm")
"""Selectors that are names, not expressions."""
SECONDS = 1.0


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
