"""Errors that the user can correct. The command line shows them without a traceback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Invalid input: a recipe, a row, a file, an argument. Exit code 2.

    The message says what was wrong, where (file and line, row id, key or module path), and what was expected.
    """


class RecipeValueError(UserError):
    """The value of a recipe's key is wrong. The message begins with the key.

    Args:
        key: dotted, such as `train.learning_rate`; for an error about one source of rows, relative to that source.
        problem: what is wrong, and what would be right.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


@contextmanager
def errors_at_key(key: str) -> Iterator[None]:
    """Raise each UserError of the block as a RecipeValueError of a key; one that names a key already is raised as it is."""
    try:
        yield
    except RecipeValueError:
        raise
    except UserError as error:
        raise RecipeValueError(key, str(error)) from error


def missing_library(error: ImportError) -> str | None:
    """Why a library cannot be imported, in one line; None where the import error is a bug of mmtune.

    For an optional package that is not installed, libraries raise ImportError without a module name (`requires_backends` of
    transformers) or ModuleNotFoundError with the name. A missing module of mmtune, or a name that an installed module does not
    have, is a bug.
    """
    if (error.name or "").partition(".")[0] == "mmtune" or (error.name and not isinstance(error, ModuleNotFoundError)):
        return None
    reason = " ".join(str(error).split())
    cause: BaseException = error
    while cause.__cause__ is not None:  # transformers wraps the errors of its modules
        cause = cause.__cause__
    if cause is error:
        return reason
    return f"{reason} ({(str(cause).strip() or type(cause).__name__).splitlines()[0]})"


def reason_of(error: BaseException) -> str:
    """The reason of an error in one line. Of an OSError: the system's text without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class Stopped(Exception):
    """A signal ended the run after a complete step.

    Args:
        number: of the signal.
        message: the step reached and how to resume.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Terminated(BaseException):
    """A signal asked the process to end at once. Not an Exception, so that code which continues after one does not catch it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class CheckFailed(Exception):
    """The input is valid but a check of the result failed: a merge that differs, rows that cannot train. Exit code 1.

    Args:
        message: which check failed.
        result: the command's result, which `--json` prints all the same.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def closest_name(name: str, valid: Collection[str]) -> str | None:
    """The valid name that a misspelt name is closest to; None when no name is close."""
    import difflib

    if len(name) > 100 or len(valid) > 1000:  # text from a file, not a misspelt name; the comparison takes time by the lengths
        return None
    names = [each for each in valid if len(each) <= 100]
    same = (each for each in names if each.lower() == name.lower())
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None) or next(same, None)


def closest_hint(name: str, valid: Collection[str]) -> str:
    """A hint for a misspelt name, `; did you mean 'x'?`, or an empty text when no name is close."""
    close = closest_name(name, valid)
    return f"; did you mean '{close}'?" if close is not None else ""


def nearest(name: str, valid: Collection[str]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or the valid names when no name is close."""
    names = sorted(valid)
    listed = f"; valid here: {', '.join(each[:100] for each in names[:20])}{', ...' if len(names) > 20 else ''}"
    return closest_hint(name, valid) or listed
