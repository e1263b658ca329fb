"""Clusters of held-out rows: rows about one image or document, whatever its path, and whatever few-shot examples come before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtune.data.dataset import IndexedSamples
from mmtune.data.message import RowError, Sample
from mmtune.evaluation.evaluate import clusters_of, evaluate
from mmtune.recipe.recipe import EvaluateSection


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Images `a`, `b`, `c`, and `copy`, which has the bytes of `a`."""
    paths = {}
    for name, value in (("a", 0), ("b", 120), ("c", 240)):
        paths[name] = tmp_path / f"{name}.png"
        Image.fromarray(np.full((20, 20, 3), value, dtype=np.uint8)).save(paths[name])
    paths["copy"] = tmp_path / "copy.png"
    shutil.copy(paths["a"], paths["copy"])
    return paths


def about(row_id: str, images: list[Path], document: str | None = None) -> Sample:
    blocks: list[dict[str, Any]] = [{"type": "image", "image": path} for path in images]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    return Sample(row_id, [{"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}, answer], cluster=document)


def test_rows_with_an_image_or_document_in_common_are_one_cluster(images: dict[str, Path]) -> None:
    a, b, c, copy = (images[name] for name in ("a", "b", "c", "copy"))
    rows = [about("0", [a]), about("1", [copy]), about("2", [b, copy]), about("3", [b]), about("4", [c]), about("5", [])]
    assert clusters_of(rows, [0] * 6) == [str(a)] * 4 + [str(c), "5"]
    documents = [about("0", [], "1"), about("1", [], "1"), about("2", [], "1"), about("3", [c], "2"), about("4", [c])]
    assert clusters_of(documents, [0, 0, 1, 1, 1]) == ["1", "1", "1 (source 2)", "2", "2"]
    with pytest.raises(RowError, match="0: image: "):
        clusters_of([about("0", [a.with_name("none.png")])], [0])


def test_few_shot_examples_change_no_cluster(images: dict[str, Path], tmp_path: Path, answering_llava: tuple[Any, Any]) -> None:
    rows = [
        {
            "images": [f"{name}.png"],
            "messages": [{"role": "user", "content": f"<image>{n}?"}, {"role": "assistant", "content": "x"}],
        }
        for name in ("a", "b", "c")
        for n in range(2)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = {"path": str(tmp_path / "rows.json"), "template": "messages"}
    sections = [
        EvaluateSection.model_validate({"data": [{**source, **shots}], "max_new_tokens": 1, "cache": False})
        for shots in ({}, {"shots": {"path": str(tmp_path / "rows.json"), "count": 2}})
    ]
    assert all(len(sample.images) == 3 for sample in (IndexedSamples(sections[1].sources)[n] for n in range(6)))
    plain, shown = (evaluate(*answering_llava, section) for section in sections)
    expected = [str(images[name]) for name in ("a", "a", "b", "b", "c", "c")]
    assert [answer.cluster for answer in plain] == [answer.cluster for answer in shown] == expected
    assert [answer.images for answer in shown] == [(image,) for image in expected]
