"""Shipped recipes and data templates: in the wheel, or at the top of the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from mmtune.utils.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_dir(kind: Literal["recipes", "data_templates"]) -> Path:
    """The directory of the shipped files of one kind, in the wheel or the checkout."""
    in_wheel = _PACKAGE / "_shipped" / kind
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / kind


def yaml_files(folder: Path) -> dict[str, Path]:
    """The YAML files of a folder by name (the file name without `.yaml`), sorted."""
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name, as `yaml_files`."""
    return yaml_files(shipped_dir("recipes"))


def copy_recipe(name: str, dest: Path) -> Path:
    """Copy a shipped recipe to a file or into a directory, and return the path of the copy.

    Raises:
        UserError: for an unknown name, a destination that exists, or one whose directory does not.
    """
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"unknown recipe '{name}'{nearest(name, set(shipped))}")
    target = dest / shipped[name].name if dest.is_dir() else dest
    if target.exists():
        raise UserError(f"{target}: already exists; choose another name or remove it first")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the directory {target.parent} does not exist")
    shutil.copyfile(shipped[name], target)
    return target
