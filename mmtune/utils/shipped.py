"""Where the recipes and data templates that ship with mmtune are: in the wheel, or at the top of the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from mmtune.utils.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_dir(kind: Literal["recipes", "data_templates"]) -> Path:
    """The directory of the shipped files of one kind: the wheel's own copy, else the checkout's."""
    in_wheel = _PACKAGE / "_shipped" / kind
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / kind


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name (the file's name without `.yaml`), in the order of their names."""
    return {file.stem: file for file in sorted(shipped_dir("recipes").glob("*.yaml"))}


def copy_recipe(name: str, dest: Path) -> Path:
    """Copy a shipped recipe to a file, or into a directory under its own name, and return where it went.

    Raises:
        UserError: for an unknown name, a destination that exists, or one whose directory does not.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"recipe '{name}' is not one of those that ship{nearest(name, set(shipped))}")
    target = dest / shipped[name].name if dest.is_dir() else dest
    if target.exists():
        raise UserError(f"{target}: already exists; choose another name or remove it first")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the directory {target.parent} does not exist")
    shutil.copyfile(shipped[name], target)
    return target
