"""The list of a folder's files with their sizes and SHA-256, by which anyone can see that nothing is missing or changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import replace_text

NAME = "manifest.json"


def write_manifest(folder: Path, **about: Any) -> None:
    """Write `manifest.json` over every other file of a folder.

    Args:
        about: what else it says, beside `files`.
    """
    found = _digests(folder)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in found.items()}
    (folder / NAME).write_text(json.dumps({**about, "files": files}, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path, may_change: Collection[str] = ()) -> dict[str, int]:
    """Compare a folder with its manifest; returns the size of every file in bytes, the manifest's too.

    Args:
        may_change: files whose content may be another.

    Raises:
        UserError: no manifest there.
        CheckFailed: a file is missing, changed, not in the manifest, or no plain file.
    """
    listed = _listed(folder)
    if odd := sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not _is_plain(path)):
        raise CheckFailed(f"{folder}: {', '.join(odd[:10])}: a link or a special file, and a manifest lists plain files only")
    there = _digests(folder)
    faults = [f"missing: {name}" for name in sorted(listed.keys() - there.keys())]
    faults += [f"not in the manifest: {name}" for name in sorted(there.keys() - listed.keys())]
    changed = (name for name in sorted(listed.keys() & there.keys()) if there[name] != listed[name]["sha256"])
    faults += [f"changed: {name}" for name in changed if name not in may_change]
    if faults:
        raise CheckFailed(f"{folder} is not what its {NAME} says: {'; '.join(faults[:10])}")
    return {name: (folder / name).stat().st_size for name in (*there, NAME)}


def list_again(folder: Path, name: str) -> bool:
    """Bring a file's entry in the manifest up to date; returns whether it was not."""
    manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
    entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    if manifest["files"][name] == entry:
        return False
    manifest["files"][name] = entry
    replace_text(folder / NAME, json.dumps(manifest, indent=2) + "\n")
    return True


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        listed = content["files"]
        if all(isinstance(entry["sha256"], str) for entry in listed.values()):
            return dict(listed)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a directory that mmtune finished: it has no readable {NAME}") from error
    raise UserError(f"{folder} is not a directory that mmtune finished: its {NAME} lists files without their SHA-256")


def _is_plain(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def names_in(folder: Path) -> set[str]:
    """Of the files in a folder and below it, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """Of every file of a folder but its manifest, by name; several at a time, since one thread reads slower than a disk."""
    names = sorted(names_in(folder) - {NAME})
    with ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip(names, threads.map(sha256, (folder / name for name in names)), strict=True))
