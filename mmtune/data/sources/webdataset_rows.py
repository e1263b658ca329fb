"""Rows of WebDataset shards: tar files in which the members of one row are adjacent and share a name up to its first dot.

Indexing a shard reads only headers. Images and other media become `EmbeddedMedia`, slices of the shard; nothing is extracted.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mmtune.data.media.media import EmbeddedMedia
from mmtune.data.message import RowError
from mmtune.data.sources.rows import MAX_ROW_BYTES, LazyRow, Row, parse_json, utf8_error_message
from mmtune.utils.errors import UserError, reason_of

TEXT_EXTENSIONS = ("txt", "text", "cls", "caption")
"""Members with these extensions (last part) are read as text."""

MAX_HEADERS = 8
"""Maximum number of extension headers of one member: long names and attributes in the pax and GNU formats."""
MAX_HEADER_BYTES = 2**20
MAX_PADDING = 64 * 2**20
"""Maximum padding (zeros) after the last member."""
_EXTENSION_HEADERS = b"xgXLK"
"""Types of headers that describe the next member."""
_SPARSE = b"S"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)

_Members = list[tuple[str, str, int, int]]
"""The members of one row: extension, full name, offset and size in bytes."""


class TarRows:
    """The rows of one shard. The index has the offset of each row's first header."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._offsets = array("q")
        keys: set[str] = set()
        with _open_shard(path) as file:
            for key, offset, _ in _iterate_samples(file, path, 0):
                _check_adjacent(path, key, keys)
                self._offsets.append(offset)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `SHARD:KEY` and the row: `__key__`, and one field for each extension."""
        with _open_shard(self._path) as file:
            key, _, members = next(_iterate_samples(file, self._path, self._offsets[index]))
        return _row(self._path, self._name, key, members)


def stream_tar(path: Path, name: str) -> Iterator[LazyRow]:
    """Stream the same rows in order, read on demand."""
    keys: set[str] = set()
    with _open_shard(path) as file:
        for key, _, members in _iterate_samples(file, path, 0):
            _check_adjacent(path, key, keys)
            yield partial(_row, path, name, key, members)


def _check_adjacent(path: Path, key: str, keys: set[str]) -> None:
    if key in keys:
        raise UserError(f"{path}: the members of '{key}' are not adjacent; sort the archive by name (tar --sort=name)")
    keys.add(key)


def _open_shard(path: Path) -> BinaryIO:
    file = path.open("rb")
    head = file.read(6)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            file.close()
            raise UserError(f"{path}: a tar file compressed with {name} cannot be read by offset; decompress it to a plain .tar")
    file.seek(0)
    return file


def _iterate_samples(file: BinaryIO, path: Path, start: int) -> Iterator[tuple[str, int, _Members]]:
    """For each row its key, the offset of its first header, and its members.

    Raises:
        UserError: the archive is damaged, or has members that are not allowed: links, devices, paths outside the archive.
    """
    key, first, members = "", start, _Members()
    for member in _file_members(file, path, start):
        # Bytes that are not UTF-8 are shown as escapes.
        name = member.name.removeprefix("./").encode("utf-8", "backslashreplace").decode()
        if PurePosixPath(name).name.startswith(".") or name.startswith("__MACOSX/"):
            continue  # files that file managers add
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise UserError(f"{path}: the member '{name}' has no extension, so its field is unknown; rename it to KEY.EXTENSION")
        if members and parts[1] != key:
            yield key, first, members
            members = []
        if not members:
            key, first = parts[1], member.offset
        extension = parts[2].lower()
        if any(extension == other for other, *_ in members):
            raise UserError(f"{path}: expected one member '{key}.{extension}', got two")
        members.append((extension, name, member.offset_data, member.size))
    if members:
        yield key, first, members


def _file_members(file: BinaryIO, path: Path, start: int) -> Iterator[tarfile.TarInfo]:
    size = file.seek(0, 2)
    _check_headers(file, path, start)  # TarFile reads the first header in its constructor
    try:
        with tarfile.TarFile(fileobj=file) as archive:
            while True:
                _check_headers(file, path, archive.offset)
                if (member := archive.next()) is None:
                    break
                archive.members.clear()  # type: ignore[attr-defined]  # or it would keep every header in memory
                _check_member(path, member)
                if member.size < 0 or member.offset_data + member.size > size:
                    raise UserError(f"{path}: the archive is truncated: the member '{member.name}' is incomplete")
                if member.isfile():
                    yield member
            end = archive.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a tar file: {reason_of(error)}") from error
    file.seek(end)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            raise UserError(
                f"{path}: unexpected data after the last member, at byte {end}: the file is damaged, or has two archives"
            )
        if file.tell() - end > MAX_PADDING:
            raise UserError(
                f"{path}: expected at most {MAX_PADDING // 2**20} MiB of zeros after the last member, at byte {end}, got more"
            )


def _check_headers(file: BinaryIO, path: Path, start: int) -> None:
    """Check the headers of the next member before tarfile reads them.

    tarfile reads nested headers recursively whatever their size, and matches attributes with patterns of quadratic time.

    Raises:
        UserError: too many or too large headers, malformed attributes, or a sparse file.
    """
    position = start
    for _ in range(MAX_HEADERS + 1):
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        header_type = header[156:157]
        if header_type == _SPARSE:
            name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
            raise UserError(f"{path}: the member '{name}' is a sparse file, which is not allowed; write it as a regular file")
        if not header_type or header_type not in _EXTENSION_HEADERS:
            file.seek(start)
            return
        size = _parse_number(header[124:136])
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            problem = f"expected a size of at most {MAX_HEADER_BYTES} bytes, got {'text' if size is None else size}"
            raise UserError(f"{path}: the header at byte {position} is damaged: {problem}")
        if header_type in b"xgX":
            _check_attributes(path, position, file.read(size))
        position += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    raise UserError(f"{path}: expected at most {MAX_HEADERS} headers of one member at byte {start}, got more")


def _parse_number(field: bytes) -> int | None:
    """Parse a number of a header: octal digits, or GNU's base 256 after a byte 0x80 (0xFF for a negative number)."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:]) - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0")[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _check_attributes(path: Path, position: int, text: bytes) -> None:
    """Check pax attributes: `LENGTH KEY=VALUE` and a line break, where LENGTH is the length of the whole record.

    Raises:
        UserError: the format is different, or the attributes are of a sparse file.
    """
    start = 0
    while start < len(text) and text[start]:
        digits, space, _ = text[start : start + 20].partition(b" ")
        end = start + int(digits) if space and digits.isdigit() else start
        record = text[start + len(digits) + 1 : end]
        if not start < end <= len(text) or b"=" not in record or not record.endswith(b"\n"):
            raise UserError(f"{path}: the header at byte {position} is damaged: expected an attribute at its byte {start}")
        if record.startswith(b"GNU.sparse."):
            raise UserError(
                f"{path}: the member after byte {position} is a sparse file, which is not allowed; write it as a regular file"
            )
        start = end


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not (member.isfile() or member.isdir()) or member.issparse():
        member_type = (
            "a link" if member.issym() or member.islnk() else "a sparse file" if member.issparse() else "a device or pipe"
        )
        raise UserError(f"{path}: expected a regular file as member '{member.name}', got {member_type}; remove it")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        raise UserError(f"{path}: the path of the member '{member.name}' is outside the archive; rename it")


def _row(path: Path, name: str, key: str, members: _Members) -> tuple[str, Row]:
    row_id = f"{name}:{key}"
    row: Row = {"__key__": key}
    with path.open("rb") as file:
        for extension, member, offset, size in members:
            suffix = extension.rpartition(".")[2]
            if suffix != "json" and suffix not in TEXT_EXTENSIONS:
                row[extension] = EmbeddedMedia(path, member, offset, size)
                continue
            if size > MAX_ROW_BYTES:
                detail = f"expected a text of at most {MAX_ROW_BYTES // 2**20} MiB, got {size} bytes"
                raise RowError(row_id, extension, detail, "row_malformed")
            file.seek(offset)
            data = file.read(size)
            if suffix == "json":
                row[extension] = parse_json(row_id, extension, data)
                continue
            try:
                row[extension] = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise RowError(row_id, extension, utf8_error_message(error), "row_malformed") from error
    return row_id, row
