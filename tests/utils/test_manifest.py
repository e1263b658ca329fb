"""Manifests: a release is pushed as the plain files that its manifest lists, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import httpx2
import pytest

from mmtune.cli.main import entry_point
from mmtune.utils.manifest import check_manifest, write_manifest


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "release"
    (folder / "adapter").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\na card\n", encoding="utf-8")
    (folder / "adapter" / "a.txt").write_text("a", encoding="utf-8")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"files": []}',
        '{"files": {"README.md": null}}',
        '{"files": {"README.md": {"bytes": 1}}}',
        '{"files": {"README.md": {"sha256": 7}}}',
        '{"files": ',
        "[" * 100_000,
        "\udcff",
    ],
    ids=range(10),
)
def test_a_manifest_that_is_none_is_one_message(release: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (release / "manifest.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert entry_point(["push", str(release), "me/model"]) == 2
    assert "expected a complete output of mmtune" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "file", "dangling", "fifo"])
def test_links_and_special_files_are_named(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("s", encoding="utf-8")
    odd = release / "adapter" / "odd"
    if kind == "fifo":
        os.mkfifo(odd)
    else:
        odd.symlink_to(tmp_path / {"folder": "elsewhere", "file": "elsewhere/secret", "dangling": "gone"}[kind])
    assert entry_point(["push", str(release), "me/model"]) == 1
    assert "adapter/odd: expected regular files only, got a link or special file" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_message(
    release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Api:
        def create_repo(self, name: str, **kwargs: object) -> None:
            raise httpx2.ConnectError("no route")

    monkeypatch.setattr("mmtune.release.push.HfApi", Api)
    assert entry_point(["push", str(release), "me/model", "--upload"]) == 2
    assert "me/model: cannot reach the hub: no route" in capsys.readouterr().err
    assert set(check_manifest(release)) == {"README.md", "adapter/a.txt", "manifest.json"}
