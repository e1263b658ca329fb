"""Where plans are kept: beside the data, under a name that says what they were made from."""

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

FORMAT = 2
"""Changes when counting or the file does, so that what an earlier version kept is not taken for this one's."""
READ = 256 * 2**20
"""Bytes that are read at most to know all files of some sources."""
DIGEST = 32

Arrays = dict[str, np.ndarray[Any, Any]]


def plan_key(sources: Sequence[Source], processor: ProcessorMixin, supervise: str) -> str:
    """What a plan is made from, as a string of 32 characters.

    It covers what the recipe says of the sources, the content of their files and templates, the settings of the processor with
    its tokenizer and chat template, and the versions of the libraries that count. Media have their own stamps, row by row; rows
    on the hub are known by the recipe's words alone.

    Args:
        sources: the recipe's.
        processor: the model's, its chat template settled.
        supervise: the recipe's `data.supervise`.
    """
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made_from = {
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
    return _digest(json.dumps(made_from, sort_keys=True, default=str).encode()).hex()[:32]


def file_signatures(sources: Sequence[Source]) -> dict[str, Any]:
    """By name, what every file that sources name is known by.

    Of n files each has an n-th of `READ`. A file of no more bytes is known by its content; a larger one by size, time of change,
    and as many bytes of its two ends together.
    """
    files = {file for source in sources for file in _files(source.model_dump(mode="json"))}
    return {str(file): _signature(file, READ // len(files)) for file in files}


def _files(given: Any, key: str = "") -> Iterator[Path]:
    """Every file that a source names, wherever in its keys."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            yield from _files(value, str(name))
    elif isinstance(given, list):
        for value in given:
            yield from _files(value, key)
    elif isinstance(given, str) and key != "media_root":
        if key == "template":
            given = str(shipped_templates().get(given, given))
        is_file = os.path.isfile(given)  # noqa: PTH113  (any text may stand here, and Path raises on a long one)
        yield from [Path(given)] if is_file else data_files(given) if key == "path" else []


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
    """The file of one plan.

    Attributes:
        directory: the directory of the data; None where it is not on this machine's disk.
        key: from `plan_key`.
    """

    directory: Path | None
    key: str

    @property
    def places(self) -> list[Path]:
        """Where the file may be, the best place first."""
        folders = [self.directory / ".mmtune"] if self.directory else []
        with suppress(UserError):  # no home directory: plans are kept beside the data alone
            folders.append(user_cache("plans"))
        return [folder / f"{self.key}.plan" for folder in folders]

    def read(self) -> tuple[Arrays, dict[str, Any]] | None:
        """What `write` was given; None where there is no file, or a damaged one."""
        for place in self.places:
            try:
                data = place.read_bytes()
            except OSError:
                continue
            if _digest(data[DIGEST:]) == data[:DIGEST]:
                with np.load(io.BytesIO(data[DIGEST:]), allow_pickle=False) as arrays:
                    kept = {name: arrays[name] for name in arrays.files}
                return kept, json.loads(kept.pop("notes").tobytes())
        return None

    def write(self, arrays: Arrays, notes: Mapping[str, Any]) -> Path | None:
        """Keep a plan beside the data, or else in the user's cache directory, whole or not at all.

        Returns:
            The file; None when neither place can be written, which is said on the terminal like everything but the best place.
        """
        file = io.BytesIO()
        named: dict[str, Any] = {**arrays, "notes": np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8)}
        np.savez_compressed(file, **named)
        data = _digest(file.getvalue()) + file.getvalue()
        for place in self.places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(place, data)
            except OSError as error:
                print(f"plan: cannot be kept in {place.parent}: {error.strerror or error}")
                continue
            if place != self.places[0]:
                print(f"plan: kept in {place.parent}")
            return place
        return None


def plan_directory(sources: Sequence[Source]) -> Path | None:
    """The directory that holds the first source, where a plan of all of them is kept; None for rows on the hub."""
    path = sources[0].path
    if not data_files(path):
        return None
    return Path(path).absolute().parent if Path(path).exists() else default_media_root(path).absolute()
