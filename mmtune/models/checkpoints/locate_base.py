"""Location of a base: built in, a directory, the hub cache, or the hub."""

from __future__ import annotations

from pathlib import Path

from mmtune.builtin import TINY_LLAVA
from mmtune.utils.errors import RecipeValueError, UserError, nearest
from mmtune.utils.hub import HUB_ID, cached_snapshot, is_local_name, locate_checkpoint, missing_path_message

CHECKPOINT_MARK = "config.json"
"""The file that identifies a directory as a checkpoint."""
UNTRAINED = "builtin:tiny-llava-untrained"
BUILTIN = {"builtin:tiny-llava": TINY_LLAVA}


def resolve_base(base: str) -> str:
    """The directory or hub id that transformers loads for a recipe's `model.base`, without a request to the hub.

    Raises:
        UserError: an unknown built-in name, a directory without config.json, or a local path that does not exist.
    """
    if base.startswith("builtin:"):
        if base not in BUILTIN:
            raise RecipeValueError("model.base", f"unknown built-in base '{base}'{nearest(base, {*BUILTIN, UNTRAINED})}")
        return str(BUILTIN[base])
    path = Path(base)
    if path.is_dir():
        if not (path / CHECKPOINT_MARK).is_file():
            raise RecipeValueError(
                "model.base", f"{base}: expected a checkpoint directory with config.json, found no config.json"
            )
        return str(path.resolve())
    if is_local_name(base):
        raise RecipeValueError("model.base", f"{missing_path_message(base)}")
    return base


def locate_base(base: str) -> str:
    """The directory or hub id that transformers loads, or the cached copy if the hub cannot be reached.

    Raises:
        UserError: as `resolve_base`; or the hub has no such model, or it cannot be reached and the model is not in the cache.
    """
    resolved = resolve_base(base)
    try:
        return locate_checkpoint(resolved)
    except UserError as error:
        raise RecipeValueError("model.base", f"{base}: {error}") from error


def local_folder(base: str) -> Path | None:
    """The local folder with a base's `config.json`: its directory or its snapshot in the hub cache; None if there is none."""
    folder = BUILTIN.get(base, Path(base))
    if folder.is_dir():
        return folder
    return cached_snapshot(base, CHECKPOINT_MARK) if HUB_ID.fullmatch(base) else None
