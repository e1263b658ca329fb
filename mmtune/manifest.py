"""The list of a folder's files with their sizes and SHA-256, by which anyone can see that nothing is missing or changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmtune.errors import CheckFailed, UserError

NAME = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `manifest.json` over every other file of a folder."""
    files = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in _files(folder)}
    (folder / NAME).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> dict[str, int]:
    """Compare a folder with its manifest; returns the size of every file in bytes, the manifest's too.

    Raises:
        UserError: no manifest there.
        CheckFailed: a file is missing, changed, or not in the manifest.
    """
    try:
        listed = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder} is nothing that mmtune finished: it has no readable {NAME}") from error
    there = {str(path.relative_to(folder)): path for path in _files(folder)}
    faults = [f"missing: {name}" for name in sorted(listed.keys() - there.keys())]
    faults += [f"not in the manifest: {name}" for name in sorted(there.keys() - listed.keys())]
    faults += [
        f"changed: {name}" for name in sorted(listed.keys() & there.keys()) if sha256(there[name]) != listed[name]["sha256"]
    ]
    if faults:
        raise CheckFailed(f"{folder} is not what its {NAME} says: {'; '.join(faults[:10])}")
    return {name: path.stat().st_size for name, path in there.items()} | {NAME: (folder / NAME).stat().st_size}


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
