"""Hash of the files that a model is loaded from: answers of a cache belong to the weights that gave them.

The SHA-256 of a large file is kept with its size, times and inode, so that it is read once and not at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmtune.models.checkpoints.checkpoint_files import weight_files
from mmtune.models.checkpoints.locate_base import local_folder
from mmtune.models.checkpoints.trained_weights import TrainedWeights, read_adapter_base
from mmtune.recipe.recipe import ModelSection
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object, replace_text, user_cache
from mmtune.utils.manifest import sha256

PATTERNS = ("*.safetensors", "*.bin", "*.json", "*.py")
"""Weights, configurations and code of a checkpoint or adapter."""
LARGE = 2**26
"""Files of at least this many bytes are not read again while they are unchanged."""
SETTLED_S = 2.0
"""A file changed more recently is not kept: a second change could leave the same time."""
MAX_ENTRIES = 1000

Stamp = list[int]


def hash_trained(trained: TrainedWeights) -> str | None:
    """The hash of the files of a model, or of an adapter and its base; None if they are not on this machine."""
    return hash_checkpoints([str(trained.path), *([read_adapter_base(trained.path)] if trained.is_adapter else [])])


def hash_base(section: ModelSection, location: str | None, seed: int) -> str | None:
    """The hash of the files of a recipe's base; None if they are not on this machine.

    Args:
        section: the recipe's `model` section.
        location: the directory or hub id of the base; None for a model that is assembled or built here.
        seed: the seed of untrained weights.
    """
    if location is not None:
        return hash_checkpoints([location])
    components = [name for name in (section.vision, section.language) if name is not None]
    if section.projector is not None and section.projector.weights is not None:
        components.append(str(weight_files(Path(section.projector.weights))[0].parent))
    return hash_checkpoints(components, built={**section.model_dump(mode="json"), "seed": seed})


def hash_checkpoints(names: Sequence[str], **settings: Any) -> str | None:
    """The hash of the files of checkpoints, each a directory or a hub id; None if one is not on this machine.

    Args:
        names: the checkpoints.
        settings: what else determines the weights.

    Raises:
        OSError: a file cannot be read.
    """
    folders = [local_folder(name) for name in names]
    if None in folders:
        return None
    known = _read_memo()
    files = [sorted({file for pattern in PATTERNS for file in folder.glob(pattern)}) for folder in folders if folder]
    paths = [path for several in files for path in several]
    with ThreadPoolExecutor(max_workers=8) as threads:
        digests = dict(zip(paths, threads.map(lambda path: _digest(path, known), paths), strict=True))
    _write_memo(known)
    content = [[[path.name, digests[path]] for path in several] for several in files]
    return hashlib.sha256(json.dumps([content, settings], sort_keys=True).encode()).hexdigest()


def _digest(path: Path, known: dict[str, tuple[Stamp, str]]) -> str:
    """The SHA-256 of a file; that of a large one is looked up in `known`, or added to it."""
    path = path.resolve()  # a snapshot of the hub's cache consists of links
    stamp = _stamp(path)
    if stamp[0] < LARGE:
        return sha256(path)
    entry = known.get(str(path))
    if entry is None or entry[0] != stamp:
        started = time.time_ns()
        digest = sha256(path)
        if max(stamp[1:3]) > started - SETTLED_S * 1e9 or _stamp(path) != stamp:
            return digest
        entry = known[str(path)] = (stamp, digest)
    return entry[1]


def _stamp(path: Path) -> Stamp:
    """Size, times of the last change of content and of metadata (ns), and inode. A program can set the first time only."""
    status = os.stat(path)  # noqa: PTH116
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _memo() -> Path:
    """The file that keeps the hashes of large files."""
    return user_cache("answers") / "weights.json"


def _read_memo() -> dict[str, tuple[Stamp, str]]:
    try:
        content: dict[str, Any] = read_json_object(_memo())
        return {path: (list(stamp), str(digest)) for path, (stamp, digest) in content.items()}
    except (OSError, UserError, ValueError, TypeError):  # missing, or damaged and written again
        return {}


def _write_memo(known: dict[str, tuple[Stamp, str]]) -> None:
    newest = dict(list(known.items())[-MAX_ENTRIES:])
    if newest == _read_memo():
        return
    with suppress(OSError, UserError):  # without a home directory files are read at every start
        _memo().parent.mkdir(parents=True, exist_ok=True)
        replace_text(_memo(), json.dumps(newest))
