"""Rows of data sets of the `datasets` library, saved on disk or on the Hugging Face hub. Loading scripts are never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.data.sources.rows import LazyRow, Row, drop_tool_padding
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.files import path_hint
from mmtune.utils.hub import unreachable_reason

if TYPE_CHECKING:
    import datasets

_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<config>[\w.+-]+))?(?::(?P<split>[\w.+-]+))?")


class DatasetRows:
    """The rows of a data set on disk as plain arrow values: media stay `{"bytes", "path"}`, class labels stay integers."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset = dataset.with_format("arrow")
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `NAME[INDEX]` and the row."""
        index = range(len(self))[index]
        return f"{self._name}[{index}]", drop_tool_padding(self._dataset[index].to_pylist()[0])


def is_saved_dataset(path: Path) -> bool:
    """Whether this directory is a data set (or several splits) saved by `datasets`."""
    return path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def hub_repository(path: str) -> str | None:
    """The repository id of `org/name`, `org/name:split`, `org/name@config` or `org/name@config:split`; None for other text."""
    match = _HUB.fullmatch(path)
    return match["id"] if match else None


def open_saved(path: Path, name: str) -> DatasetRows:
    """Open a data set saved by `datasets`.

    Raises:
        UserError: the directory has several splits, or cannot be read.
    """
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if is_saved_dataset(folder))
        raise UserError(
            f"{path}: has several splits ({', '.join(splits)}); "
            f"give the path of one of them, such as {path / splits[0] if splits else path}"
        )
    try:
        return DatasetRows(datasets.load_from_disk(str(path)), name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: `datasets` cannot read it: {reason_of(error)}") from error


def open_hub(path: str, name: str) -> DatasetRows:
    """Download a data set from the hub (or load it from the local cache) and open it.

    Raises:
        UserError: the data set, configuration or split does not exist, the data set needs a loading script, or there is no
            connection.
    """
    return DatasetRows(_load(path, streaming=False), name)


def stream_hub(path: str, name: str) -> Iterator[LazyRow]:
    """Stream the same rows in order, downloading on demand."""
    for index, row in enumerate(_load(path, streaming=True).decode(False)):
        yield partial(_with_id, f"{name}[{index}]", row)


def _with_id(row_id: str, row: Row) -> tuple[str, Row]:
    return row_id, drop_tool_padding(dict(row))


def _load_cached(repository: str, config: str | None, split: str, streaming: bool, reason: str) -> Any:
    """Load a data set that an earlier `load_dataset` stored in the local cache.

    Raises:
        UserError: the cache does not contain this data set, configuration or split.
    """
    from datasets.packaged_modules.cache.cache import Cache

    name = repository.partition("/")[2]
    try:
        builder = Cache(dataset_name=name, repo_id=repository, config_name=config, version="auto", hash="auto")
        dataset = builder.as_dataset(split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{repository}: no such file or folder; {reason}; and it is not in the local cache ({str(error).splitlines()[0]}); "
            f"give the path of a downloaded file, or set HF_ENDPOINT to another hub{path_hint(Path(repository), only_close=True)}"
        ) from error
    print(f"{repository}: read from the local cache: {reason}")
    return dataset.to_iterable_dataset() if streaming else dataset


def _load(path: str, streaming: bool) -> Any:
    import datasets
    from huggingface_hub import is_offline_mode

    match = _HUB.fullmatch(path)
    assert match is not None
    split = match["split"] or "train"
    reason = None if is_offline_mode() else unreachable_reason(match["id"], "README.md", "dataset")
    try:
        if reason is not None:
            return _load_cached(match["id"], match["config"], split, streaming, reason)
        return datasets.load_dataset(match["id"], match["config"], split=split, streaming=streaming)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{path}: the data set needs a loading script, and mmtune does not run remote code; convert it to parquet"
        ) from error
    except (datasets.exceptions.DatasetsError, ConnectionError, OSError, ValueError) as error:
        hint = "; the hub cannot be reached" if isinstance(error, ConnectionError) else ""
        raise UserError(f"{path}: no such file, and the hub data set cannot be loaded: {error}{hint}") from error
