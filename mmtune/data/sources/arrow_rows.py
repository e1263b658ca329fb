"""Rows of parquet and arrow files. Row groups are decoded one at a time, with a cache of the last few.

Images in a column of `datasets` stay `{"bytes", "path"}`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmtune.data.message import RowError
from mmtune.data.sources.rows import LazyRow, Row, drop_tool_padding
from mmtune.utils.errors import UserError, reason_of

CACHE_BYTES = 256 * 2**20
"""Size of the cache of decoded groups. The last group is always cached, whatever its size."""

GROUP_BYTES = 2 * 2**30
"""Largest row group that is decoded to read one of its rows."""

STREAMED_ROWS = 64
"""Rows of a parquet file that a stream decodes at once."""

CHUNK_ROWS = 1024
"""Rows of a row group that are contiguous in memory."""

_MAGIC = b"ARROW1"


class GroupedRows:
    """Rows of a file that is decoded in groups: row groups of a parquet file, record batches of an arrow file.

    Args:
        name: the file name in row ids.
        counts: the number of rows of each group.
        read: decodes the group with a number.
    """

    def __init__(self, name: str, counts: list[int], read: Callable[[int], pa.Table | pa.RecordBatch]) -> None:
        self._name = name
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._read = read
        self._cache: OrderedDict[int, pa.Table | pa.RecordBatch] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `FILE[INDEX]` and the row."""
        index = range(len(self))[index]
        row_id = f"{self._name}[{index}]"
        number = int(np.searchsorted(self._ends, index, side="right"))
        try:
            group = self._group(number)
        except UserError as error:
            raise RowError(row_id, "row", str(error), "row_unusable") from error
        return row_id, _row(row_id, group, index - int(self._ends[number]) + group.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    def _group(self, number: int) -> pa.Table | pa.RecordBatch:
        if number in self._cache:
            self._cache.move_to_end(number)
        else:
            self._cache[number] = self._read(number)
            while len(self._cache) > 1 and sum(group.nbytes for group in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return self._cache[number]


def _row(row_id: str, group: pa.Table | pa.RecordBatch, index: int) -> Row:
    """A row as Python values. Columns are validated first: the offsets in a damaged file can point outside its memory.

    Raises:
        RowError: a column has text that is not UTF-8, a date out of range, an unknown time zone, or damaged data.
    """
    row: Row = {}
    for name, column in zip(group.schema.names, group.slice(index, 1).columns, strict=True):
        try:
            column.validate(full=True)
            row[name] = column[0].as_py()
        except (pa.ArrowException, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise RowError(row_id, name, f"cannot be read as {column.type}: {error}"[:400], "row_malformed") from error
    return drop_tool_padding(row)


def _check_column_names(path: Path, schema: pa.Schema) -> None:
    duplicates = sorted(name for name, count in Counter(schema.names).items() if count > 1)
    if duplicates:
        raise UserError(f"{path}: two columns are named '{duplicates[0]}'; rename one of them")


def open_parquet(path: Path, name: str) -> GroupedRows:
    """Open a parquet file for access by index.

    Raises:
        UserError: not a parquet file, or a row group is too large to be decoded for one row.
    """
    file = _parquet(path)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    for number, group in enumerate(groups):
        if group.total_byte_size > GROUP_BYTES:
            raise UserError(
                f"{path}: row group {number} has {group.total_byte_size / 2**30:.1f} GiB, more than {GROUP_BYTES // 2**30} GiB, "
                "and would be decoded as a whole to read one row; write the file with smaller groups (row_group_size=1000), or "
                "stream it (data.stream: true)"
            )
    return GroupedRows(name, [group.num_rows for group in groups], partial(_row_group, path))


def _row_group(path: Path, number: int) -> pa.Table:
    with _parquet(path) as file:
        rows = _rows_at_once(file, CHUNK_ROWS)
        batches = _bounded_batches(file, path, number, rows)
        chunks: list[pa.RecordBatch] = []
        while few := list(islice(batches, CHUNK_ROWS // rows)):  # pyarrow searches the chunks one by one for a row
            chunks += _readable(path, pa.Table.from_batches(few, file.schema_arrow).combine_chunks).to_batches()
        return pa.Table.from_batches(chunks, file.schema_arrow)


def _bounded_batches(file: pq.ParquetFile, path: Path, number: int, rows: int) -> Iterator[pa.RecordBatch]:
    """The record batches of a row group, of `rows` rows each.

    Raises:
        UserError: the group is larger than `GROUP_BYTES`.
    """
    # pyarrow's threads do not survive a fork, and data-loader workers are forked.
    batches = file.iter_batches(rows, row_groups=[number], use_threads=False)
    size = 0
    while (batch := _readable(path, lambda: next(batches, None))) is not None:
        size += batch.nbytes
        if size > GROUP_BYTES:
            raise UserError(
                f"{path}: row group {number} has more than {GROUP_BYTES // 2**30} GiB when decoded; write smaller groups"
            )
        yield batch


def stream_parquet(path: Path, name: str) -> Iterator[LazyRow]:
    """Stream the same rows in order, a few decoded at a time."""
    count = 0
    with _parquet(path) as file:
        batches = file.iter_batches(_rows_at_once(file, STREAMED_ROWS), use_threads=False)
        while (batch := _readable(path, lambda: next(batches, None))) is not None:
            yield from _items(name, count, batch)
            count += batch.num_rows


def _items(name: str, first: int, group: pa.RecordBatch) -> Iterator[LazyRow]:
    return (partial(_row_with_id, f"{name}[{first + index}]", group, index) for index in range(group.num_rows))


def _row_with_id(row_id: str, group: pa.RecordBatch, index: int) -> tuple[str, Row]:
    return row_id, _row(row_id, group, index)


def _parquet(path: Path) -> pq.ParquetFile:
    file = _readable(path, lambda: pq.ParquetFile(path, memory_map=True, pre_buffer=False))
    _check_column_names(path, file.schema_arrow)
    return file


def _rows_at_once(file: pq.ParquetFile, most: int) -> int:
    """Rows to decode at once so that they fit the cache even if each of them had the largest value of its column."""
    largest = 1
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(column).total_uncompressed_size for column in range(group.num_columns)]
        largest = max(largest, sum(columns))
    return max(1, min(most, CACHE_BYTES // largest))


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}") from error


def open_arrow(path: Path, name: str) -> GroupedRows:
    """Open an arrow or feather file for access by index.

    Raises:
        UserError: not an arrow file.
    """
    with pa.memory_map(str(path)) as file:
        if _is_file_format(file):
            reader = _readable(path, lambda: pa.ipc.open_file(file))
            _check_column_names(path, reader.schema)
            counts = [_readable(path, partial(reader.get_batch, number)).num_rows for number in range(reader.num_record_batches)]
            return GroupedRows(name, counts, partial(_file_batch, path))
        offsets, counts = [], []
        for offset, batch in _stream_batches(file, path):
            offsets.append(offset)
            counts.append(batch.num_rows)
        return GroupedRows(name, counts, partial(_stream_batch, path, offsets))


def stream_arrow(path: Path, name: str) -> Iterator[LazyRow]:
    """Stream the same rows in order, one record batch at a time."""
    count = 0
    with pa.memory_map(str(path)) as file:
        if _is_file_format(file):
            reader = _readable(path, lambda: pa.ipc.open_file(file))
            _check_column_names(path, reader.schema)
            batches = (_readable(path, partial(reader.get_batch, number)) for number in range(reader.num_record_batches))
        else:
            batches = (batch for _, batch in _stream_batches(file, path))
        for batch in batches:
            yield from _items(name, count, batch)
            count += batch.num_rows


def _is_file_format(file: pa.MemoryMappedFile) -> bool:
    """Whether a file has Arrow's file format, as feather files do; `datasets` writes the stream format as `.arrow` too."""
    magic = file.read(len(_MAGIC))
    file.seek(0)
    return bool(magic == _MAGIC)


def _stream_batches(file: pa.MemoryMappedFile, path: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    reader = _readable(path, lambda: pa.ipc.open_stream(file))
    _check_column_names(path, reader.schema)
    if any(pa.types.is_dictionary(field.type) for field in reader.schema):
        raise UserError(f"{path}: dictionary columns in Arrow's stream format cannot be read by index; save the file as parquet")
    while True:
        offset = file.tell()
        try:
            batch = _readable(path, reader.read_next_batch)
        except StopIteration:
            return
        yield offset, batch


def _file_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        return _readable(path, lambda: pa.ipc.open_file(file).get_batch(number))


def _stream_batch(path: Path, offsets: list[int], number: int) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        schema = pa.ipc.open_stream(file).schema
        file.seek(offsets[number])
        return _readable(path, lambda: pa.ipc.read_record_batch(pa.ipc.read_message(file), schema))
