"""Row cache: results of a pass over all rows, stored beside the data under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtune.data.sources.source import data_files, default_media_root
from mmtune.data.templates.template import shipped_templates
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError
from mmtune.utils.files import replace_bytes, user_cache

READ = 256 * 2**20
"""Maximum number of bytes to read for the signatures of all files."""
DIGEST = 32

Arrays = dict[str, np.ndarray[Any, Any]]


def cache_key(inputs: Mapping[str, Any]) -> str:
    """The key of a cache file: 32 characters that depend on all inputs of the results."""
    return _digest(json.dumps(inputs, sort_keys=True, default=str).encode()).hex()[:32]


def file_signatures(sources: Sequence[Source]) -> dict[str, Any]:
    """The signature of every file of the sources, by name.

    With n files, at most `READ` / n bytes of each are read. The signature of a file of at most this size is the digest of its
    content; of a larger file, its size, modification time and the digest of its beginning and end.
    """
    files = {file for source in sources for file in _files(source.model_dump(mode="json"))}
    return {str(file): _signature(file, READ // len(files)) for file in files}


def _files(value: Any, key: str = "") -> Iterator[Path]:
    """Every file that is named in any key of a source."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _files(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _files(item, key)
    elif isinstance(value, str) and key != "media_root":
        if key == "template":
            value = str(shipped_templates().get(value, value))
        is_file = os.path.isfile(value)  # noqa: PTH113  (any text; Path raises for a long one)
        yield from [Path(value)] if is_file else data_files(value) if key == "path" else []


def _signature(path: Path, share: int) -> Any:
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= share:
            return hashlib.file_digest(file, "blake2b").hexdigest()
        ends = hashlib.blake2b(file.read(share // 2))
        file.seek(-(share // 2), os.SEEK_END)
        ends.update(file.read())
        return [status.st_size, status.st_mtime_ns, ends.hexdigest()]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


@dataclass(frozen=True)
class RowCache:
    """One cache file.

    Attributes:
        directory: of the data; None if the data is not on this machine.
        key: see `cache_key`.
        kind: what it holds, such as `plan`; the extension of the file.
    """

    directory: Path | None
    key: str
    kind: str

    @property
    def paths(self) -> list[Path]:
        """The possible paths of the file, the preferred one first."""
        folders = [self.directory / ".mmtune"] if self.directory else []
        with suppress(UserError):  # no home directory: only beside the data
            folders.append(user_cache(f"{self.kind}s"))
        return [folder / f"{self.key}.{self.kind}" for folder in folders]

    def read(self) -> tuple[Arrays, dict[str, Any]] | None:
        """The arrays and notes that were written; None if there is no file or it is damaged."""
        for path in self.paths:
            try:
                data = path.read_bytes()
            except OSError:
                continue
            if _digest(data[DIGEST:]) == data[:DIGEST]:
                with np.load(io.BytesIO(data[DIGEST:]), allow_pickle=False) as arrays:
                    loaded = {name: arrays[name] for name in arrays.files}
                return loaded, json.loads(loaded.pop("notes").tobytes())
        return None

    def write(self, arrays: Arrays, notes: Mapping[str, Any]) -> Path | None:
        """Write atomically beside the data, or else into the user's cache directory.

        Returns:
            The path of the file; None if neither can be written. A line is printed unless the preferred path is written.
        """
        file = io.BytesIO()
        named: dict[str, Any] = {**arrays, "notes": np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)}
        np.savez_compressed(file, **named)
        data = _digest(file.getvalue()) + file.getvalue()
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(path, data)
            except OSError as error:
                print(f"{self.kind}: cannot write the cache in {path.parent}: {error.strerror or error}")
                continue
            if path != self.paths[0]:
                print(f"{self.kind}: cached in {path.parent}")
            return path
        return None


def cache_directory(sources: Sequence[Source]) -> Path | None:
    """The directory of the first source, where the results of all sources are cached; None for rows on the hub."""
    path = sources[0].path
    if not data_files(path):
        return None
    return Path(path).absolute().parent if Path(path).exists() else default_media_root(path).absolute()
