"""Damaged and malicious data files: each is an error of its file or of one row, and is read to its end."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import image_size, open_image
from mmtune.data.message import RowError
from mmtune.data.sources import arrow_rows, csv_rows, json_rows, webdataset_rows
from mmtune.data.sources import rows as rows_module
from mmtune.data.sources.source import open_rows, stream_rows
from mmtune.data.validation.validate import Validator
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError, nearest

pytestmark = pytest.mark.timeout(60)


def header(size: int, kind: bytes = b"0", name: bytes = b"a.json") -> bytes:
    """A tar header that says what one likes."""
    large = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    digits = b"%011o\0" % size if 0 <= size < 8**11 else large
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + digits + b"%011o\0" % 0 + b" " * 8 + kind
    fields = fields.ljust(257, b"\0") + b"ustar\x0000"
    return (fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]).ljust(512, b"\0")


def block(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


def attribute(key: bytes, value: bytes) -> bytes:
    record = b" " + key + b"=" + value + b"\n"
    length = len(record) + len(str(len(record)))
    return b"%d" % (length + (len(str(length)) > len(str(len(record))))) + record


ROW = header(2) + block(b"{}") + b"\0" * 1024
SHARDS: dict[str, tuple[bytes, str]] = {
    "attributes in a row": (
        (header(9, b"x") + block(attribute(b"a", b"bc"))) * 3000 + ROW,
        "at most 8 headers of one member at byte 0, got more",
    ),
    "long names in a row": (
        (header(4, b"L") + block(b"abc\0")) * 3000 + ROW,
        "at most 8 headers of one member at byte 0, got more",
    ),
    "a header of 1 TB": (
        header(2**40, b"x") + ROW,
        "the header at byte 0 is damaged: expected a size of at most 1048576 bytes, got 1099511627776",
    ),
    "a header of negative size": (
        header(-1, b"g") + ROW,
        "the header at byte 0 is damaged: expected a size of at most 1048576 bytes, got -1",
    ),
    "digits without end": (header(10**6, b"x") + block(b"1" * 10**6) + ROW, "expected an attribute at its byte 0"),
    "a length in letters": (header(9, b"x") + block(b"ab a=bcd\n") + ROW, "expected an attribute at its byte 0"),
    "an attribute that ends outside": (header(9, b"x") + block(b"99 a=bcd\n") + ROW, "expected an attribute at its byte 0"),
    "a sparse map without end": (
        header(len(attribute(b"GNU.sparse.major", b"1")), b"x") + block(attribute(b"GNU.sparse.major", b"1")) + ROW,
        "the member after byte 0 is a sparse file",
    ),
    "an old sparse file": (header(2, b"S") + block(b"{}") + ROW, "the member 'a.json' is a sparse file"),
    "a member of negative size": (header(-512) + ROW, "truncated: the member 'a.json'|cannot be read as a tar file"),
    "a second header that lies": (header(2) + block(b"{}") + header(2**40, b"x") + ROW, "the header at byte 1024 is damaged"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_headers_of_a_shard_are_bounded(name: str, tmp_path: Path) -> None:
    data, message = SHARDS[name]
    (tmp_path / "s.tar").write_bytes(data)
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match=rf"s\.tar: .*({message})"):
            read(tmp_path / "s.tar")


def test_a_sparse_file_behind_a_shard_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(ROW)
    os.truncate(tmp_path / "s.tar", 2**40)
    with pytest.raises(UserError, match="at most 64 MiB of zeros after the last member, at byte"):
        open_rows(tmp_path / "s.tar")


def test_a_member_name_that_is_not_utf8_is_readable(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(header(2, name=b"caf\xe9.json") + block(b"{}") + b"\0" * 1024)
    assert open_rows(tmp_path / "s.tar")[0] == ("s.tar:caf\\udce9", {"__key__": "caf\\udce9", "json": {}})


def _strings(*values: bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


COLUMNS: dict[str, Callable[[], pa.Array]] = {
    "bad UTF-8": lambda: _strings(b"ok", b"\xff\xfe"),
    "a date out of range": lambda: pa.array([1, 2**31 - 1], pa.int32()).cast(pa.date32()),
    "a time out of range": lambda: pa.array([1, 2**62]).cast(pa.timestamp("us")),
    "a duration out of range": lambda: pa.array([1, 2**62]).cast(pa.duration("s")),
    "a key twice in a value": lambda: pa.StructArray.from_arrays(
        [pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"], mask=pa.array([True, False])
    ),
}


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _write_arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "r.parquet": lambda path, table: pq.write_table(table, path),
    "r.arrow": _write_arrow,
    "stream.arrow": _write_arrow_stream,
}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("name", COLUMNS)
def test_a_value_that_is_none_is_an_error_of_its_row_and_column(name: str, file: str, tmp_path: Path) -> None:
    WRITERS[file](tmp_path / file, pa.table({"fine": [1, 2], "bad": COLUMNS[name]()}))
    rows, streamed = open_rows(tmp_path / file), list(stream_rows(tmp_path / file))
    assert rows[0][1]["fine"] == 1 and streamed[0]()[1]["fine"] == 1
    for read in (lambda: rows[1], streamed[1]):
        with pytest.raises(RowError, match=rf"^{file}\[1\]: bad: cannot be read as ") as caught:
            read()
        assert caught.value.issue == "row_malformed"


@pytest.mark.parametrize("file", WRITERS)
def test_an_unknown_time_zone_is_an_error_of_its_row(file: str, tmp_path: Path) -> None:
    WRITERS[file](tmp_path / file, pa.table({"when": pa.array([1]).cast(pa.timestamp("us", "Mars/Phobos"))}))
    with pytest.raises(RowError, match=r"\[0\]: when: cannot be read as timestamp\[us, tz=Mars/Phobos\]"):
        open_rows(tmp_path / file)[0]


@pytest.mark.parametrize("file", WRITERS)
def test_two_columns_of_one_name_are_an_error(file: str, tmp_path: Path) -> None:
    WRITERS[file](tmp_path / file, pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["b", "a", "a"]))
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match="two columns are named 'a'"):
            read(tmp_path / file)


def test_offsets_that_lead_out_of_an_arrow_file_are_not_followed(tmp_path: Path) -> None:
    _write_arrow(tmp_path / "r.arrow", pa.table({"a": ["xx", "yyy"]}))
    data, right = (tmp_path / "r.arrow").read_bytes(), struct.pack("<iii", 0, 2, 5)
    assert data.count(right) == 1
    (tmp_path / "r.arrow").write_bytes(data.replace(right, struct.pack("<iii", 0, -(2**30), 2**30)))
    for index in (0, 1):
        with pytest.raises(RowError, match=rf"^r\.arrow\[{index}\]: a: cannot be read as string"):
            open_rows(tmp_path / "r.arrow")[index]


def test_a_dictionary_that_expands_too_much_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred bytes of a file that hold a text of 64 KiB for each of 100,000 rows."""
    monkeypatch.setattr(arrow_rows, "GROUP_BYTES", 2**24)
    monkeypatch.setattr(arrow_rows, "CACHE_BYTES", 2**22)
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 2**16]))
    pq.write_table(pa.table({"a": values}), tmp_path / "r.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "r.parquet").stat().st_size < 10_000
    with pytest.raises(RowError, match=r"r\.parquet\[7\]: row: .*row group 0 has more than"):
        open_rows(tmp_path / "r.parquet")[7]
    assert len(next(stream_rows(tmp_path / "r.parquet"))()[1]["a"]) == 2**16


def test_a_duplicate_among_many_keys_is_reported(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{number}": 1' for number in range(200_000))
    (tmp_path / "r.jsonl").write_text(f'{{{keys}, "k199999": 2}}\n')
    with pytest.raises(RowError, match=r"r\.jsonl:1: row: not valid JSON: duplicate key 'k199999'"):
        open_rows(tmp_path / "r.jsonl")[0]


def test_many_columns(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(100_000)]
    (tmp_path / "r.csv").write_text(f"{','.join(names)}\n{','.join(['1'] * len(names))}\n")
    assert open_rows(tmp_path / "r.csv")[0][1] == dict.fromkeys(names, "1")
    (tmp_path / "r.csv").write_text(f"{','.join(names)},c99999\n")
    with pytest.raises(UserError, match="two columns are named 'c99999'"):
        open_rows(tmp_path / "r.csv")


def test_a_row_of_many_fields_is_read_once_to_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = csv_rows.CsvRows.__getitem__
    monkeypatch.setattr(csv_rows.CsvRows, "__getitem__", lambda self, index: (reads.append(index), read(self, index))[1])
    (tmp_path / "r.csv").write_text(f"{','.join(f'c{n}' for n in range(500))}\n{','.join(['1'] * 500)}\n")
    issues = list(Validator([Source(path=str(tmp_path / "r.csv"), template="vqa")]).issues(1))
    assert len([each for each in issues if each.issue == "field_unknown"]) == 500 and len(reads) <= 2


@pytest.mark.parametrize("file", ["r.jsonl", "r.csv", "r.json", "quoted.csv"])
def test_a_row_is_of_bounded_length(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows_module, json_rows, csv_rows, webdataset_rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    text = {
        "r.jsonl": f'{{"a": 1}}\n{{"a": "{"x" * 2000}"}}\n',
        "r.csv": f"a,b\n1,{'x' * 2000}\n",
        "r.json": f'[{{"a": "{"x" * 2000}"}}]',
        "quoted.csv": 'a,b\n1,"' + "x\n" * 2000,
    }[file]
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file}(:2)?: .*MiB"):
        open_rows(tmp_path / file)[0]


def test_a_pattern_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    """Two links to the folder they lie in have 2^40 paths of 40 links, as deep as the system follows them."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number in (1, 2):
        (tmp_path / f"link{number}").symlink_to(".")
    for name in ("a.jsonl", "deep/b.jsonl", "deep/er/c.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    (tmp_path / "deep" / "linked.jsonl").symlink_to(tmp_path / "a.jsonl")
    rows = open_rows(tmp_path / "**" / "*.jsonl")
    assert [rows[index][0] for index in range(len(rows))] == [
        "a.jsonl:1",
        "deep/b.jsonl:1",
        "deep/er/c.jsonl:1",
        "deep/linked.jsonl:1",
    ]
    assert len(open_rows(tmp_path / "deep" / "**")) == 3


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_special_files_are_not_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match=r"r\.jsonl: expected a regular file, got a pipe, a socket or a device"):
        open_rows(tmp_path / "r.jsonl")


def test_a_file_name_that_is_not_utf8_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"caf\\udce9\.jsonl: the file name is not valid UTF-8; rename the file"):
        open_rows(tmp_path)
    assert entry_point(["data", "check", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")]) == 2
    assert "caf\\udce9.jsonl: the argument is not valid UTF-8" in capsys.readouterr().err


def test_names_from_files_are_compared_within_bounds() -> None:
    assert nearest("modle", {"model", "x" * 10**6}) == "; did you mean 'model'?"
    assert len(nearest("x" * 10**6, {"y" * 10**6, "x" * (10**6 - 1)})) < 300
    assert nearest("modle", {f"key{number}" for number in range(10**5)}).startswith("; valid here: key0, ")


# ------------------------------------------------------------------------------------------------------------ images


def test_a_png_of_many_text_chunks_is_walked_once(tmp_path: Path) -> None:
    """Text chunks without an orientation are skipped; the one with it is read at any position."""
    from hostile_rows import NOISE, chunk, encoded

    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(NOISE, "PNG", exif=exif)
    end = whole.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(whole[:end] + chunk(b"tEXt", b"k\0v") * 500_000 + whole[end:])
    assert image_size(tmp_path / "a.png") == (48, 64)
    (tmp_path / "a.png").write_bytes(whole[:end] + chunk(b"tEXt", b"XML:com.adobe.xmp\0" + b"x" * 2**20) + whole[end:])
    with pytest.raises(ValueError, match="expected EXIF data of at most 1048576 bytes, got a PNG chunk of 1048594 bytes"):
        image_size(tmp_path / "a.png")


@pytest.mark.parametrize("tag", [258, 259, 262, 273, 277, 278, 279, 339])
def test_a_tiff_tag_of_another_type_is_an_error_of_the_image(tag: int, tmp_path: Path) -> None:
    from hostile_rows import NOISE, encoded

    data = bytearray(encoded(NOISE.convert("I;16"), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    places = [start + 2 + 12 * number for number in range(struct.unpack("<H", data[start : start + 2])[0])]
    places = [place for place in places if struct.unpack("<H", data[place : place + 2])[0] == tag]
    for place in places:
        data[place + 2 : place + 12] = struct.pack("<HI4s", 2, 4, b"abc\0")
    (tmp_path / "a.tif").write_bytes(data)
    report = inspect_image(tmp_path / "a.tif", decode=True)
    try:
        open_image(tmp_path / "a.tif")
        opens = True
    except ValueError:
        opens = False
    assert opens == (not any(name in ("image_unreadable", "image_damaged", "image_truncated") for name, _ in report.issues))


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
    os.truncate(tmp_path / "a.webp", 2**40)
    issues: list[Any] = inspect_image(tmp_path / "a.webp").issues
    assert [name for name, _ in issues] == ["image_too_large"]
