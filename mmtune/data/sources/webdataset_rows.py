"""Rows of webdataset shards: tar files in which the members of one row stand side by side and share a name up to its first dot.

Only headers are read to index a shard. A medium becomes an `EmbeddedMedia`, a slice of the shard, and nothing is ever unpacked.
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

TEXT = ("txt", "text", "cls", "caption")
"""Members that are read as text, by the last part of their extension."""

MAX_HEADERS = 8
"""Most headers before a member that belong to it: long names, and attributes in the formats of pax and GNU."""
MAX_HEADER_BYTES = 2**20
MAX_PADDING = 64 * 2**20
"""Most zeros behind the last member that are read to see whether something follows them."""
_OF_NEXT = b"xgXLK"
"""Types of headers that belong to the member after them."""
_SPARSE = b"S"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)

_Members = list[tuple[str, str, int, int]]
"""Of one row: each member's extension, its whole name, and where its bytes begin and how many they are."""


class TarRows:
    """The rows of one shard. What is kept of each is where its first header stands."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._offsets = array("q")
        keys: set[str] = set()
        with _opened(path) as file:
            for key, offset, _ in _groups(file, path, 0):
                _check_new(path, key, keys)
                self._offsets.append(offset)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        """The id `SHARD:KEY` and the row: `__key__`, and a value for every extension."""
        with _opened(self._path) as file:
            key, _, members = next(_groups(file, self._path, self._offsets[index]))
        return _row(self._path, self._name, key, members)


def stream_tar(path: Path, name: str) -> Iterator[LazyRow]:
    """The same rows in order, read as they are asked for."""
    keys: set[str] = set()
    with _opened(path) as file:
        for key, _, members in _groups(file, path, 0):
            _check_new(path, key, keys)
            yield partial(_row, path, name, key, members)


def _check_new(path: Path, key: str, keys: set[str]) -> None:
    if key in keys:
        raise UserError(f"{path}: the members of '{key}' do not stand side by side; sort them by name (tar --sort=name)")
    keys.add(key)


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    head = file.read(6)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            file.close()
            raise UserError(f"{path}: compressed by {name}, so that no member can be read by itself; unpack it to a plain .tar")
    file.seek(0)
    return file


def _groups(file: BinaryIO, path: Path, start: int) -> Iterator[tuple[str, int, _Members]]:
    """Each row's key, where its first header stands, and its members.

    Raises:
        UserError: an archive that is damaged, or holds what no data set needs: links, devices, names that lead out of a folder.
    """
    key, first, members = "", start, _Members()
    for member in _files(file, path, start):
        name = (
            member.name.removeprefix("./").encode("utf-8", "backslashreplace").decode()
        )  # bytes that are not UTF-8 stay readable
        if PurePosixPath(name).name.startswith(".") or name.startswith("__MACOSX/"):
            continue  # what file managers leave behind
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise UserError(f"{path}: the member '{name}' has no extension, so it belongs to no row")
        if members and parts[1] != key:
            yield key, first, members
            members = []
        if not members:
            key, first = parts[1], member.offset
        extension = parts[2].lower()
        if any(extension == other for other, *_ in members):
            raise UserError(f"{path}: two members '{key}.{extension}'")
        members.append((extension, name, member.offset_data, member.size))
    if members:
        yield key, first, members


def _files(file: BinaryIO, path: Path, start: int) -> Iterator[tarfile.TarInfo]:
    size = file.seek(0, 2)
    _check_headers(file, path, start)  # TarFile reads the first header at once
    try:
        with tarfile.TarFile(fileobj=file) as archive:
            while True:
                _check_headers(file, path, archive.offset)
                if (member := archive.next()) is None:
                    break
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                _check_member(path, member)
                if member.size < 0 or member.offset_data + member.size > size:
                    raise UserError(f"{path}: cut short in '{member.name}'")
                if member.isfile():
                    yield member
            end = archive.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a tar file that can be read: {reason_of(error)}") from error
    file.seek(end)
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            raise UserError(f"{path}: damaged behind byte {end}, or two archives in one file")
        if file.tell() - end > MAX_PADDING:
            raise UserError(f"{path}: more than {MAX_PADDING // 2**20} MiB of zeros behind its last member, at byte {end}")


def _check_headers(file: BinaryIO, path: Path, start: int) -> None:
    """The headers of the next member, looked at before tarfile reads them: it reads one inside the other, whatever their sizes,
    and searches attributes with patterns that take the square of their length.

    Raises:
        UserError: too many or too large ones, attributes that are none, or a sparse file.
    """
    place = start
    for _ in range(MAX_HEADERS + 1):
        file.seek(place)
        header = file.read(tarfile.BLOCKSIZE)
        kind = header[156:157]
        if kind == _SPARSE:
            name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
            raise UserError(f"{path}: the member '{name}' is a sparse file, which no data set needs; it is refused")
        if not kind or kind not in _OF_NEXT:
            file.seek(start)
            return
        size = _number(header[124:136])
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            problem = f"its size is {'no number' if size is None else size}, and at most {MAX_HEADER_BYTES} bytes are read"
            raise UserError(f"{path}: the header at byte {place} is damaged: {problem}")
        if kind in b"xgX":
            _check_attributes(path, place, file.read(size))
        place += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    raise UserError(f"{path}: more than {MAX_HEADERS} headers for one member, at byte {start}")


def _number(field: bytes) -> int | None:
    """A header's number: octal digits, or GNU's base 256 after a byte of 128 or, for a negative one, 255."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:]) - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.split(b"\0")[0].strip() or b"0"
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


def _check_attributes(path: Path, place: int, text: bytes) -> None:
    """Attributes as pax has them, `LENGTH KEY=VALUE` and a line break, where the length counts the whole.

    Raises:
        UserError: anything else, or the attributes of a sparse file.
    """
    start = 0
    while start < len(text) and text[start]:
        digits, space, _ = text[start : start + 20].partition(b" ")
        end = start + int(digits) if space and digits.isdigit() else start
        record = text[start + len(digits) + 1 : end]
        if not start < end <= len(text) or b"=" not in record or not record.endswith(b"\n"):
            raise UserError(f"{path}: the header at byte {place} is damaged: no attribute begins at its byte {start}")
        if record.startswith(b"GNU.sparse."):
            raise UserError(f"{path}: the member behind byte {place} is a sparse file, which no data set needs; it is refused")
        start = end


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if not (member.isfile() or member.isdir()) or member.issparse():
        kind = "a link" if member.issym() or member.islnk() else "a sparse file" if member.issparse() else "a device or pipe"
        raise UserError(f"{path}: the member '{member.name}' is {kind}, which no data set needs; it is refused")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        raise UserError(f"{path}: the member '{member.name}' leads out of the archive; it is refused")


def _row(path: Path, name: str, key: str, members: _Members) -> tuple[str, Row]:
    row_id = f"{name}:{key}"
    row: Row = {"__key__": key}
    with path.open("rb") as file:
        for extension, member, offset, size in members:
            kind = extension.rpartition(".")[2]
            if kind != "json" and kind not in TEXT:
                row[extension] = EmbeddedMedia(path, member, offset, size)
                continue
            if size > MAX_ROW_BYTES:
                detail = f"a text of {size} bytes, more than {MAX_ROW_BYTES // 2**20} MiB"
                raise RowError(row_id, extension, detail, "row_malformed")
            file.seek(offset)
            data = file.read(size)
            if kind == "json":
                row[extension] = parse_json(row_id, extension, data)
                continue
            try:
                row[extension] = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise RowError(row_id, extension, utf8_error_message(error), "row_malformed") from error
    return row_id, row
