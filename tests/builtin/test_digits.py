"""The digits data set: disjoint digits in training and evaluation, reproducible bytes, correct answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import mmtune.builtin.digits as digits
from mmtune.builtin.digits import ANSWER_MARK, POSITIONS, SPLITS, digit_images, write_digits
from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.evaluation.answers import final_answer
from mmtune.recipe.recipe import Source

SCENES = 80


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return {name: dataclasses.replace(split, scenes=SCENES) for name, split in SPLITS.items()}


@pytest.fixture(scope="module")
def folder(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every split, with fewer scenes."""
    out = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", small)
        assert write_digits(out, tuple(small)) == dict.fromkeys(small, SCENES)
    return out


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def test_no_held_out_digit_is_in_training_by_its_pixels() -> None:
    """Compares pixels, not indices: the source has no duplicates, so both sides share no image."""
    (train, train_labels), (held_out, held_out_labels) = digit_images(False), digit_images(True)
    pixels = [{image.tobytes() for image in side} for side in (train, held_out)]
    source = load_digits().images
    assert len({image.tobytes() for image in source}) == len(source) == 1797
    assert (len(train), len(held_out)) == (1438, 359) == (len(pixels[0]), len(pixels[1]))
    assert not pixels[0] & pixels[1]
    assert pixels[0] | pixels[1] == {image.tobytes() for image in source}
    for labels in (train_labels, held_out_labels):
        assert np.bincount(labels, minlength=10).min() > 20


def test_scenes_show_digits_of_their_side_only(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {held_out: {image.tobytes() for image in digit_images(held_out)[0]} for held_out in (False, True)}
    drawn: set[bytes] = set()
    draw = digits.draw_scene
    monkeypatch.setattr(digits, "draw_scene", lambda four, rng: drawn.update(d.tobytes() for d in four) or draw(four, rng))
    for name, split in small.items():
        drawn.clear()
        digits.write_split(name, split, tmp_path)
        assert drawn and drawn <= sides[name.endswith("eval")], name
        assert split.held_out == name.endswith("eval")


def test_the_files_are_reproducible(small: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SPLITS", small)
    np.random.seed(5)  # whatever the global state
    write_digits(tmp_path, ("eval", "tune"))
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 2 * (SCENES + 1)
    for file in files:
        first, again = ((root / file).read_bytes() for root in (folder, tmp_path))
        assert hashlib.sha256(first).digest() == hashlib.sha256(again).digest(), file


def test_fewer_scenes_are_the_first_of_more(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """The scenes in tests are therefore the first scenes of the quickstart."""
    assert digits.write_split("eval", dataclasses.replace(small["eval"], scenes=9), tmp_path) == _rows(folder, "eval")[:9]


def _named(question: str) -> list[str]:
    return re.findall("|".join(POSITIONS), question)


def _answer(question: str, shown: list[int]) -> str:
    """The expected answer, computed independently from the words of the question."""
    digit_at = dict(zip(POSITIONS, shown, strict=True))
    named = [digit_at[position] for position in _named(question)]
    targets = [int(word) for word in re.findall(r"\d", question)]
    if question.startswith("Repeat: "):
        return question.removeprefix("Repeat: ")
    read, conclusion = shown, ""
    if question.startswith("Is there"):
        conclusion = "yes" if str(targets[0]) in "".join(map(str, shown)) else "no"
    elif question.startswith("How many"):
        conclusion = str(sum(value == targets[0] for value in shown))
    elif question.startswith("Are the"):
        read, conclusion = named, "yes" if named[0] - named[1] == 0 else "no"
    elif "larger" in question:
        read, conclusion = named, str(sorted(named)[-1])
    elif question.startswith("Read the digits. Name"):
        conclusion = str(named[0])
    if conclusion:
        words = [str(digit) for digit in read]
        if read is shown and targets:  # each digit is followed by yes or no
            words = [f"{digit} {['no', 'yes'][digit == targets[0]]}" for digit in read]
        return f"{' '.join(words)}. {ANSWER_MARK} {conclusion}"
    if question.startswith("Where"):
        return ", ".join(position for position in POSITIONS if digit_at[position] == targets[0])
    for line, member in (("top row", "top"), ("bottom row", "bottom"), ("left column", "left"), ("right column", "right")):
        if line in question:
            return " ".join(str(digit_at[position]) for position in POSITIONS if member in position)
    return str(named[0]) if named else " ".join(map(str, shown))


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in row["conversations"]]
    return [(question.removeprefix("<image>\n"), answer) for question, answer in zip(values[::2], values[1::2], strict=True)]


@pytest.mark.parametrize("split", ["tune", "eval"])
def test_conclusions_follow_from_the_reading_before_them(folder: Path, split: str) -> None:
    for row in _rows(folder, split):
        for question, answer in _turns(row):
            reading = [int(digit) for digit in re.findall(r"\d", answer.partition(".")[0])]
            assert len(reading) in (2, 4)
            if len(reading) == 2:  # the two digits that the question names
                pair = dict(zip(_named(question), reading, strict=True))
                reading = [pair.get(position, 0) for position in POSITIONS]
            assert answer == _answer(question, reading), question
            assert final_answer(answer, ANSWER_MARK) == answer.rpartition(" ")[2]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_correct_for_the_digits_in_the_scene(
    folder: Path, small: dict[str, Any], split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digit_images(small[split].held_out)
    label_of = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    scenes: list[list[int]] = []
    draw = digits.draw_scene
    monkeypatch.setattr(
        digits, "draw_scene", lambda four, rng: scenes.append([label_of[d.tobytes()] for d in four]) or draw(four, rng)
    )
    rows = digits.write_split(split, small[split], tmp_path)
    assert rows == _rows(folder, split)
    for row, shown in zip(rows, scenes, strict=True):
        for question, answer in _turns(row):
            assert answer == _answer(question, shown), question


@pytest.mark.parametrize(("train", "held_out"), [("read", "read_eval"), ("words", "words_eval"), ("tune", "eval")])
def test_every_task_is_trained_and_held_out(folder: Path, train: str, held_out: str) -> None:
    tasks = [row["task"] for row in _rows(folder, held_out)]
    assert {row["task"] for row in _rows(folder, train)} == set(tasks) == set(SPLITS[train].tasks) == set(SPLITS[held_out].tasks)
    counts = [tasks.count(task) for task in set(tasks)]
    assert max(counts) - min(counts) <= 1
    assert SPLITS[held_out].questions == 1 and SPLITS[held_out].held_out and not SPLITS[train].held_out


def test_the_tune_split_has_only_new_tasks() -> None:
    before = {*SPLITS["read"].tasks, *SPLITS["words"].tasks}
    assert before.isdisjoint(SPLITS["tune"].tasks)
    assert before.union(SPLITS["tune"].tasks) == set(digits.TASKS)
    assert len({split.seed for split in SPLITS.values()}) == len(SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_llava_template_reads_every_row(folder: Path, split: str) -> None:
    samples = list(iterate_rows(IndexedSamples([Source(path=str(folder / f"{split}.json"), template="llava")])))
    rows = _rows(folder, split)
    assert [sample.task for sample in samples] == [row["task"] for row in rows]
    assert [sample.images for sample in samples] == [[folder / row["image"]] for row in rows]
    assert all(len(sample.messages) == 2 * SPLITS[split].questions for sample in samples)


@pytest.mark.parametrize("split", digits.BOX_SPLITS)
def test_boxes_are_around_the_digits(split: str, tmp_path: Path) -> None:
    """A box's border rows and columns have ink, and the rest of its cell, outside of the box, has none."""
    small = dataclasses.replace(digits.BOX_SPLITS[split], scenes=12)
    rows = digits.write_box_split(split, small, tmp_path)
    assert small.held_out == split.endswith("eval")
    for row in rows:
        ink = np.asarray(Image.open(tmp_path / row["image"])) >= digits.INK
        assert len(set(row["scene"])) == 4 and len(row["digits"]) == len(row["boxes"]) == small.questions
        for digit, (x1, y1, x2, y2) in zip(row["digits"], row["boxes"], strict=True):
            top, left = (digits.CELL * part for part in divmod(row["scene"].index(digit), 2))
            cell = np.zeros_like(ink)
            cell[top : top + digits.CELL, left : left + digits.CELL] = ink[top : top + digits.CELL, left : left + digits.CELL]
            assert all(edge.any() for edge in (cell[y1, x1:x2], cell[y2 - 1, x1:x2], cell[y1:y2, x1], cell[y1:y2, x2 - 1]))
            cell[y1:y2, x1:x2] = False
            assert not cell.any()


@pytest.mark.parametrize(("values", "expected"), [({}, "[125, 531, 438, 938]"), ({"convention": "pixels"}, "[4, 17, 14, 30]")])
def test_the_template_of_boxes_writes_both_conventions(values: dict[str, str], expected: str, tmp_path: Path) -> None:
    rows = digits.write_box_split("boxes", dataclasses.replace(digits.BOX_SPLITS["boxes"], scenes=1), tmp_path)
    (tmp_path / "boxes.json").write_text(json.dumps(rows), encoding="utf-8")
    source = Source(path=str(tmp_path / "boxes.json"), template="digit_boxes", values=values)
    [sample] = iterate_rows(IndexedSamples([source]))
    assert rows[0]["boxes"][0] == [4, 17, 14, 30]  # of a scene of 32 x 32 pixels
    answer = sample.messages[1]["content"][0]["text"]
    assert answer == f"6 no 5 no 9 yes 8 no Answer: {expected}"
    assert len(sample.messages) == 4
