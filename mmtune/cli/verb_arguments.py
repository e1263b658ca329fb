"""Arguments that several verbs of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtune.utils.errors import UserError

AddVerb = Callable[[Any, str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]
"""Declares one verb. Arguments: argparse's subparsers, the verb's name, its function, its help text."""


def add_recipe_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments RECIPE and key=value."""
    verb.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    verb.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="override keys of the recipe, such as train.learning_rate=1e-4",
    )


def check_jsonl(out: Path) -> None:
    """Check the ending of a file that --out names.

    Raises:
        UserError: it does not end in .jsonl, or is a directory.
    """
    if out.suffix != ".jsonl" or out.is_dir():
        raise UserError(f"--out {out}: expected a .jsonl file")


def add_trust(verb: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code. The recipe of a run does not give this permission."""
    verb.add_argument(
        "--trust-remote-code", action="store_true", help="allow Python code that comes with the run, the model or the base"
    )
