"""The record of the first batch has the tokens, labels and padding of the batch, and the images of its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_processors as families
import pytest
from PIL import Image

from mmtune.data.batching.collate import collate, pack
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_sample
from mmtune.data.message import Sample
from mmtune.recipe.recipe import DataSection
from mmtune.report.first_batch import record_first_batch


def _sample(number: int, image: Path | None, words: int) -> Sample:
    content: list[dict[str, Any]] = [{"type": "image", "image": image}] if image else []
    question = {"role": "user", "content": [*content, {"type": "text", "text": "What? " * words}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": f"It is </script> {number}."}]}
    return Sample(f"row[{number}]", [question, answer])


def _section(**changes: Any) -> DataSection:
    return DataSection.model_validate({"train": [{"path": "rows.json", "template": "llava"}], **changes})


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_record_is_the_batch(tmp_path: Path, family: str, packed: bool) -> None:
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "a.png")
    processor = families.FAMILIES[family]()
    samples = [_sample(0, tmp_path / "a.png", 5), _sample(1, None, 1), _sample(2, tmp_path / "a.png", 1)]
    encoded = [encode_sample(sample, processor) for sample in samples]
    batch = pack(encoded) if packed else collate(encoded, 0)
    path = tmp_path / "first_batch.json"
    rows = [sample.id for sample in samples]
    record_first_batch(path, processor, _section(), batch, rows, {sample.id: sample for sample in samples})
    record = json.loads(path.read_text())
    assert [row["row"] for row in record["rows"]] == rows and record["packed"] == packed
    assert [len(row["images"]) for row in record["rows"]] == [1, 0, 1]
    width = max(each["input_ids"].shape[1] for each in encoded)
    for row, tensors in zip(record["rows"], encoded, strict=True):
        ids, labels = tensors["input_ids"][0].tolist(), tensors["labels"][0].tolist()
        tokens = [
            (int(number), kind) for kind, run in row["runs"] for token in run for number in token["ids"].split() * token["times"]
        ]
        padding = 0 if packed else width - len(ids)
        assert [number for number, _ in tokens] == ids + [0] * padding
        assert [kind == "padding" for _, kind in tokens] == [False] * len(ids) + [True] * padding
        assert [kind == "supervised" for _, kind in tokens] == [label != IGNORE_INDEX for label in labels] + [False] * padding
        image = getattr(processor, "image_token_id", None)
        assert all(kind == "media" for number, kind in tokens if number == image)
        assert f"{sum(label != IGNORE_INDEX for label in labels)} of them supervised, {padding} padding" in row["summary"]


def test_long_rows_and_large_batches_are_cut_with_a_number(tmp_path: Path) -> None:
    processor = families.FAMILIES["llava"]()
    samples = [_sample(number, None, 1200) for number in range(10)]
    encoded = [encode_sample(sample, processor) for sample in samples]
    path = tmp_path / "first_batch.json"
    record_first_batch(path, processor, _section(), collate(encoded, 0), [sample.id for sample in samples], {})
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 8 and record["sequences"] == 10
    assert sum(len(run) for _, run in record["rows"][0]["runs"]) == 2001
    assert record["rows"][0]["runs"][-1][1][0]["text"].endswith(" more tokens")
    assert record["rows"][0]["images_known"] is False  # the sample is not known
    assert path.stat().st_size < 2_000_000
