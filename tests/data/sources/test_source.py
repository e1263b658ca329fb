"""Sources: rows by index, and row ids that find the row again."""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtune.data.message import RowError
from mmtune.data.sources.json_rows import JsonLinesRows
from mmtune.data.sources.source import FileWatch, open_rows, stream_rows
from mmtune.utils.errors import UserError


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_json_list_is_read_by_index(tmp_path: Path) -> None:
    rows = open_rows(_write(tmp_path / "r.json", '[{"a": 1}, {"a": "é"}]'))
    assert len(rows) == 2
    assert [rows[1], rows[0]] == [("r.json[1]", {"a": "é"}), ("r.json[0]", {"a": 1})]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_keep_the_line_numbers_right(tmp_path: Path, end: str) -> None:
    text = end.join(["", '{"n": 2}', "", "   ", '{"n": 5, "s": "é\u2028\u0085 one line"}', '{"n": 6}'])  # no newline at the end
    rows = open_rows(_write(tmp_path / "r.jsonl", text))
    assert len(rows) == 3
    assert [rows[i][0] for i in (2, 0, 1)] == ["r.jsonl:6", "r.jsonl:2", "r.jsonl:5"]
    assert all(row_id == f"r.jsonl:{row['n']}" for row_id, row in map(rows.__getitem__, range(3)))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("r.json", None, "no such file or folder: .*r.json; "),
        ("r.json", '{"a": 1}', r"expected a list of rows, got an object with a \(a number.*`rows: KEY`"),
        ("r.json", '[{"a": 1},', "the bracket at byte 0 is not closed; the file is truncated"),
        ("r.json", "[]", "has no rows"),
        ("r.json", "", "not valid JSON"),
        ("r.jsonl", "\n \n", "has no rows"),
        ("r.csv", "a,b", "has no rows"),
        ("r.txt", "a,b", "expected one of .json, .jsonl, .ndjson, .csv, .*, got '.txt'"),
        ("r", "x", "unknown file extension; .* got ''"),
    ],
)
def test_a_file_that_holds_no_rows_is_rejected(tmp_path: Path, name: str, text: str | bytes | None, reason: str) -> None:
    if text is not None:
        _write(tmp_path / name, text)
    with pytest.raises(UserError, match=reason):
        open_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON: not valid UTF-8: byte 0xff after"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[1]", "expected an object, got list"),
        (b"null", "expected an object, got NoneType"),
    ],
)
def test_a_broken_line_is_named_and_the_others_still_read(tmp_path: Path, line: bytes, reason: str) -> None:
    rows = open_rows(_write(tmp_path / "r.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 4}\n'))
    with pytest.raises(RowError, match=reason) as caught:
        rows[1]
    assert caught.value.row == "r.jsonl:3" and caught.value.field == "row"
    assert rows[2] == ("r.jsonl:4", {"a": 4})


def test_a_list_item_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    rows = open_rows(_write(tmp_path / "r.json", '[{"a": 1}, "text"]'))
    with pytest.raises(RowError, match=r"^r\.json\[1\]: row: expected an object, got str$"):
        rows[1]


def test_only_offsets_of_json_lines_are_kept(tmp_path: Path) -> None:
    count = 500
    path = _write(tmp_path / "r.jsonl", "".join(json.dumps({"n": n, "text": "x" * 2000}) + "\n" for n in range(count)))
    rows = JsonLinesRows(path, path.name)
    held = sum(sys.getsizeof(value) for value in vars(rows).values() if not isinstance(value, Path))
    assert held < 40 * count < path.stat().st_size / 20
    assert rows[321] == ("r.jsonl:322", {"n": 321, "text": "x" * 2000})
    path.write_text(path.read_text().replace('"n": 7,', '"n": 8,'))
    assert rows[7][1]["n"] == 8  # a row is read when asked for


def _read(rows: Any, order: list[int], answer: Any) -> None:
    answer.put([rows[index][1]["n"] for index in order])


@pytest.mark.parametrize(("name", "how"), [("r.json", "fork"), ("r.jsonl", "fork"), ("r.jsonl", "spawn")])
def test_rows_are_read_in_any_order_from_another_process(tmp_path: Path, name: str, how: str) -> None:
    lines = [json.dumps({"n": n}) for n in range(5)]
    rows = open_rows(_write(tmp_path / name, "\n".join(lines) if name == "r.jsonl" else f"[{','.join(lines)}]"))
    assert rows[0][1] == {"n": 0}
    context = multiprocessing.get_context(how)
    answer = context.Queue()
    worker = context.Process(target=_read, args=(rows, [4, 0, 3], answer))
    worker.start()
    assert answer.get(timeout=60) == [4, 0, 3]
    assert rows[2][1] == {"n": 2}
    worker.join()


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, name: str) -> None:
    lines = {"r.jsonl": '{"a": "1"}\n{"a": "2"}\n', "r.json": '[{"a": "1"}, {"a": "2"}]', "r.csv": "a\n1\n2\n"}
    path = _write(tmp_path / name, lines[name])
    rows, watch = open_rows(path), FileWatch()
    streamed = stream_rows(path, watch=watch)
    assert rows[0][1] == next(streamed)()[1] == {"a": "1"}
    _write(path, lines[name].replace("1", "11"))
    for read in (lambda: rows[1], lambda: next(streamed), lambda: next(stream_rows(path, watch=watch))):
        with pytest.raises(UserError, match=f"{path}: changed since it was opened"):
            read()
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: can no longer be read: No such file"):
        rows[1]


TEXT = {
    "r.json": '[{"a": "1"}]',
    "r.jsonl": '{"a": "1"}\n',
    "r.csv": "a\n1\n",
    "r.tsv": "a\n1\n",
}


@pytest.mark.parametrize("name", TEXT)
def test_a_files_encoding_is_recognized_or_named(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, TEXT[name].encode("utf-8-sig"))
    assert open_rows(path)[0][1] == next(stream_rows(path))()[1] == {"a": "1"}
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        for mark in ("", "\ufeff"):
            _write(path, (mark + TEXT[name]).encode(encoding))
            named = encoding[:6].upper()
            reason = rf"{name}: expected UTF-8 text, got {named}; .* iconv -f {named} -t UTF-8 "
            with pytest.raises(UserError, match=reason):
                open_rows(path)
            with pytest.raises(UserError, match=reason):
                next(stream_rows(path))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (
            "r.json",
            "\n\n this is not json\n",
            r"r\.json:3: not valid JSON: expected a list of objects, .*, got 'this is not json'",
        ),
        ("r.json", "truely", r"r\.json:1: not valid JSON: expected a list of objects, .*, got 'truely'"),
        ("r.json", "true", "got a number, true, false or null"),
        ("r.json", '"text"', "got text"),
        ("r.json", "-1", "got a number"),
        ("r.json", "{'a': 1}", "expected a key and a value"),
        ("r.json", b"\x1f\x8b\x08rest", "a compressed file, in spite of its extension"),
        ("r.csv", b"PK\x03\x04rest", "a compressed file, in spite of its extension"),
        ("r.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .* git lfs pull"),
        ("r.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .* git lfs pull"),
        ("r.tar", "<!DOCTYPE html><html>", "a web page, not a file of rows"),
        ("r.json", "<html>", "a web page, not a file of rows"),
    ],
)
def test_a_file_that_is_something_else_is_called_that(tmp_path: Path, name: str, text: str | bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        open_rows(_write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("this is not json", r"r\.jsonl:1: row: not valid JSON: expected an object {...}, got 'this is not json'"),
        ("{'a': 1}", r"r\.jsonl:1: row: not valid JSON: .* at character 2 of the row, in \"\{'a': 1\}\""),
        (
            '[{"a": 1},\n{"a": 2}]',
            r"r\.jsonl:1: row: .*; a \.jsonl file has one row per line; rename a file with one list to \.json",
        ),
        ('[{"a": 1}]', r"r\.jsonl:1: row: expected an object, got list; a \.jsonl file has one row per line"),
    ],
)
def test_a_line_that_is_not_a_row_is_an_error_with_its_type(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        open_rows(_write(tmp_path / "r.jsonl", text))[0]
