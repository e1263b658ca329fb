"""Tables: CSV compared with Python's reader, Parquet and Arrow with pyarrow, saved data sets with `datasets`."""

from __future__ import annotations

import csv
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.media.media import MediaRules, open_image, resolve_media
from mmtune.data.message import RowError
from mmtune.data.sources import arrow_rows
from mmtune.data.sources.source import open_rows, stream_rows
from mmtune.utils.errors import UserError

CELL = st.text(alphabet=st.sampled_from('",\t\n é\x85\u2028\x0cab\\'), max_size=6)


def _both(path: Path | str) -> list[tuple[str, Any]]:
    """The rows by index, after checking that the stream gives the same."""
    rows = open_rows(path)
    read = [rows[index] for index in range(len(rows))]
    assert [item() for item in stream_rows(path)] == read
    assert [rows[index] for index in reversed(range(len(rows)))] == read[::-1]
    assert pickle.loads(pickle.dumps(rows))[0] == read[0]  # noqa: S301  (our own)
    return read


# ------------------------------------------------------------------------------------------------------------------- CSV


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5),
    st.sampled_from([(".csv", ","), (".tsv", "\t")]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_a_table_of_any_text_round_trips(
    tmp_path: Path, rows: list[tuple[str, str]], kind: tuple[str, str], end: str, quoting: Any, encoding: str
) -> None:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=kind[1], lineterminator=end, quoting=quoting)
    writer.writerows([("a", "b\nc"), *rows])
    path = tmp_path / f"r{kind[0]}"
    path.write_bytes(out.getvalue().encode(encoding))
    reader = csv.reader(io.StringIO(out.getvalue(), newline="\n"), delimiter=kind[1], strict=True)
    columns, expected, begins = next(reader), [], reader.line_num + 1
    for cells in reader:
        expected.append((f"{path.name}:{begins}", dict(zip(columns, cells, strict=True))))
        begins = reader.line_num + 1
    assert _both(path) == expected and len(expected) == len(rows)


def test_a_quoted_line_break_does_not_start_a_row(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text('q,a\n"one\ntwo",1\n\nthree,"say ""3"""\n')
    assert _both(tmp_path / "r.csv") == [("r.csv:2", {"q": "one\ntwo", "a": "1"}), ("r.csv:5", {"q": "three", "a": 'say "3"'})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1", "expected 2 fields, one for each column, got 1"),
        (b"1,2,3", "expected 2 fields, one for each column, got 3"),
        (b'"1"x,2', "expected after"),
        (b"\xff,2", "UTF-8"),
    ],
)
def test_a_record_that_is_wrong_is_named_and_the_others_still_read(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "r.csv").write_bytes(b"a,b\n1,2\n" + line + b"\n3,4\n")
    rows = open_rows(tmp_path / "r.csv")
    streamed = list(stream_rows(tmp_path / "r.csv"))
    for read in (lambda: rows[1], streamed[1]):
        with pytest.raises(RowError, match=rf"^r\.csv:3: row: .*{reason}"):
            read()
    assert rows[2] == streamed[2]() == ("r.csv:4", {"a": "3", "b": "4"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'a,b\n1,2\n"3,4\n5,6\n7,8\n', "r.csv:3: a quote in this row is not closed"),
        (b'a,b\n1,2\n3,"4\n5,6', "r.csv:3: a quote in this row is not closed"),
        (b"a,a\n1,2\n", "two columns are named 'a'"),
        (b"a,\n1,2\n", "a column has no name"),
        (b"\xff,b\n1,2\n", "the column names in the first line: .*UTF-8"),
        (b"a,b\r1,2\r3,4\r", "r.csv:1: not valid CSV"),
        (b"a,b\n", "has no rows"),
        (b"", "r.csv"),
    ],
)
def test_an_unreadable_table_is_an_error_with_the_reason(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "r.csv").write_bytes(text)
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match=reason):
            read(tmp_path / "r.csv")


def test_a_field_may_be_long_and_pythons_field_limit_is_unchanged(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "r.csv").write_text(f"a\n{'x' * (before + 1)}\n")
    assert len(_both(tmp_path / "r.csv")[0][1]["a"]) == before + 1
    assert csv.field_size_limit() == before


# ------------------------------------------------------------------------------------------------------ parquet and arrow

TABLE = pa.table(
    {
        "n": list(range(10)),
        "image": pa.array([{"bytes": bytes([n]) * 40, "path": f"{n}.png"} for n in range(10)]),
        "turns": [[{"from": "human", "value": "é" * n}] for n in range(10)],
        "none": [None] * 10,
    }
)


def _write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(TABLE, path, row_group_size=3)
    elif kind == "feather":
        feather.write_feather(TABLE, path, compression="lz4", chunksize=3)
    else:
        make = pa.ipc.new_file if kind == "arrow file" else pa.ipc.new_stream
        with make(str(path), TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=3)
    return path


ISSUE_TYPES = [("r.parquet", "parquet"), ("r.arrow", "arrow file"), ("r.arrow", "arrow stream"), ("r.feather", "feather")]


@pytest.mark.parametrize(("name", "kind"), ISSUE_TYPES)
def test_a_columnar_file_is_read_by_group(tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / name, kind)
    assert _both(path) == [(f"{name}[{n}]", row) for n, row in enumerate(TABLE.to_pylist())]

    rows: Any = open_rows(path)._rows
    read, groups = rows._read, []
    rows._read = lambda number: groups.append(number) or read(number)
    for index in (0, 1, 2, 9, 0, 9, 4):
        assert rows[index][1] == TABLE.slice(index, 1).to_pylist()[0]
    assert groups == [0, 3, 1]  # each once: they are kept …
    monkeypatch.setattr(arrow_rows, "CACHE_BYTES", 0)
    rows._cache.clear()
    for index in (0, 1, 9, 0):
        assert rows[index][1]["n"] == index
    assert groups == [0, 3, 1, 0, 3, 0] and len(rows._cache) == 1  # … within bounds, and always the last
    with pytest.raises(IndexError):
        rows[10]


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "r.feather"])
@pytest.mark.parametrize("content", [b"", b"PAR1 nothing of the kind", b"ARROW1\0\0 nothing of the kind"])
def test_an_invalid_columnar_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match=f"{name}: cannot be read: "):
            read(tmp_path / name)


@pytest.mark.parametrize(("name", "kind"), ISSUE_TYPES)
def test_a_truncated_columnar_file_is_an_error(tmp_path: Path, name: str, kind: str) -> None:
    path = _write(tmp_path / name, kind)
    whole = path.read_bytes()
    for part in (0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * part)])
        for read in (_both, lambda path: list(stream_rows(path))):
            with pytest.raises(UserError, match="cannot be read"):
                read(path)


def test_a_row_group_too_large_for_one_row_is_rejected_and_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "r.parquet", "parquet")
    monkeypatch.setattr(arrow_rows, "GROUP_BYTES", 10)
    with pytest.raises(UserError, match=r"row group 0 has .*\(row_group_size=1000\), or stream it"):
        open_rows(path)
    assert len(list(stream_rows(path))) == 10


def test_a_large_row_group_is_read_in_few_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded row by row, as its size asks for, a row would be found by a walk over all the rows before it."""
    monkeypatch.setattr(arrow_rows, "CACHE_BYTES", 1)
    texts = [f"text {number}" for number in range(3000)]
    table = pa.table({"a": texts, "b": pa.array(["x", "y", None] * 1000).dictionary_encode()})
    pq.write_table(table, tmp_path / "r.parquet")
    group = arrow_rows._row_group(tmp_path / "r.parquet", 0)
    assert [column.num_chunks for column in group.columns] == [3, 3]
    rows = open_rows(tmp_path / "r.parquet")
    assert [rows[index][1] for index in (0, 1023, 1024, 2999)] == [table.to_pylist()[index] for index in (0, 1023, 1024, 2999)]


# --------------------------------------------------------------------------------------------------- saved by `datasets`


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with an Image feature, saved alone and as a split; `datasets` writes its arrow and parquet files too."""
    root = tmp_path_factory.mktemp("saved")
    Image.new("RGB", (5, 3), "teal").save(root / "a.png")
    columns = {"image": datasets.Image(), "more": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    pictures = [str(root / "a.png"), {"bytes": (root / "a.png").read_bytes(), "path": None}]
    data_set = datasets.Dataset.from_dict(
        {"image": pictures, "more": [pictures, []], "text": ["a", "b"]}, features=datasets.Features(columns)
    )
    data_set.save_to_disk(root / "one")
    datasets.DatasetDict({"train": data_set, "test": data_set}).save_to_disk(root / "splits")
    data_set.to_parquet(root / "r.parquet")
    return root


@pytest.mark.parametrize("name", ["one", "splits/train", "r.parquet"])
def test_images_of_a_saved_data_set_stay_undecoded(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_: pytest.fail("decoded"))
    rows = _both(saved / name)
    assert [row_id for row_id, _ in rows] == [f"{Path(name).name}[0]", f"{Path(name).name}[1]"]
    for value in (rows[0][1]["image"], rows[1][1]["image"], *rows[0][1]["more"]):
        assert set(value) == {"bytes", "path"}
        assert open_image(resolve_media(value, MediaRules(saved))).size == (5, 3)


def test_a_shuffled_data_set_keeps_its_order(saved: Path, tmp_path: Path) -> None:
    datasets.load_from_disk(str(saved / "one")).select([1, 0]).save_to_disk(tmp_path / "turned")
    assert [row["text"] for _, row in _both(tmp_path / "turned")] == ["b", "a"]


def test_a_directory_of_splits_is_an_error_without_a_split(saved: Path) -> None:
    with pytest.raises(
        UserError, match=r"has several splits \(test, train\); give the path of one of them, such as .*splits/test"
    ):
        open_rows(saved / "splits")


# --------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name-v1.5:test", ("org/name-v1.5", None, "test")),
        ("org/name@plain_text", ("org/name", "plain_text", "train")),
        ("org/name@2024-01:train+test", ("org/name", "2024-01", "train+test")),
    ],
)
def test_a_hub_id_is_what_datasets_loads(path: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    data_set = datasets.Dataset.from_dict({"text": ["a", "b"]})

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        assert (name, config, split) == asked
        return data_set.to_iterable_dataset() if streaming else data_set

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert _both(path) == [(f"{path}[0]", {"text": "a"}), (f"{path}[1]", {"text": "b"})]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Dataset scripts are no longer supported, but found name.py"),
            "does not run remote code; convert it to parquet",
        ),
        (ConnectionError("Couldn't reach the Hugging Face Hub"), "the hub cannot be reached"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist"),
            "no such file, and the hub data set cannot be loaded: .* exist",
        ),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), "Should be one of"),
    ],
)
def test_a_data_set_that_does_not_load_is_an_error_with_the_reason(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match=f"org/name: .*{reason}"):
            read("org/name")


def test_without_a_connection_the_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match="mmtune-tests/none-of-the-kind: no such file, and the hub data set cannot be loaded"):
            read("mmtune-tests/none-of-the-kind")
    assert "trust_remote_code" not in Path(sys.modules["mmtune.data.sources.hub_rows"].__file__ or "").read_text()


def test_a_separator_that_contradicts_the_suffix_is_named(tmp_path: Path) -> None:
    for name, text, separator in (("r.csv", "image;question\na.png;b\n", "';'"), ("r.tsv", "image,question\na.png,b\n", "','")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"got one column .*; the separator seems to be {separator}"):
            open_rows(tmp_path / name)
