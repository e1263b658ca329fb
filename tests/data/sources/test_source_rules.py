"""Media rules of a source in a recipe apply to the rows of that source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtune.data.dataset import IndexedSamples
from mmtune.data.message import RowError
from mmtune.recipe.recipe import Source


def _llava(image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Teal."}]
    return {"image": image, "conversations": turns}


def test_media_rules_of_a_source_apply_to_its_rows(tmp_path: Path, media: Path) -> None:
    rows = [_llava("../outside.png"), _llava("https://example.org/a.png"), _llava("a.png")]
    path = str(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(json.dumps(rows))
    confined = IndexedSamples([Source(path=path, template="llava", media_root=str(media))])
    for index, reason in ((0, "is outside media_root"), (1, "is a URL; set `allow_urls: true`")):
        with pytest.raises(RowError, match=rf"^r\.json\[{index}\]: image: .*{reason}"):
            confined[index]
    assert confined[2].images == [media / "a.png"]
    free = IndexedSamples([Source(path=path, template="llava", media_root=str(media), allow_outside_root=True)])
    assert free[0].images == [tmp_path / "outside.png"]


def test_rows_of_several_folders_keep_their_ids_apart(tmp_path: Path, media: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.jsonl").write_text(json.dumps(_llava("a.png")))
    folders = [Source(path=str(tmp_path / folder), template="llava", media_root=str(media)) for folder in ("x", "y")]
    assert [sample.id for sample in IndexedSamples(folders)] == [f"{tmp_path}/x/r.jsonl:1", f"{tmp_path}/y/r.jsonl:1"]
    one = IndexedSamples([Source(path=f"{tmp_path}/*/r.jsonl", template="llava", media_root=str(media))])
    assert [sample.id for sample in one] == ["x/r.jsonl:1", "y/r.jsonl:1"]
