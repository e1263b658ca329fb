"""The one family of errors that is the reader's to mend. The command line shows them without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """The input is wrong: a recipe, a row, a file, an argument. Exit code 2.

    The message says what was wrong, where (file and line, row id, key or module path), and what would be right.
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
    """Why a library cannot be imported, in one line; None where the import error is a bug of ours.

    Libraries raise ImportError with no module's name for an optional package that they ask for (`requires_backends` of
    transformers), and ModuleNotFoundError with its name. A name inside mmtune, or one that an installed module lacks, is a bug.
    """
    if (error.name or "").partition(".")[0] == "mmtune" or (error.name and not isinstance(error, ModuleNotFoundError)):
        return None
    reason = " ".join(str(error).split())
    cause: BaseException = error
    while cause.__cause__ is not None:  # transformers wraps what its modules raise
        cause = cause.__cause__
    if cause is error:
        return reason
    return f"{reason} ({(str(cause).strip() or type(cause).__name__).splitlines()[0]})"


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line: of an OSError the system's words without the path, which the message has already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class Stopped(Exception):
    """A signal ended the run after a whole step.

    Args:
        number: the signal's.
        message: where the run stands and how it goes on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Terminated(BaseException):
    """A signal asked the process to end at once. No Exception, so that whoever goes on after one does not go on after this.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class CheckFailed(Exception):
    """The input was fine and the result did not hold: a merge that differs, a check that found faults. Exit code 1.

    Args:
        message: what did not hold.
        result: what the command reports all the same, for `--json`.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def nearest(name: str, valid: list[str] | set[str] | tuple[str, ...]) -> str:
    """A hint for a misspelt name: `; did you mean 'x'?`, or the valid names when nothing is close."""
    import difflib

    # Comparing takes the product of the lengths. What is longer than any name of ours comes from a file and is not misspelt.
    likely = [each for each in valid if len(each) <= 100] if len(name) <= 100 and len(valid) <= 1000 else []
    close = difflib.get_close_matches(name, likely, n=1, cutoff=0.6) or [each for each in likely if each.lower() == name.lower()]
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = sorted(valid)
    return f"; valid here: {', '.join(each[:100] for each in shown[:20])}{', ...' if len(shown) > 20 else ''}"
