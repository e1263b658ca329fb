"""Arguments that several verbs of the command line share."""

from __future__ import annotations

import argparse
import math
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


def add_question_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of a question to a model: its images, how they are read, and the system prompt."""
    verb.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image for the first question; repeat for several"
    )
    help_text = "grey images with more than 8 bits: the values that become black and white (as `window` of a source)"
    verb.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help=help_text)
    verb.add_argument("--system", metavar="TEXT", help="the system prompt (default: that of the chat template, if it has one)")


def check_question_arguments(arguments: argparse.Namespace) -> tuple[float, float] | None:
    """Check the arguments of `add_question_arguments` with `--prompt`, and return the window.

    Raises:
        UserError: a window that is not two ascending numbers, an empty system prompt, or neither text nor image to ask about.
    """
    if arguments.system is not None and not arguments.system.strip():
        raise UserError("--system: expected a text, got an empty one")
    if arguments.prompt is not None and not (arguments.prompt.strip() or arguments.image):
        raise UserError("--prompt: expected a text, got an empty one")
    if arguments.window is None:
        return None
    low, high = arguments.window
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--window {low:g} {high:g}: expected LOW HIGH, two finite numbers, the lower one first")
    return low, high
