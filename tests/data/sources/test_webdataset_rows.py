"""Webdataset shards read without unpacking, unsafe archives rejected, and many files read as one source."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.media.media import EmbeddedMedia, image_size, open_image
from mmtune.data.message import RowError
from mmtune.data.sources.source import default_media_root, open_rows, stream_rows
from mmtune.utils.errors import UserError

KEY = st.builds("".join, st.tuples(st.sampled_from(["", "a/", "b/c/"]), st.text("abé-", min_size=1, max_size=120)))


def _shard(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _both(path: Path | str, name: str | None = None) -> list[tuple[str, Any]]:
    rows = open_rows(path, name)
    read = [rows[index] for index in range(len(rows))]
    assert [item() for item in stream_rows(path, name)] == read
    assert [rows[index] for index in reversed(range(len(rows)))] == read[::-1]
    assert pickle.loads(pickle.dumps(rows))[len(rows) - 1] == read[-1]  # noqa: S301  (our own)
    return read


def _png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_gives_rows_of_members(tmp_path: Path, format: int) -> None:
    long = "deep/" * 20 + "b"  # beyond a header's 100 bytes
    members = [
        ("a.jpg", _png("red")),
        ("a.json", b'{"caption": "one"}'),
        ("a.seg.PNG", _png("blue")),
        (f"./{long}.png", _png("teal")),
        (f"./{long}.txt", "é\n".encode()),
        (f"./{long}.cls", b"7"),
        (".DS_Store", b"x"),
    ]
    path = _shard(tmp_path / "shard-000.tar", members, format)
    (first_id, first), (second_id, second) = _both(path)
    assert (first_id, second_id) == ("shard-000.tar:a", f"shard-000.tar:{long}")
    assert list(first) == ["__key__", "jpg", "json", "seg.png"] and list(second) == ["__key__", "png", "txt", "cls"]
    assert first["__key__"] == "a" and first["json"] == {"caption": "one"}
    assert second["txt"] == "é\n" and second["cls"] == "7"
    with tarfile.open(path) as archive:
        for medium, name in ((first["jpg"], "a.jpg"), (first["seg.png"], "a.seg.PNG"), (second["png"], f"./{long}.png")):
            assert isinstance(medium, EmbeddedMedia) and medium.data is None
            assert str(medium) == f"{path}!{name.removeprefix('./')}"
            with medium.open() as file:
                assert file.read() == archive.extractfile(name).read()  # type: ignore[union-attr]
    assert image_size(first["jpg"]) == (6, 4) and open_image(first["jpg"]).getpixel((0, 0)) == (255, 0, 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEY, st.binary(max_size=1100), min_size=1, max_size=6))
def test_any_members_round_trip(tmp_path: Path, rows: dict[str, bytes]) -> None:
    members = [(f"{key}.{kind}", data + kind.encode()) for key, data in rows.items() for kind in ("bin", "jpg")]
    read = _both(_shard(tmp_path / "s.tar", members))
    assert [row["__key__"] for _, row in read] == list(rows)
    assert [row[kind].open().read() for _, row in read for kind in ("bin", "jpg")] == [data for _, data in members]


def test_gnu_tar_archives_are_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("sub/b.txt", "sub/b.jpg", "sub/c.txt"):
        (tmp_path / "in" / name).write_text(name)
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "s.tar", "-C", tmp_path / "in", "."], check=True)
    assert [row_id for row_id, _ in _both(tmp_path / "s.tar")] == ["s.tar:sub/b", "s.tar:sub/c"]


def _special(kind: bytes, name: str = "a.jpg", link: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (_special(tarfile.SYMTYPE), "as member 'a.jpg', got a link"),
        (_special(tarfile.LNKTYPE, link="b.jpg"), "as member 'a.jpg', got a link"),
        (_special(tarfile.CHRTYPE), "a device or pipe"),
        (_special(tarfile.FIFOTYPE), "a device or pipe"),
        (_special(tarfile.REGTYPE, "/etc/a.jpg"), "is outside the archive"),
        (_special(tarfile.REGTYPE, "x/../../a.jpg"), "is outside the archive"),
        (_special(tarfile.REGTYPE, "LICENSE"), "'LICENSE' has no extension"),
    ],
)
def test_an_archive_with_special_members_is_rejected(tmp_path: Path, member: tarfile.TarInfo, reason: str) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("0.txt"), io.BytesIO())
        archive.addfile(member)
    _refused(path, reason)


def _refused(path: Path, reason: str) -> None:
    for read in (open_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(UserError, match=reason):
            read(path)


GOOD = [("a.txt", b"x" * 600), ("a.jpg", b"y" * 600), ("b.txt", b"z")]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([*GOOD, ("a.png", b"")], "the members of 'a' are not adjacent"),
        ([*GOOD, ("b.TXT", b"")], "expected one member 'b.txt', got two"),
        ([], "has no rows"),
        ([(".hidden", b"")], "has no rows"),
    ],
)
def test_members_that_form_no_rows_are_rejected(tmp_path: Path, members: list[tuple[str, bytes]], reason: str) -> None:
    _refused(_shard(tmp_path / "s.tar", members), reason)


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    path = _shard(tmp_path / "s.tar", GOOD)
    whole = path.read_bytes()
    assert len(_both(path)) == 2
    path.write_bytes(whole[: 512 * 8])  # without the zeros at its end, as some programs write it
    assert len(_both(path)) == 2
    path.write_bytes(whole[: 512 * 5])
    _refused(path, "truncated|cannot be read|unexpected end")
    path.write_bytes(whole[: 512 * 6 + 100])
    _refused(path, "s.tar: unexpected data after the last member|truncated")
    path.write_bytes(whole[:1536] + b"garbage!" * 64 + whole[2048:])
    _refused(path, "unexpected data after the last member, at byte 1536")
    path.write_bytes(whole + whole)
    _refused(path, "or has two archives")
    path.write_bytes(b"")
    _refused(path, "cannot be read as a tar file")
    path.write_bytes(b"nothing of the kind" * 100)
    _refused(path, "cannot be read as a tar file")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_archive_is_rejected_under_any_name(tmp_path: Path, mode: str) -> None:
    with tarfile.open(tmp_path / "s.tar", f"w:{mode}"):
        pass
    _refused(tmp_path / "s.tar", r"compressed with .* decompress it to a plain \.tar")
    (tmp_path / "s.tar").rename(tmp_path / f"s.tar.{mode}")
    _refused(tmp_path / f"s.tar.{mode}", "compressed")


@pytest.mark.parametrize(
    ("member", "field", "reason"),
    [
        (("b.json", b"{"), "json", "not valid JSON"),
        (("b.meta.json", b"\xff"), "meta.json", "UTF-8"),
        (("b.txt", b"\xff"), "txt", "UTF-8"),
    ],
)
def test_an_unreadable_member_is_an_error_of_its_row(tmp_path: Path, member: tuple[str, bytes], field: str, reason: str) -> None:
    path = _shard(tmp_path / "s.tar", [("a.txt", b"1"), member, ("c.txt", b"3")])
    rows, streamed = open_rows(path), list(stream_rows(path))
    for read in (lambda: rows[1], streamed[1]):
        with pytest.raises(RowError, match=reason) as caught:
            read()
        assert (caught.value.row, caught.value.field) == ("s.tar:b", field)
    assert rows[2] == streamed[2]()


# ------------------------------------------------------------------------------------------------------------ many files


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(3):
        _shard(tmp_path / f"s-{number:03}.tar", [(f"{number}{letter}.txt", b"") for letter in "ab"])
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.jsonl").write_text(json.dumps({"in": folder}) + "\n")
        (tmp_path / folder / "notes.md").write_text("")
    return tmp_path


def test_globs_braces_and_folders_are_one_source_in_order(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"s-{number:03}.tar:{number}{letter}" for number in range(3) for letter in "ab"]
    monkeypatch.chdir(shards)
    for path in (
        f"{shards}/s-*.tar",
        f"{shards}/s-{{000..002}}.tar",
        "s-{002,000,001}.tar",
        "s-00[0-2].tar",
        "./s-{000..002}.tar",
    ):
        assert [row_id for row_id, _ in _both(path)] == ids
    assert _both(f"{shards}/x") == [("r.jsonl:1", {"in": "x"})]
    lines = [(f"{folder}/r.jsonl:1", {"in": folder}) for folder in ("x", "y")]
    for path in ("*/r.jsonl", "**/*.jsonl", "{x,y}/r.jsonl", f"{shards}/[xy]/*.jsonl"):
        assert _both(path) == lines
    assert [row_id for row_id, _ in _both("x/*.jsonl", "x/*.jsonl")] == ["x/r.jsonl:1"]
    assert [row_id for row_id, _ in _both("x", "x")] == ["x/r.jsonl:1"]


def test_a_name_with_a_bracket_in_it_is_a_file_if_there_is_one(shards: Path) -> None:
    (shards / "r[1]{a}.json").write_text("[{}]")
    assert _both(shards / "r[1]{a}.json") == [("r[1]{a}.json[0]", {})]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("s-{000..003}.tar", "no such file: .*s-003.tar"),
        ("s-{003..000}.tar", "is not a valid range"),
        ("s-{000}.tar", "expected a list {a,b} or a range"),
        ("t-*.tar", "matches no file"),
        ("empty", "no data files in this folder"),
        ("mixed", r"got \.csv and \.json files; choose one of them, such as .*/\*\.csv"),
        ("none.tar", "no such file"),
        ("none", "no such file"),
        ("x/notes.md", "unknown file extension; .* got '.md'"),
    ],
)
def test_files_that_are_not_there_are_named(shards: Path, path: str, reason: str) -> None:
    (shards / "empty").mkdir()
    (shards / "mixed").mkdir()
    (shards / "mixed" / "a.csv").touch()
    (shards / "mixed" / "a.json").touch()
    _refused(Path(f"{shards}/{path}"), reason)


def test_the_default_media_root_is_the_folder_of_the_rows(shards: Path) -> None:
    assert default_media_root(shards / "x" / "r.jsonl") == shards / "x"
    assert default_media_root(shards / "x") == shards / "x"
    assert default_media_root(f"{shards}/*/r.jsonl") == shards
    assert default_media_root("s-{000..002}.tar") == default_media_root("org/name@config:train") == Path()
