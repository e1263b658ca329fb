"""Where a base is: built in, a directory, the hub's cache on this machine, or the hub."""

from __future__ import annotations

from pathlib import Path

from mmtune.builtin import TINY_LLAVA
from mmtune.utils.errors import RecipeValueError, UserError, nearest
from mmtune.utils.hub import HUB_ID, cached_snapshot, is_local_name, locate_checkpoint, missing_path_message

CHECKPOINT_MARK = "config.json"
"""The file by which a directory is known to be a checkpoint."""
UNTRAINED = "builtin:tiny-llava-untrained"
BUILTIN = {"builtin:tiny-llava": TINY_LLAVA}


def resolve_base(base: str) -> str:
    """A hub id or directory that transformers loads, for a recipe's `model.base`; the hub is not asked.

    Raises:
        UserError: an unknown built-in name, or a path that looks local and is not there.
    """
    if base.startswith("builtin:"):
        if base not in BUILTIN:
            raise RecipeValueError("model.base", f"'{base}' is not built in{nearest(base, {*BUILTIN, UNTRAINED})}")
        return str(BUILTIN[base])
    path = Path(base)
    if path.is_dir():
        if not (path / CHECKPOINT_MARK).is_file():
            raise RecipeValueError("model.base", f"{base} holds no config.json, so it is no model checkpoint")
        return str(path.resolve())
    if is_local_name(base):
        raise RecipeValueError("model.base", f"{missing_path_message(base)}")
    return base


def locate_base(base: str) -> str:
    """As `resolve_base`; of a hub id, the cached copy where the hub cannot be reached.

    Raises:
        UserError: as `resolve_base`; or the hub has no such model, or cannot be reached and the cache does not hold it.
    """
    resolved = resolve_base(base)
    try:
        return locate_checkpoint(resolved)
    except UserError as error:
        raise RecipeValueError("model.base", f"{base}: {error}") from error


def local_folder(base: str) -> Path | None:
    """Where a base's `config.json` is on this machine: its directory, or its snapshot in the hub's cache; None: nowhere."""
    folder = BUILTIN.get(base, Path(base))
    if folder.is_dir():
        return folder
    return cached_snapshot(base, CHECKPOINT_MARK) if HUB_ID.fullmatch(base) else None
