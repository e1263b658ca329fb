"""The JSON scanner compared with json.loads: the same rows, and the same inputs rejected."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmtune.data.message import RowError
from mmtune.data.sources import json_rows
from mmtune.data.sources.source import open_rows, stream_rows
from mmtune.utils.errors import UserError

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(alphabet=st.sampled_from('"\\{}[],: \n\té☃𝄞ab'), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROW = st.dictionaries(TEXT, VALUE, max_size=4)
STYLE = st.fixed_dictionaries({"indent": st.sampled_from([None, 0, 2]), "ensure_ascii": st.booleans()})


@pytest.fixture(params=[3, 2**20], ids=lambda size: f"chunks of {size}")
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "CHUNK", request.param)


def _both(path: Path, rows: str | None = None) -> list[tuple[str, Any]]:
    """The rows by index, after checking that the stream gives the same; a RowError stands for a row that raises it."""
    opened = open_rows(path, rows=rows)
    read = [_called(lambda index=index: opened[index]) for index in range(len(opened))]  # type: ignore[misc]
    assert [_called(item) for item in stream_rows(path, rows=rows)] == read
    return read


def _called(item: Any) -> tuple[str, Any]:
    try:
        return item()
    except RowError as error:
        return error.row, str(error)


@QUICK
@given(st.lists(ROW, min_size=1, max_size=5), STYLE, st.sampled_from(["", " ", "\r\n\t"]), st.booleans())
def test_a_list_of_any_rows_round_trips(
    tmp_path: Path, chunks: None, rows: list[Any], style: dict[str, Any], space: str, bom: bool
) -> None:
    path = tmp_path / "r.json"
    text = space + json.dumps(rows, **style) + space
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    assert _both(path) == [(f"r.json[{index}]", row) for index, row in enumerate(json.loads(text))]


@QUICK
@given(st.dictionaries(TEXT, VALUE, max_size=3), st.lists(ROW, min_size=1, max_size=4), st.dictionaries(TEXT, VALUE, max_size=3))
def test_a_list_under_a_key_round_trips(tmp_path: Path, chunks: None, before: Any, rows: list[Any], after: Any) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**before, "the rows": rows, **{key: value for key, value in after.items() if key not in before}}))
    assert _both(path, "the rows") == [(f"r.json:the rows[{index}]", row) for index, row in enumerate(rows)]


@QUICK
@given(st.dictionaries(TEXT, ROW, min_size=1, max_size=4), STYLE)
def test_an_object_by_key_round_trips(tmp_path: Path, chunks: None, rows: dict[str, Any], style: dict[str, Any]) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(rows, **style))
    assert _both(path, "*") == [(f"r.json:{key}", {**row, "__key__": key}) for key, row in rows.items()]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW, max_size=3), st.data())
def test_input_that_json_rejects_is_rejected(tmp_path: Path, rows: list[Any], data: st.DataObject) -> None:
    """A byte changed, removed or added: either json.loads reads the whole and gives our rows, or we raise somewhere."""
    text = json.dumps(rows).encode()
    at = data.draw(st.integers(0, len(text)))
    new = data.draw(st.sampled_from([*(c.encode() for c in '"\\{}[],:0eE-. \n' + string.ascii_lowercase[:3]), b"", b"\xff"]))
    text = text[:at] + new + text[at + data.draw(st.integers(0, 1)) :]
    path = tmp_path / "r.json"
    path.write_bytes(text)
    try:
        taken = _both(path)
    except UserError:
        return
    if not any(isinstance(row, str) for _, row in taken):
        assert [row for _, row in taken] == json.loads(text)


def test_a_json_file_with_an_object_on_each_line_is_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "coco_pope_random.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n')
    rows = open_rows(file)
    assert [rows[n] for n in range(len(rows))] == [("coco_pope_random.json:1", {"a": 1}), ("coco_pope_random.json:3", {"a": 2})]
    assert [read() for read in stream_rows(file)] == [rows[0], rows[1]]


@pytest.mark.parametrize(
    ("text", "rows", "reason"),
    [
        ("", None, "the file is empty"),
        ("  \n", None, "the file is empty"),
        ("\ufeff", None, "the file is empty"),
        ("[]", None, "has no rows"),
        ("[ \n ]", None, "has no rows"),
        ('{"a": []}', "a", "has no rows"),
        ("{ }", "*", "has no rows"),
        ("7", None, "got a number"),
        ('"text"', None, "got text"),
        ('[{"a": 1}', None, "not closed; the file is truncated"),
        ('[{"a": "1}]', None, "not closed; the file is truncated"),
        ('[{"a": 1}}', None, "expected ']' at byte 9 to close the bracket at byte 0, got '}'"),
        ('[{"a": 1}] [', None, "extra data after the first value, at byte 11"),
        ('[{"a": 1}]\n[{"a": 2}]', None, "JSON Lines"),
        ('{"a": 1}\n{"a": 2}', "a", "JSON Lines"),
        ('{"info": {}, "images": [], "n": 3}', None, r"info \(an object\), images \(a list\), n \(a number.*`rows: KEY`.*'\*'"),
        ('{"a": [{}], "b": 1}', "A", "no key 'A'; (did you mean 'a'|valid here: a, b)"),
        ('{"a": 1}', "a", "expected a list of rows under the key 'a', got a number, true, false or null"),
        ('{"a": [{}], "a": [{}]}', "a", "expected the key 'a' once, got it 2 times"),
        ('{"a": [{}], a: 1}', "a", "expected a key and a value at byte 11"),
        ('{"a": [{}]', "a", "not closed; the file is truncated"),
        ("[{}]", "a", "`rows: a` in the data template needs an object, got a list"),
        ("[{}]", "*", "needs an object, got a list"),
    ],
)
def test_a_file_without_rows_is_an_error_with_the_reason(tmp_path: Path, text: str, rows: str | None, reason: str) -> None:
    (tmp_path / "r.json").write_bytes(text.encode())
    with pytest.raises(UserError, match=reason):
        open_rows(tmp_path / "r.json", rows=rows)
    with pytest.raises(UserError, match=reason):
        list(stream_rows(tmp_path / "r.json", rows=rows))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": 1e999}', "1e999 is out of the range of a float"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": "\x00"}', "control character"),
        (b"[" * 100_000 + b"]" * 100_000, "at most 100 levels of nested lists and objects"),
        (b'{"a" 1}', "delimiter"),
        (b"", "not valid JSON: expected an object {...}, got ''"),
        (b"7", "expected an object, got int"),
    ],
)
def test_a_row_that_is_not_strict_json_is_named_in_every_format(tmp_path: Path, row: bytes, reason: str) -> None:
    listed = b"[{}," + row + b",{}]"
    files = {
        "r.json": (listed, None, "r.json[1]"),
        "k.json": (b'{"rows": ' + listed + b"}", "rows", "k.json:rows[1]"),
    }
    if row:
        files["r.jsonl"] = (b"{}\n" + row + b"\n{}", None, "r.jsonl:2")
        files["s.json"] = (b'{"x": {}, "y y": ' + row + b"}", "*", "s.json:y y")
    for name, (text, key, row_id) in files.items():
        (tmp_path / name).write_bytes(text)
        read = _both(tmp_path / name, key)
        assert read[1][0] == row_id and read[0][1] == ({"__key__": "x"} if key == "*" else {})
        with pytest.raises(RowError, match=reason) as caught:
            open_rows(tmp_path / name, rows=key)[1]
        assert caught.value.row == row_id and caught.value.field == "row"


def test_a_byte_order_mark_and_old_line_ends_are_not_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n \t\r\n{"n": 4}')
    assert _both(path) == [("r.jsonl:1", {"n": 1}), ("r.jsonl:4", {"n": 4})]
    path.write_bytes(b'\xef\xbb\xbf\r\n{"n": 2}\n')
    assert _both(path) == [("r.jsonl:2", {"n": 2})]


@QUICK
@given(st.lists(st.one_of(st.none(), ROW), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_json_lines_round_trip(tmp_path: Path, rows: list[Any], end: str) -> None:
    path = tmp_path / "r.ndjson"
    path.write_bytes("".join(("" if row is None else json.dumps(row)) + end for row in rows).encode())
    expected = [(f"r.ndjson:{number}", row) for number, row in enumerate(rows, start=1) if row is not None]
    if expected:
        assert _both(path) == expected
    else:
        with pytest.raises(UserError, match="has no rows"):
            open_rows(path)


def test_a_stream_parses_only_requested_rows_and_stops_with_its_reader(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"n": 1}\nbroken\n{"n": 3}\n')
    (tmp_path / "r.json").write_text('[{"n": 1}, broken, {"n": 3}]')
    for name in ("r.jsonl", "r.json"):
        items = list(stream_rows(tmp_path / name))
        assert items[2]()[1] == {"n": 3}
        with pytest.raises(RowError):
            items[1]()
