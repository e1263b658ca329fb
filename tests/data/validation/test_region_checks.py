"""Checks of regions: rows that contradict the declared convention are named, and so is the convention that fits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.cli.main import entry_point
from mmtune.data.validation.issues import Issue
from mmtune.data.validation.validate import Validator
from mmtune.recipe.recipe import Source

TEMPLATE = """description: regions
SECTION: {value: "{{ at }}", DECLARED}
messages:
  - {role: user, images: ["{{ image }}"], text: "Where?"}
  - {role: assistant, text: "{{ KIND | thousandths }}"}
example: {image: a.png, at: [0, 0, 1, 1]}
"""
KINDS = {"boxes": "box", "points": "point", "quads": "quad"}


def _check(
    folder: Path, declared: str, values: list[Any], section: str = "boxes", size: tuple[int, int] = (1600, 1200)
) -> list[Issue]:
    Image.new("RGB", size).save(folder / "a.png")
    text = TEMPLATE.replace("SECTION", section).replace("DECLARED", declared).replace("KIND", KINDS[section])
    (folder / "t.yaml").write_text(text, encoding="utf-8")
    lines = [json.dumps({"image": "a.png", "at": value}) for value in values]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = Source(path=str(folder / "rows.jsonl"), template=str(folder / "t.yaml"), media_root=str(folder))
    return [issue for issue in Validator([source]).issues(processes=1) if issue.issue.startswith("box_")]


def _boxes(layout: str, scale: tuple[float, float]) -> list[list[float]]:
    """Boxes anywhere in an image, in a convention."""
    chosen, boxes = random.Random(0), []
    for _ in range(40):
        (x1, x2), (y1, y2) = (sorted(chosen.sample(range(1000), 2)) for _ in range(2))
        x1, x2, y1, y2 = (
            number * side / 1000 for number, side in zip((x1, x2, y1, y2), (*scale[:1] * 2, *scale[1:] * 2), strict=True)
        )
        boxes.append(
            {
                "xyxy": [x1, y1, x2, y2],
                "xywh": [x1, y1, x2 - x1, y2 - y1],
                "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1],
                "yxyx": [y1, x1, y2, x2],
            }[layout]
        )
    return boxes


@pytest.mark.parametrize(
    ("layout", "scale", "declared", "expected"),
    [
        ("cxcywh", (1, 1), "layout: xywh", "unit: fractions, layout: cxcywh"),
        ("xyxy", (1600, 1200), "layout: xyxy, unit: thousandths", "unit: pixels, layout: xyxy"),
        ("xyxy", (1600, 1200), "layout: xywh", "unit: pixels, layout: xyxy"),
        ("xywh", (1600, 1200), "layout: xyxy", "unit: pixels, layout: xywh"),
        ("cxcywh", (1600, 1200), "layout: xywh", "unit: pixels, layout: cxcywh"),
        ("yxyx", (1600, 1200), "layout: xyxy", "unit: pixels, layout: yxyx"),
        (
            "xyxy",
            (100, 100),
            "layout: xyxy, unit: fractions",
            "unit: percent, layout: xyxy or unit: pixels, layout: xyxy or unit: thou",
        ),
        ("xyxy", (1000, 1000), "layout: xyxy, unit: percent", "unit: pixels, layout: xyxy or unit: thousandths, layout: xyxy"),
        ("xyxy", (1, 1), "layout: xyxy, size: '{{ [1344, 1008] }}'", "unit: fractions, layout: xyxy"),
    ],
)
def test_the_convention_that_fits_is_named(
    layout: str, scale: tuple[float, float], declared: str, expected: str, tmp_path: Path
) -> None:
    issues = _check(tmp_path, declared, _boxes(layout, scale))
    *faulty, summary = issues
    assert summary.issue == "box_convention" and summary.severity == "warning"
    assert {issue.severity for issue in faulty} == {"error"} and summary.row == faulty[0].row
    assert summary.detail.startswith(f"{len(faulty)} of 40 compared rows contradict unit: ")
    assert f"; 40 rows fit {expected}" in summary.detail
    assert {issue.row for issue in faulty} <= {f"rows.jsonl:{number}" for number in range(1, 41)}


def test_rows_in_the_declared_convention_have_no_issue(tmp_path: Path) -> None:
    for layout, scale, declared in (
        ("cxcywh", (1, 1), "layout: cxcywh, unit: fractions"),
        ("yxyx", (1000, 1000), "layout: yxyx, unit: thousandths"),
        ("xyxy", (1344, 1008), "layout: xyxy, size: '{{ [1344, 1008] }}'"),
    ):
        assert _check(tmp_path, declared, _boxes(layout, scale)) == []


def test_a_few_faulty_rows_are_named_without_another_convention(tmp_path: Path) -> None:
    faults = {3: [9, 9, 9, 50], 7: [0, 0, 1601, 5], 12: [0, 0, 5], 20: [0.1, 0.2, 0.3, 0.4]}
    boxes = [faults.get(number, box) for number, box in enumerate(_boxes("xyxy", (1600, 1200)))]
    issues = _check(tmp_path, "layout: xyxy", boxes)
    assert {(issue.row, issue.issue) for issue in issues} == {
        ("rows.jsonl:4", "box_malformed"),
        ("rows.jsonl:8", "box_outside"),
        ("rows.jsonl:13", "box_malformed"),
        ("rows.jsonl:21", "box_unit"),
    }


def test_some_rows_of_a_large_source_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtune.data.validation.region_checks.COMPARED_ROWS", 10)
    *faulty, summary = _check(tmp_path, "layout: xywh", [[0.1, 0.2, 0.3, 0.4]] * 40)
    assert len(faulty) == 40
    assert summary.detail.startswith("10 of 10 compared rows contradict unit: pixels, layout: xywh; 10 rows fit unit: fractions")


def test_rows_that_no_convention_fits(tmp_path: Path) -> None:
    boxes = [[5000, 5000, 1, 1] if number % 2 else box for number, box in enumerate(_boxes("xyxy", (1600, 1200)))]
    *_, summary = _check(tmp_path, "layout: xyxy", boxes)
    assert summary.detail == (
        "20 of 40 compared rows contradict unit: pixels, layout: xyxy; no convention fits the rows: the best one, "
        "unit: pixels, layout: xyxy, fits 20"
    )


@pytest.mark.parametrize(
    ("section", "value", "declared", "expected"),
    [
        ("points", [0.5, 0.25], "layout: xy", "unit: fractions, layout: xy"),
        ("points", [1500, 1100], "unit: thousandths", "unit: pixels, layout: xy"),
        ("quads", [0.1, 0.1, 0.3, 0.1, 0.3, 0.6, 0.1, 0.6], "unit: thousandths", "unit: fractions, layout: xyxyxyxy"),
    ],
)
def test_points_and_quadrilaterals_are_checked(
    section: str, value: list[float], declared: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *faulty, summary = _check(tmp_path, declared, [value] * 3, section)
    assert len(faulty) == 3 and f"; 3 rows fit {expected}" in summary.detail
    template, rows = str(tmp_path / "t.yaml"), str(tmp_path / "rows.jsonl")
    assert entry_point(["data", "check", rows, "--template", template, "--processes", "1"]) == 1
    printed = capsys.readouterr()
    assert "box_convention" in printed.out and "3 of 3 rows cannot train" in printed.err
