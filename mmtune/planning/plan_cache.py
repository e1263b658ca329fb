"""Plan cache: token counts of a data set, stored beside the data under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProcessorMixin

from mmtune.data.encoding.token_counts import processor_settings
from mmtune.data.sources.source import data_files, default_media_root
from mmtune.data.templates.template import shipped_templates
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError
from mmtune.utils.files import replace_bytes, user_cache

FORMAT = 3
"""Version of the counting and of the file format. It is part of the key, so that older files are not read."""
READ = 256 * 2**20
"""Maximum number of bytes to read for the signatures of all files."""
DIGEST = 32

Arrays = dict[str, np.ndarray[Any, Any]]


def plan_key(sources: Sequence[Source], processor: ProcessorMixin, supervise: str) -> str:
    """The key of a plan: 32 characters that depend on everything the counts depend on.

    These are the sources of the recipe, the content of their files and templates, the settings of the processor with its
    tokenizer and chat template, and the versions of the libraries. Media files are not included: the plan has a stamp of each.
    Rows on the hub are identified by the recipe only.

    Args:
        sources: the recipe's.
        processor: of the model, with its chat template.
        supervise: the recipe's `data.supervise`.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inputs = {
        "format": FORMAT,
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers", "pillow", "mmtune")],
        "sources": [source.model_dump(mode="json", exclude={"weight"}) for source in sources],
        "files": file_signatures(sources),
        "processor": [processor_settings(processor), processor.to_json_string()],
        "tokenizer": [backend.to_str() if backend else tokenizer.get_vocab(), tokenizer.special_tokens_map],
        "bos_eos": [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")],
        "chat_template": processor.chat_template,
        "supervise": supervise,
    }
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
class PlanCache:
    """The cache file of one plan.

    Attributes:
        directory: of the data; None if the data is not on this machine.
        key: see `plan_key`.
    """

    directory: Path | None
    key: str

    @property
    def paths(self) -> list[Path]:
        """The possible paths of the file, the preferred one first."""
        folders = [self.directory / ".mmtune"] if self.directory else []
        with suppress(UserError):  # no home directory: only beside the data
            folders.append(user_cache("plans"))
        return [folder / f"{self.key}.plan" for folder in folders]

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
        """Write a plan atomically beside the data, or else into the user's cache directory.

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
                print(f"plan: cannot write the cache in {path.parent}: {error.strerror or error}")
                continue
            if path != self.paths[0]:
                print(f"plan: cached in {path.parent}")
            return path
        return None


def plan_directory(sources: Sequence[Source]) -> Path | None:
    """The directory of the first source, where the plan of all sources is cached; None for rows on the hub."""
    path = sources[0].path
    if not data_files(path):
        return None
    return Path(path).absolute().parent if Path(path).exists() else default_media_root(path).absolute()
