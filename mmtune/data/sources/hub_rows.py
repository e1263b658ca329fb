"""Rows of data sets that the `datasets` library saved, or loads from the Hugging Face hub. No data set's own code is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.data.sources.rows import LazyRow, Row
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.files import path_hint
from mmtune.utils.hub import unreachable_reason

if TYPE_CHECKING:
    import datasets

_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<config>[\w.+-]+))?(?::(?P<split>[\w.+-]+))?")


class DatasetRows:
    """The rows of a data set on disk, in arrow's own types: media stay `{"bytes", "path"}`, classes stay numbers."""

    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset = dataset.with_format("arrow")
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `NAME[INDEX]` and the row."""
        index = range(len(self))[index]
        return f"{self._name}[{index}]", self._dataset[index].to_pylist()[0]


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` saved a data set, or several splits of one, in this directory."""
    return path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def hub_repository(path: str) -> str | None:
    """`org/name` of `org/name`, `org/name:split`, `org/name@config` or `org/name@config:split`; None of any other text."""
    written = _HUB.fullmatch(path)
    return written["id"] if written else None


def open_saved(path: Path, name: str) -> DatasetRows:
    """
    Raises:
        UserError: several splits, or a directory that cannot be read.
    """
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if is_saved_dataset(folder))
        raise UserError(
            f"{path}: holds the splits {', '.join(splits)}; name one of them, such as {path / splits[0] if splits else path}"
        )
    try:
        return DatasetRows(datasets.load_from_disk(str(path)), name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read by datasets: {reason_of(error)}") from error


def open_hub(path: str, name: str) -> DatasetRows:
    """
    Raises:
        UserError: a data set, configuration or split that does not exist, one that needs code of its own, or no connection.
    """
    return DatasetRows(_load(path, streaming=False), name)


def stream_hub(path: str, name: str) -> Iterator[LazyRow]:
    """The same rows in order, downloaded as they are asked for."""
    for index, row in enumerate(_load(path, streaming=True).decode(False)):
        yield partial(_named, f"{name}[{index}]", row)


def _named(row_id: str, row: Row) -> tuple[str, Row]:
    return row_id, dict(row)


def _cached(repository: str, config: str | None, split: str, streaming: bool, reason: str) -> Any:
    """What an earlier `load_dataset` has prepared on this machine.

    Raises:
        UserError: nothing, or not this configuration or split.
    """
    from datasets.packaged_modules.cache.cache import Cache

    name = repository.partition("/")[2]
    try:
        builder = Cache(dataset_name=name, repo_id=repository, config_name=config, version="auto", hash="auto")
        dataset = builder.as_dataset(split=split)
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no file or folder {repository}; {reason}; and the cache does not hold it ({str(error).splitlines()[0]}); "
            f"give the path of a downloaded file, or HF_ENDPOINT for another hub{path_hint(Path(repository), only_close=True)}"
        ) from error
    print(f"{repository}: read from the local cache: {reason}")
    return dataset.to_iterable_dataset() if streaming else dataset


def _load(path: str, streaming: bool) -> Any:
    import datasets
    from huggingface_hub import is_offline_mode

    found = _HUB.fullmatch(path)
    assert found is not None
    split = found["split"] or "train"
    reason = None if is_offline_mode() else unreachable_reason(found["id"], "README.md", "dataset")
    try:
        if reason is not None:
            return _cached(found["id"], found["config"], split, streaming, reason)
        return datasets.load_dataset(found["id"], found["config"], split=split, streaming=streaming)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(f"{path}: the data set is a program, and mmtune runs no remote code; convert it to parquet") from error
    except (datasets.exceptions.DatasetsError, ConnectionError, OSError, ValueError) as error:
        there = "" if not isinstance(error, ConnectionError) else "; the hub cannot be reached"
        raise UserError(f"{path}: no such file, and no data set that can be loaded from the hub: {error}{there}") from error
