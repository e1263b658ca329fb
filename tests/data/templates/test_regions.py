"""Regions of rows in each convention as text: closed forms, and errors for impossible numbers."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, text_of
from mmtune.data.sources.reader import SourceReader
from mmtune.data.templates.regions import Region, RowConvention, fractions, pixels, read_regions, thousandths
from mmtune.data.templates.template import DataTemplate, load_data_template
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
    [box] = read_regions(value, RowConvention("box", layout), SIZE)
    assert (thousandths(box), fractions(box), pixels(box)) == (thousand, share, pixel)


@pytest.mark.parametrize(
    ("kind", "layout", "unit", "value"),
    [
        ("box", "xyxy", "pixels", [64, 48, 192, 288]),
        ("box", "xywh", "pixels", [64, 48, 128, 240]),
        ("box", "cxcywh", "pixels", [128, 168, 128, 240]),
        ("box", "yxyx", "pixels", [48, 64, 288, 192]),
        ("box", "xyxy", "pixels", [[64, 48], [192, 288]]),
        ("box", "xyxy", "fractions", [0.1, 0.1, 0.3, 0.6]),
        ("box", "xywh", "fractions", [0.1, 0.1, 0.2, 0.5]),
        ("box", "cxcywh", "fractions", [0.2, 0.35, 0.2, 0.5]),
        ("box", "yxyx", "fractions", [0.1, 0.1, 0.6, 0.3]),
        ("box", "xywh", "percent", [10, 10, 20, 50]),
        ("box", "xyxy", "thousandths", [100, 100, 300, 600]),
        ("box", "cxcywh", "thousandths", [200, 350, 200, 500]),
        ("point", "xy", "pixels", [64, 288]),
        ("point", "yx", "fractions", [0.6, 0.1]),
        ("point", "xy", "thousandths", [100, 600]),
        ("quad", "xyxyxyxy", "pixels", [64, 48, 192, 48, 192, 288, 64, 288]),
        ("quad", "xyxyxyxy", "pixels", [[64, 48], [192, 48], [192, 288], [64, 288]]),
        ("quad", "yxyxyxyx", "percent", [10, 10, 10, 30, 60, 30, 60, 10]),
    ],
)
def test_a_convention_of_rows_is_converted(kind: Any, layout: str, unit: Any, value: Any) -> None:
    expected = {"box": "[64, 48, 192, 288]", "point": "[64, 288]", "quad": "[64, 48, 192, 48, 192, 288, 64, 288]"}[kind]
    for values in (value, [value], [value, value]):
        regions = read_regions(values, RowConvention(kind, layout, unit), SIZE)
        assert {pixels(region) for region in regions} == {expected}
        assert len(regions) == (2 if values == [value, value] else 1)
        assert {region.kind for region in regions} == {kind}


@pytest.mark.parametrize(
    ("resized", "value"), [((1280, 1280), [128, 128, 384, 768]), ((1024, 1024), [102.4, 102.4, 307.2, 614.4])]
)
def test_pixels_of_a_resized_image(resized: tuple[int, int], value: list[float], tmp_path: Path) -> None:
    [region] = read_regions(value, RowConvention("box", "xyxy"), SIZE, resized=resized)
    assert region.shares == pytest.approx((0.1, 0.1, 0.3, 0.6))
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    row = {"image": "a.png", "bbox": value, "width": resized[0], "height": resized[1]}
    template = _template("{{ box | pixels }}", declared={"layout": "xyxy", "size": "{{ [width, height] }}"})
    assert text_of(template.sample("r", row, MediaRules(tmp_path)).messages[1]) == "[64, 48, 192, 288]"
    assert {"bbox", "width", "height"} <= template.fields_read
    with pytest.raises(RowError, match=r"^r: boxes: size: expected \[width, height\] of the resized image, got \['1', 2\]"):
        template.sample("r", {**row, "width": "1", "height": 2}, MediaRules(tmp_path))
    with pytest.raises(ValueError, match="'size' is of pixels and cannot be used with unit: percent; remove it"):
        _template("x", declared={"layout": "xyxy", "size": "{{ [1, 1] }}", "unit": "percent"})


@pytest.mark.parametrize(
    ("kind", "layout", "unit", "value", "reason"),
    [
        (
            "box",
            "xyxy",
            "thousandths",
            [100, 100, 300, 1001],
            "thousandths, xyxy) is partly outside the image, whose thousandths are 0 to",
        ),
        ("box", "xywh", "fractions", [0.5, 0.5, 0.6, 0.1], "is partly outside the image, whose fractions are 0 to 1"),
        ("box", "cxcywh", "fractions", [0.1, 0.5, 0.4, 0.1], "is partly outside"),
        ("box", "xyxy", "pixels", [0.1, 0.2, 0.5, 1], "has no number above 1: expected pixels, got what looks like fractions"),
        ("box", "xyxy", "thousandths", [0.1, 0.2, 0.5, 0.6], "expected thousandths, got what looks like fractions"),
        ("box", "yxyx", "pixels", [0, 500, 640, 600], "is partly outside the image of 640 x 480"),
        ("box", "xyxy", "fractions", [0.5, 0.5, 0.5, 0.6], "positive width and height"),
        ("point", "xy", "pixels", [640, 480.5], "is outside the image of 640 x 480 pixels"),
        ("point", "xy", "pixels", [1, 2, 3], "expected a point of two finite numbers"),
        ("quad", "xyxyxyxy", "pixels", [0, 0, 9, 0, 0, 9, 9, 9], "whose corners follow each other"),  # the last two are swapped
        ("quad", "xyxyxyxy", "pixels", [0, 0, 9, 0, 18, 0, 27, 0], "expected a quadrilateral with an area"),
        ("quad", "xyxyxyxy", "pixels", [0, 0, 9, 0, 9, 9], "expected a quadrilateral of eight finite numbers"),
        ("quad", "xyxyxyxy", "pixels", [[0, 0], [9, 0], [9, 9]], "expected a quadrilateral of eight finite numbers"),
        ("quad", "xyxyxyxy", "pixels", [600, 0, 641, 0, 641, 9, 600, 9], "is partly outside"),
    ],
)
def test_impossible_numbers_are_rejected(kind: Any, layout: str, unit: Any, value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_regions(value, RowConvention(kind, layout, unit), SIZE)


def test_an_image_without_objects(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    listed = _template("{% for box in boxes %}{{ box | pixels }}{% else %}none{% endfor %}")
    assert text_of(listed.sample("r", {"image": "a.png", "bbox": []}, MediaRules(tmp_path)).messages[1]) == "none"
    with pytest.raises(RowError, match=r"^r: messages\[1\]: 'box' is undefined"):
        _template("{{ box | pixels }}").sample("r", {"image": "a.png", "bbox": []}, MediaRules(tmp_path))


def test_the_places_of_boxes_in_the_rows_of_ms_swift(tmp_path: Path) -> None:
    """The rows of its documentation: an error in a conversation, and read by the template of the page."""
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>Find the <ref-object>."}, {"role": "assistant", "content": "<bbox><bbox>"}]
    objects = {"ref": ["sheep", "dog"], "bbox": [[64, 48, 192, 288], [0, 0, 64, 48]]}
    row = {"messages": turns, "images": ["a.png"], "objects": objects}
    with pytest.raises(
        RowError, match=r"^r: objects: the text has <ref-object>, the place of a value of `objects`, which the data"
    ):
        load_data_template("messages").sample("r", row, MediaRules(tmp_path))
    page = (Path(__file__).parents[3] / "docs" / "data_templates.md").read_text(encoding="utf-8")
    [block] = [each for each in re.findall("```yaml\n(.*?)```", page, re.DOTALL) if "objects.bbox" in each]
    template = DataTemplate.model_validate({"description": "d", "ignore": ["messages"], "example": {}, **yaml.safe_load(block)})
    sample = template.sample("r", row, MediaRules(tmp_path))
    assert text_of(sample.messages[0]) == "Find the sheep."
    assert text_of(sample.messages[1]) == "[100, 100, 300, 600], [0, 0, 100, 100]"


def test_concave_and_turned_quadrilaterals_are_possible() -> None:
    for value in ([0, 0, 9, 0, 3, 3, 0, 9], [9, 0, 9, 9, 0, 9, 0, 0], [0, 9, 9, 9, 9, 0, 0, 0], [5, 0, 10, 5, 5, 10, 0, 5]):
        [region] = read_regions(value, RowConvention("quad", "xyxyxyxy"), SIZE)
        assert json.loads(pixels(region)) == value


def test_a_row_with_regions_of_every_kind(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    text = "{{ box | thousandths }} {{ point | thousandths }} {{ quad | fractions(1) }}"
    turns = [{"role": "user", "images": ["{{ image }}"], "text": "where?"}, {"role": "assistant", "text": text}]
    sections = {
        "boxes": {"value": "{{ bbox }}", "layout": "xywh"},
        "points": {"value": "{{ click }}", "unit": "fractions"},
        "quads": {"value": "{{ word }}", "unit": "thousandths"},
    }
    template = DataTemplate.model_validate({"description": "d", "messages": turns, **sections, "example": {}})
    word = [100, 100, 300, 100, 300, 600, 100, 600]
    sample = template.sample(
        "r", {"image": "a.png", "bbox": [64, 48, 128, 240], "click": [0.25, 0.5], "word": word}, MediaRules(tmp_path)
    )
    assert text_of(sample.messages[1]) == "[100, 100, 300, 600] [250, 500] [0.1, 0.1, 0.3, 0.1, 0.3, 0.6, 0.1, 0.6]"
    assert [region.kind for region in sample.regions] == ["box", "point", "quad"]
    with pytest.raises(RowError, match=r"^r: points: .* \(fractions, xy\) is outside the image, whose fractions are 0 to 1"):
        template.sample(
            "r", {"image": "a.png", "bbox": [64, 48, 128, 240], "click": [1.25, 0.5], "word": word}, MediaRules(tmp_path)
        )


@pytest.mark.parametrize(
    ("answer", "extent"),
    [
        ("{{ box | thousandths }}", (1000, 1000)),
        ("{{ box | fractions(1) }} or {{ boxes[0] | fractions }}", (1, 1)),
        ("{{ box | pixels }}", SIZE),
        ("{{ box | pixels }} {{ box | thousandths }}", None),
        ("a cup", None),
    ],
)
def test_the_extent_of_the_coordinates_of_an_answer(answer: str, extent: Any, tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    sample = _template(answer).sample("r", {"image": "a.png", "bbox": [0, 0, 10, 12]}, MediaRules(tmp_path))
    assert sample.extent == extent


def test_fractions_have_the_requested_digits() -> None:
    assert fractions(Region(((64, 48), (128, 240)), 640, 480), 2) == "[0.10, 0.10, 0.20, 0.50]"


def test_several_boxes_keep_their_order() -> None:
    boxes = read_regions([[0, 0, 1, 1], (2, 2, 3, 3)], RowConvention("box", "xyxy"), SIZE)
    assert [pixels(box) for box in boxes] == ["[0, 0, 1, 1]", "[2, 2, 3, 3]"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), width=st.integers(1, 4000), height=st.integers(1, 3000))
def test_a_box_of_whole_pixels_is_exact(data: st.DataObject, width: int, height: int) -> None:
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    [box] = read_regions([x1, y1, x2, y2], RowConvention("box", "xyxy"), (width, height))
    assert pixels(box) == str([x1, y1, x2, y2])
    assert read_regions([x1, y1, x2 - x1, y2 - y1], RowConvention("box", "xywh"), (width, height)) == [box]
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
        ([1, 2, 3], "xywh", "expected a box of four finite numbers"),
        ([1, 2, 3, "4"], "xywh", "expected a box of four finite numbers"),
        ([1, 2, 3, True], "xywh", "expected a box of four finite numbers"),
        ([1, 2, 3, float("nan")], "xywh", "expected a box of four finite numbers"),
        ([1, 2, 3, float("inf")], "xywh", "expected a box of four finite numbers"),
        ([1, 2, 3, 10**400], "xywh", "expected a box of four finite numbers"),
        (None, "xywh", "expected a box of four finite numbers, got None"),
        ([[0, 0, 1, 1], [0, 0, 641, 1]], "xyxy", "partly outside"),
    ],
)
def test_invalid_boxes_are_rejected(value: Any, layout: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_regions(value, RowConvention("box", layout), SIZE)


def _template(answer: str, images: str = "{{ image }}", declared: Any = None) -> DataTemplate:
    turns = [{"role": "user", "images": [images], "text": "where?"}, {"role": "assistant", "text": answer}]
    boxes = {"value": "{{ bbox }}", **(declared or {"layout": "xywh"})}
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
        "{{ bbox | pixels }}": "the template fails at line 1: expected a region declared in the template's 'boxes', .*, got list",
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
    with pytest.raises(RowError, match="is outside the image of 40 x 24"):
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
