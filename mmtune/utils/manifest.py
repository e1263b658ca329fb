"""Manifest of a folder: the size and SHA-256 of every file, to detect missing and changed files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import replace_text

MANIFEST = "manifest.json"


def write_manifest(folder: Path, known: Mapping[str, str] | None = None, **about: Any) -> None:
    """Write `manifest.json` over every other file of a folder.

    Args:
        known: from `digests`, of files that are not read again.
        about: other keys of the manifest, beside `files`.
    """
    names, known = file_names(folder) - {MANIFEST}, known or {}
    hashed = {**known, **digests(folder, names - known.keys())}
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": hashed[name]} for name in sorted(names)}
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path, may_change: Collection[str] = ()) -> dict[str, int]:
    """Compare a folder with its manifest, and return the size of every file in bytes, including the manifest.

    Args:
        may_change: files whose content may differ.

    Raises:
        UserError: the folder has no valid manifest.
        CheckFailed: a file is missing, changed, not in the manifest, or not a regular file.
    """
    listed = _listed(folder)
    if special := sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not _is_plain(path)):
        raise CheckFailed(f"{folder}: {', '.join(special[:10])}: expected regular files only, got a link or special file")
    actual = digests(folder, file_names(folder) - {MANIFEST})
    differences = [f"missing: {name}" for name in sorted(listed.keys() - actual.keys())]
    differences += [f"not in the manifest: {name}" for name in sorted(actual.keys() - listed.keys())]
    changed = (name for name in sorted(listed.keys() & actual.keys()) if actual[name] != listed[name]["sha256"])
    differences += [f"changed: {name}" for name in changed if name not in may_change]
    if differences:
        raise CheckFailed(f"{folder} does not match its {MANIFEST}: {'; '.join(differences[:10])}")
    return {name: (folder / name).stat().st_size for name in (*actual, MANIFEST)}


def refresh_entry(folder: Path, name: str) -> bool:
    """Update the manifest's entry of a file, and return whether the entry was outdated."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    if manifest["files"][name] == entry:
        return False
    manifest["files"][name] = entry
    replace_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return True


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = content["files"]
        if all(isinstance(entry["sha256"], str) for entry in listed.values()):
            return dict(listed)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: expected a complete output of mmtune, got a folder without a valid {MANIFEST}") from error
    raise UserError(f"{folder}: expected a complete output of mmtune, got a {MANIFEST} without the SHA-256 of every file")


def _is_plain(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def file_names(folder: Path) -> set[str]:
    """The paths of all files below a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, names: Collection[str]) -> dict[str, str]:
    """The SHA-256 of files of a folder by name. In threads: one thread is slower than the disk."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip(names, threads.map(sha256, (folder / name for name in names)), strict=True))
