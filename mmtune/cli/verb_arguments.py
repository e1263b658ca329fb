"""What the files of the command line share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

AddVerb = Callable[[Any, str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]
"""Declares one verb: argparse's subparsers, the verb's name, its function, its help."""


def add_recipe_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare a recipe and changes to it."""
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    verb.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="changes to the recipe, such as train.learning_rate=1e-4"
    )


def add_trust(verb: argparse.ArgumentParser) -> None:
    """Declare the permission to run code that comes with what is loaded; a run's own recipe does not give it."""
    verb.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the run, model or base")
