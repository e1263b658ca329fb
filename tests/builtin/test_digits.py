"""The digits data set: an honest split, the same bytes every time, and answers that are right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

import mmtune.builtin.digits as digits
from mmtune.builtin.digits import ANSWER_MARK, POSITIONS, SPLITS, digit_images, write_digits
from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.evaluation.metrics import final_answer
from mmtune.recipe.recipe import Source

SCENES = 80


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    return {name: dataclasses.replace(part, scenes=SCENES) for name, part in SPLITS.items()}


@pytest.fixture(scope="module")
def folder(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part, with fewer scenes."""
    out = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SPLITS", small)
        assert write_digits(out, tuple(small)) == dict.fromkeys(small, SCENES)
    return out


def _rows(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return rows


def test_no_held_out_digit_is_in_training_by_its_pixels() -> None:
    """By pixel content, not by index: the source holds no duplicates, so the two sides share no picture at all."""
    (train, train_labels), (held_out, held_out_labels) = digit_images(False), digit_images(True)
    pixels = [{image.tobytes() for image in side} for side in (train, held_out)]
    source = load_digits().images
    assert len({image.tobytes() for image in source}) == len(source) == 1797
    assert (len(train), len(held_out)) == (1438, 359) == (len(pixels[0]), len(pixels[1]))
    assert not pixels[0] & pixels[1]
    assert pixels[0] | pixels[1] == {image.tobytes() for image in source}
    for labels in (train_labels, held_out_labels):
        assert np.bincount(labels, minlength=10).min() > 20


def test_scenes_are_drawn_from_their_own_side(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {held_out: {image.tobytes() for image in digit_images(held_out)[0]} for held_out in (False, True)}
    drawn: set[bytes] = set()
    draw = digits.draw_scene
    monkeypatch.setattr(digits, "draw_scene", lambda four, rng: drawn.update(d.tobytes() for d in four) or draw(four, rng))
    for name, part in small.items():
        drawn.clear()
        digits.write_split(name, part, tmp_path)
        assert drawn and drawn <= sides[name.endswith("eval")], name
        assert part.held_out == name.endswith("eval")


def test_the_same_parts_are_the_same_bytes(
    small: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "SPLITS", small)
    np.random.seed(5)  # whatever the global state
    write_digits(tmp_path, ("eval", "tune"))
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 2 * (SCENES + 1)
    for file in files:
        first, again = ((root / file).read_bytes() for root in (folder, tmp_path))
        assert hashlib.sha256(first).digest() == hashlib.sha256(again).digest(), file


def test_fewer_scenes_are_the_first_of_more(folder: Path, small: dict[str, Any], tmp_path: Path) -> None:
    """So what the tests see of a part is what the quickstart begins with."""
    assert digits.write_split("eval", dataclasses.replace(small["eval"], scenes=9), tmp_path) == _rows(folder, "eval")[:9]


def _named(question: str) -> list[str]:
    return re.findall("|".join(POSITIONS), question)


def _answer(question: str, shown: list[int]) -> str:
    """The whole answer by another road than the code's: from the words of the question."""
    at = dict(zip(POSITIONS, shown, strict=True))
    named = [at[position] for position in _named(question)]
    asked = [int(word) for word in re.findall(r"\d", question)]
    if question.startswith("Repeat: "):
        return question.removeprefix("Repeat: ")
    read, conclusion = shown, ""
    if question.startswith("Is there"):
        conclusion = "yes" if str(asked[0]) in "".join(map(str, shown)) else "no"
    elif question.startswith("How many"):
        conclusion = str(sum(value == asked[0] for value in shown))
    elif question.startswith("Are the"):
        read, conclusion = named, "yes" if named[0] - named[1] == 0 else "no"
    elif "larger" in question:
        read, conclusion = named, str(sorted(named)[-1])
    elif question.startswith("Read the digits. Name"):
        conclusion = str(named[0])
    if conclusion:
        spelled = [str(digit) for digit in read]
        if read is shown and asked:  # each digit is read and judged
            spelled = [f"{digit} {['no', 'yes'][digit == asked[0]]}" for digit in read]
        return f"{' '.join(spelled)}. {ANSWER_MARK} {conclusion}"
    if question.startswith("Where"):
        return ", ".join(position for position in POSITIONS if at[position] == asked[0])
    for line, member in (("top row", "top"), ("bottom row", "bottom"), ("left column", "left"), ("right column", "right")):
        if line in question:
            return " ".join(str(at[position]) for position in POSITIONS if member in position)
    return str(named[0]) if named else " ".join(map(str, shown))


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in row["conversations"]]
    return [(question.removeprefix("<image>\n"), answer) for question, answer in zip(values[::2], values[1::2], strict=True)]


@pytest.mark.parametrize("part", ["tune", "eval"])
def test_conclusions_follow_from_the_reading_before_them(folder: Path, part: str) -> None:
    for row in _rows(folder, part):
        for question, answer in _turns(row):
            reading = [int(digit) for digit in re.findall(r"\d", answer.partition(".")[0])]
            assert len(reading) in (2, 4)
            if len(reading) == 2:  # of the two that the question names
                pair = dict(zip(_named(question), reading, strict=True))
                reading = [pair.get(position, 0) for position in POSITIONS]
            assert answer == _answer(question, reading), question
            assert final_answer(answer, ANSWER_MARK) == answer.rpartition(" ")[2]


@pytest.mark.parametrize("part", SPLITS)
def test_answers_are_right_for_the_digits_that_were_drawn(
    folder: Path, small: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digit_images(small[part].held_out)
    label_of = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    scenes: list[list[int]] = []
    draw = digits.draw_scene
    monkeypatch.setattr(
        digits, "draw_scene", lambda four, rng: scenes.append([label_of[d.tobytes()] for d in four]) or draw(four, rng)
    )
    rows = digits.write_split(part, small[part], tmp_path)
    assert rows == _rows(folder, part)
    for row, shown in zip(rows, scenes, strict=True):
        for question, answer in _turns(row):
            assert answer == _answer(question, shown), question


@pytest.mark.parametrize(("train", "held_out"), [("read", "read_eval"), ("words", "words_eval"), ("tune", "eval")])
def test_every_task_is_trained_and_held_out(folder: Path, train: str, held_out: str) -> None:
    asked = [row["task"] for row in _rows(folder, held_out)]
    assert {row["task"] for row in _rows(folder, train)} == set(asked) == set(SPLITS[train].tasks) == set(SPLITS[held_out].tasks)
    counts = [asked.count(task) for task in set(asked)]
    assert max(counts) - min(counts) <= 1
    assert SPLITS[held_out].questions == 1 and SPLITS[held_out].held_out and not SPLITS[train].held_out


def test_tuning_teaches_what_the_base_was_not_taught() -> None:
    before = {*SPLITS["read"].tasks, *SPLITS["words"].tasks}
    assert before.isdisjoint(SPLITS["tune"].tasks)
    assert before.union(SPLITS["tune"].tasks) == set(digits.TASKS)
    assert len({part.seed for part in SPLITS.values()}) == len(SPLITS)


@pytest.mark.parametrize("part", SPLITS)
def test_the_llava_template_reads_every_row(folder: Path, part: str) -> None:
    samples = list(iterate_rows(IndexedSamples([Source(path=str(folder / f"{part}.json"), template="llava")])))
    rows = _rows(folder, part)
    assert [sample.task for sample in samples] == [row["task"] for row in rows]
    assert [sample.images for sample in samples] == [[folder / row["image"]] for row in rows]
    assert all(len(sample.messages) == 2 * SPLITS[part].questions for sample in samples)
