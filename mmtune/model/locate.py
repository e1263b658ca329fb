"""Where a base is: built in, a directory, the hub's cache on this machine, or the hub."""

from __future__ import annotations

import re
from pathlib import Path

from mmtune.builtin import TRAINED
from mmtune.errors import UserError, nearest

CHECKPOINT_MARK = "config.json"
"""The file by which a directory is known to be a checkpoint."""
UNTRAINED = "builtin:tiny-llava-untrained"
BUILTIN = {"builtin:tiny-llava": TRAINED}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def resolve_base(base: str) -> str:
    """A hub id or directory that transformers loads, for a recipe's `model.base`.

    Raises:
        UserError: an unknown built-in name, or a path that looks local and is not there.
    """
    if base.startswith("builtin:"):
        if base not in BUILTIN:
            raise UserError(f"model.base: '{base}' is not built in{nearest(base, {*BUILTIN, UNTRAINED})}")
        return str(BUILTIN[base])
    path = Path(base)
    if path.is_dir():
        if not (path / CHECKPOINT_MARK).is_file():
            raise UserError(f"model.base: {base} holds no config.json, so it is no model checkpoint")
        return str(path.resolve())
    if not HUB_ID.fullmatch(base):
        raise UserError(f"model.base: no such directory: {base}")
    return base


def local_folder(base: str) -> Path | None:
    """Where a base's `config.json` is on this machine: its directory, or its snapshot in the hub's cache; None: nowhere."""
    folder = BUILTIN.get(base, Path(base))
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(base):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base, CHECKPOINT_MARK)
    return Path(cached).parent if isinstance(cached, str) else None
