"""Boxes as text: closed forms, and errors for boxes outside the image."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, text_of
from mmtune.data.sources.reader import SourceReader
from mmtune.data.templates.boxes import Box, fractions, pixels, read_boxes, thousandths
from mmtune.data.templates.template import DataTemplate
from mmtune.recipe.recipe import Source

SIZE = (640, 480)


@pytest.mark.parametrize(
    ("value", "layout", "thousand", "share", "pixel"),
    [
        ([0, 0, 640, 480], "xywh", "[0, 0, 1000, 1000]", "[0.000, 0.000, 1.000, 1.000]", "[0, 0, 640, 480]"),
        ([0, 0, 640, 480], "xyxy", "[0, 0, 1000, 1000]", "[0.000, 0.000, 1.000, 1.000]", "[0, 0, 640, 480]"),
        ([64, 48, 128, 240], "xywh", "[100, 100, 300, 600]", "[0.100, 0.100, 0.300, 0.600]", "[64, 48, 192, 288]"),
        ([64, 48, 128, 240], "xyxy", "[100, 100, 200, 500]", "[0.100, 0.100, 0.200, 0.500]", "[64, 48, 128, 240]"),
        # 0.32 / 640 is half a thousandth, which rounds upwards
        ([0.32, 1.5, 1.0, 2.0], "xyxy", "[1, 3, 2, 4]", "[0.001, 0.003, 0.002, 0.004]", "[0, 2, 1, 2]"),
        ([600.5, 400, 39.505, 80.01], "xywh", "[938, 833, 1000, 1000]", "[0.938, 0.833, 1.000, 1.000]", "[601, 400, 640, 480]"),
    ],
)
def test_a_box_is_written_in_each_convention(value: Any, layout: Any, thousand: str, share: str, pixel: str) -> None:
    [box] = read_boxes(value, layout, SIZE)
    assert (thousandths(box), fractions(box), pixels(box)) == (thousand, share, pixel)


def test_fractions_have_the_requested_digits() -> None:
    assert fractions(Box(64, 48, 128, 240, 640, 480), 2) == "[0.10, 0.10, 0.20, 0.50]"


def test_several_boxes_keep_their_order() -> None:
    boxes = read_boxes([[0, 0, 1, 1], (2, 2, 3, 3)], "xyxy", SIZE)
    assert [pixels(box) for box in boxes] == ["[0, 0, 1, 1]", "[2, 2, 3, 3]"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(1, 4000), height=st.integers(1, 3000))
def test_a_box_of_whole_pixels_is_exact(data: st.DataObject, width: int, height: int) -> None:
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    [box] = read_boxes([x1, y1, x2, y2], "xyxy", (width, height))
    assert pixels(box) == str([x1, y1, x2, y2])
    assert read_boxes([x1, y1, x2 - x1, y2 - y1], "xywh", (width, height)) == [box]
    exact = [Fraction(1000 * x, side) for x, side in ((x1, width), (y1, height), (x2, width), (y2, height))]
    written = [int(number) for number in thousandths(box)[1:-1].split(", ")]
    assert all(abs(number - share) <= Fraction(1, 2) for number, share in zip(written, exact, strict=True))


@pytest.mark.parametrize(
    ("value", "layout", "reason"),
    [
        ([0, 0, 641, 480], "xywh", "is partly outside the image of 640 x 480 pixels"),
        ([0, 0, 640, 480.02], "xyxy", "partly outside"),
        ([-1, 0, 10, 10], "xywh", "partly outside"),
        ([10, 10, 0, 5], "xywh", "positive width and height"),
        ([10, 10, 5, 20], "xyxy", "positive width and height"),
        ([1, 2, 3], "xywh", "expected a box of four numbers"),
        ([1, 2, 3, "4"], "xywh", "expected a box of four numbers"),
        ([1, 2, 3, True], "xywh", "expected a box of four numbers"),
        ([1, 2, 3, float("nan")], "xywh", "expected a box of four numbers"),
        ([1, 2, 3, float("inf")], "xywh", "expected a box of four numbers"),
        ([1, 2, 3, 10**400], "xywh", "expected a box of four numbers"),
        ([], "xywh", "expected a box of four numbers"),
        (None, "xywh", "expected a box of four numbers, got None"),
        ([[0, 0, 1, 1], [0, 0, 641, 1]], "xyxy", "partly outside"),
    ],
)
def test_invalid_boxes_are_rejected(value: Any, layout: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_boxes(value, layout, SIZE)


def _template(answer: str, images: str = "{{ image }}") -> DataTemplate:
    turns = [{"role": "user", "images": [images], "text": "where?"}, {"role": "assistant", "text": answer}]
    boxes = {"value": "{{ bbox }}", "layout": "xywh"}
    return DataTemplate.model_validate({"description": "d", "messages": turns, "boxes": boxes, "example": {}})


def test_a_box_is_of_the_upright_image(tmp_path: Path) -> None:
    """A picture of 40 x 20 that its EXIF tag turns by a quarter is 20 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    row = {"image": "turned.jpg", "bbox": [0, 20, 20, 20]}
    rules = MediaRules(tmp_path)
    assert text_of(_template("{{ box | thousandths }}").sample("r", row, rules).messages[1]) == "[0, 500, 1000, 1000]"
    with pytest.raises(RowError, match=r"^r: boxes: .* is partly outside the image of 20 x 40 pixels"):
        _template("{{ box | thousandths }}").sample("r", {**row, "bbox": [0, 0, 40, 20]}, rules)


def test_boxes_in_jinja(media: Path) -> None:
    row = {"image": "a.png", "bbox": [[0, 0, 10, 12], [20, 12, 20, 12]]}  # 40 x 24
    rules = MediaRules(media)
    listed = "{% for box in boxes %}{{ box | fractions(2) }} {% endfor %}{{ box | pixels }} {{ box.x2 }}"
    text = text_of(_template(listed).sample("r", row, rules).messages[1])
    assert text == "[0.00, 0.00, 0.25, 0.50] [0.50, 0.50, 1.00, 1.00] [0, 0, 10, 12] 10"
    for answer, reason in {
        "{{ box }}": "expected text or a number, got a box; use a filter",
        "{{ bbox | pixels }}": "the template fails at line 1: expected a box declared in the template's 'boxes', got list",
    }.items():
        with pytest.raises(RowError, match=rf"^r: messages\[1\]: {reason}"):
            _template(answer).sample("r", row, rules)
    with pytest.raises(RowError, match=r"^r: boxes: expected one image in a row with boxes, got 2"):
        _template("x", "{{ [image, image] }}").sample("r", row, rules)
    with pytest.raises(RowError, match=r"^r: boxes: 'bbox' is undefined"):
        _template("x").sample("r", {"image": "a.png"}, rules)


def test_a_box_of_each_round_and_what_reaches_out_of_the_image_clipped(media: Path) -> None:
    turns = [{"role": "user", "images": ["{{ image }}"], "text": "where?"}, {"role": "assistant", "text": "{{ box | pixels }}"}]
    boxes = {"value": "{{ thing.at }}", "layout": "xywh"}
    template = {"description": "d", "messages": turns, "boxes": boxes, "repeat": {"thing": "things"}, "example": {}}
    row = {"image": "a.png", "things": [{"at": [0, 0, 10, 12]}, {"at": [-3, 20, 20, 20]}]}  # 40 x 24
    with pytest.raises(RowError, match="is partly outside the image of 40 x 24"):
        DataTemplate.model_validate(template).sample("r", row, MediaRules(media))
    clips = DataTemplate.model_validate(template | {"boxes": boxes | {"outside": "clip"}})
    sample = clips.sample("r", row, MediaRules(media))
    assert [text_of(message) for message in sample.messages[1::2]] == ["[0, 0, 10, 12]", "[0, 20, 17, 24]"]
    with pytest.raises(RowError, match="is entirely outside the image of 40 x 24"):
        clips.sample("r", {**row, "things": [{"at": [40, 0, 5, 5]}]}, MediaRules(media))


def test_rows_with_nothing_to_repeat_are_skipped_if_the_template_allows_it(tmp_path: Path) -> None:
    rows = [{"n": number, "things": things} for number, things in enumerate([[], ["a"], [], ["b", "c"], None])]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    turns = [{"role": "user", "text": "what?"}, {"role": "assistant", "text": "{{ thing }}"}]
    template = {"description": "d", "messages": turns, "repeat": {"thing": "things"}, "leave_out_empty": "things", "example": {}}
    (tmp_path / "t.yaml").write_text(json.dumps(template))
    reader = SourceReader(Source(path=str(tmp_path / "rows.json"), template=str(tmp_path / "t.yaml")))
    opened = reader.open()
    row_ids = [opened[index][0] for index in range(len(opened))]
    assert row_ids == [parse()[0] for parse in reader.stream()] == ["rows.json[1]", "rows.json[3]", "rows.json[4]"]
    with pytest.raises(RowError, match="things: expected a non-empty list"):
        reader.sample(*opened[2])
