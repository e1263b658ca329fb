"""The digits data set: scenes of handwritten digits with questions and answers, in LLaVA's conversation format.

The digits are the 1,797 8x8 images of the UCI "Optical Recognition of Handwritten Digits" test set in scikit-learn
(`sklearn.datasets.load_digits`), so no download is needed. A scene shows four digits in a 2 x 2 grid. Every fifth image is held
out: only the `eval` splits show held-out images, and no training split does, including those of the built-in checkpoint.

Splits:

* `read`: first training stage of the built-in checkpoint: reading the four digits, naming a position, locating a digit.
* `words`: second stage: the same tasks, repeating words, and concluding with "Answer:". Without it, words that occur in no
  answer would have almost equal embeddings, which a small adapter could not separate.
* `read_eval`, `words_eval`: the questions of each stage about held-out digits.
* `tune`: training data of the quickstart: whether a digit is present, how often, whether two digits are equal, which is larger.
  Answers first read the digits, then conclude, so that a model of two million parameters can derive the answer.
* `eval`: the questions of `tune` about held-out digits.
* `boxes`, `boxes_eval`: scenes of four different digits, and the box of each; rows for the data template `digit_boxes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mmtune.utils.files import replace_text

T = TypeVar("T")

CELL = 16  # side of a grid cell in pixels; a scene has 2 x 2 cells
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
ANSWER_MARK = "Answer:"


@dataclass(frozen=True)
class Split:
    """One split of the data set.

    Attributes:
        scenes: the number of scenes.
        held_out: whether the scenes show held-out digits.
        tasks: the tasks of the questions, in turn.
        questions: questions per scene.
        seed: the seed of the random generator.
    """

    scenes: int
    held_out: bool
    tasks: tuple[str, ...]
    questions: int
    seed: int


READ_TASKS = ("read", "position", "row", "where")
WORD_TASKS = (*READ_TASKS, "repeat", "conclude", "repeat", "conclude")
TUNE_TASKS = ("presence", "count", "same", "larger")
SPLITS = {
    "read": Split(24_000, False, READ_TASKS, 4, seed=1),
    "words": Split(16_000, False, WORD_TASKS, 4, seed=5),
    "read_eval": Split(800, True, READ_TASKS, 1, seed=2),
    "words_eval": Split(900, True, (*READ_TASKS, "repeat", "conclude"), 1, seed=6),
    "tune": Split(8_000, False, TUNE_TASKS, 2, seed=3),
    "eval": Split(600, True, TUNE_TASKS, 1, seed=4),
}

BOX_SPLITS = {
    "boxes": Split(8_000, False, ("box",), 2, seed=7),
    "boxes_eval": Split(400, True, ("box",), 1, seed=8),
}
"""The splits with boxes. The questions of a scene are about different digits."""

INK = 64
"""The gray value, of 255, from which a pixel belongs to a digit's box."""

Corners = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels."""


def digit_images(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The digits that are held out, or the others.

    Returns:
        Images, a float array of shape (N, 8, 8) with values from 0 to 16; labels, an int array of shape (N,), from 0 to 9.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    selected = (np.arange(len(data.target)) % 5 == 4) == held_out
    return data.images[selected], data.target[selected]


def draw_scene(digits: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, list[Corners]]:
    """A grayscale scene of four digits, shape (4, 8, 8), in reading order; size, rotation and position vary slightly.

    Returns:
        The scene; the box around the pixels of each digit that are at least `INK`.
    """
    scene = Image.new("L", (2 * CELL, 2 * CELL), 0)
    boxes = []
    for index, digit in enumerate(digits):
        size = int(rng.integers(12, 16))
        glyph = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, CELL - size + 1, size=2)
        left, top = (index % 2) * CELL + int(x), (index // 2) * CELL + int(y)
        scene.paste(glyph, (left, top))
        rows, columns = (np.flatnonzero((np.asarray(glyph) >= INK).any(axis=axis)) for axis in (1, 0))
        boxes.append((left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1))
    return scene, boxes


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _read(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    question = _pick(rng, ["What digits are shown?", "Read the digits.", "Which digits are in the picture?"])
    return question, " ".join(map(str, d))


def _position(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    i = int(rng.integers(4))
    question = _pick(rng, ["Which digit is {}?", "What is the {} digit?", "Name the digit at the {}."])
    return question.format(POSITIONS[i]), str(d[i])


def _row(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    name, cells = _pick(
        rng,
        [("top row", (0, 1)), ("bottom row", (2, 3)), ("left column", (0, 2)), ("right column", (1, 3))],
    )
    return f"Which digits are in the {name}?", " ".join(str(d[i]) for i in cells)


def _where(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    digit = _pick(rng, [x for x in d if d.count(x) == 1] or [d[0]])
    positions = [POSITIONS[i] for i in range(4) if d[i] == digit]
    return f"Where is the {digit}?", ", ".join(positions)


def _with_conclusion(d: list[int], answer: str) -> str:
    return f"{' '.join(map(str, d))}. {ANSWER_MARK} {answer}"


def _compare_each(d: list[int], target: int) -> str:
    """Every digit, followed by whether it equals the target."""
    return " ".join(f"{digit} {'yes' if digit == target else 'no'}" for digit in d)


def _presence(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    absent = [x for x in range(10) if x not in d]
    target = _pick(rng, d if rng.random() < 0.5 else absent)
    question = f"Is there {'an' if target == 8 else 'a'} {target} in the picture?"
    return question, f"{_compare_each(d, target)}. {ANSWER_MARK} {'yes' if target in d else 'no'}"


def _count(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    common = max(d, key=d.count)
    target = _pick(rng, [common, _pick(rng, d), int(rng.integers(10))])
    return f"How many times does {target} appear?", f"{_compare_each(d, target)}. {ANSWER_MARK} {d.count(target)}"


def _same(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    equal = [(a, b) for a, b in pairs if d[a] == d[b]]
    a, b = _pick(rng, equal if equal and rng.random() < 0.5 else pairs)
    question = f"Are the {POSITIONS[a]} and the {POSITIONS[b]} digit the same?"
    return question, _with_conclusion([d[a], d[b]], "yes" if d[a] == d[b] else "no")


def _larger(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.choice(4, size=2, replace=False)
    question = f"Which is the larger digit, {POSITIONS[a]} or {POSITIONS[b]}?"
    return question, _with_conclusion([d[a], d[b]], str(max(d[a], d[b])))


def _conclude(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    i = int(rng.integers(4))
    return f"Read the digits. Name the {POSITIONS[i]} digit.", _with_conclusion(d, str(d[i]))


WORDS = f"""{ANSWER_MARK} yes no there is are not larger smaller than picture digit times appear which what where how many the
in of or and a an row column top bottom left right Read Name Is Which What How""".split()


def _repeat(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    words = [
        "".join(chr(97 + int(letter)) for letter in rng.integers(26, size=int(rng.integers(1, 5))))
        if rng.random() < 0.3
        else _pick(rng, [*WORDS, str(int(rng.integers(10)))])
        for _ in range(int(rng.integers(1, 6)))
    ]
    text = " ".join(words)
    return f"Repeat: {text}", text


TASKS: dict[str, Callable[[list[int], np.random.Generator], tuple[str, str]]] = {
    "read": _read,
    "position": _position,
    "row": _row,
    "where": _where,
    "presence": _presence,
    "count": _count,
    "same": _same,
    "larger": _larger,
    "conclude": _conclude,
    "repeat": _repeat,
}


def _image_folder(name: str, folder: Path) -> Path:
    image_folder = folder / "images" / name
    image_folder.mkdir(parents=True, exist_ok=True)
    return image_folder


def write_split(name: str, split: Split, folder: Path) -> list[dict]:
    """Write the images of a split to `folder`/images/`name` and return its rows, in LLaVA's format plus `task`."""
    rng = np.random.default_rng(split.seed)
    images, labels = digit_images(split.held_out)
    image_folder = _image_folder(name, folder)
    rows = []
    for number in range(split.scenes):
        # Repeated digits in every second scene: independent digits rarely repeat, and almost every count would be 0 or 1.
        values = rng.integers(10, size=4)
        if rng.random() < 0.5:
            values[rng.permutation(4)[: int(rng.integers(2, 5))]] = rng.integers(10)
        chosen = [rng.choice(np.flatnonzero(labels == value)) for value in values]
        digits = [int(value) for value in values]
        draw_scene(images[chosen], rng)[0].save(image_folder / f"{number:05d}.png")
        offset = number % len(split.tasks)
        tasks = [split.tasks[(offset + turn) % len(split.tasks)] for turn in range(split.questions)]
        turns: list[dict[str, str]] = []
        for task in tasks:
            question, answer = TASKS[task](digits, rng)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append(
            {
                "id": f"{name}-{number:05d}",
                "image": f"images/{name}/{number:05d}.png",
                "task": tasks[0],
                "conversations": turns,
            }
        )
    return rows


def write_box_split(name: str, split: Split, folder: Path) -> list[dict]:
    """Write the images of a split to `folder`/images/`name` and return its rows: digits of the scene and their boxes."""
    rng = np.random.default_rng(split.seed)
    images, labels = digit_images(split.held_out)
    image_folder = _image_folder(name, folder)
    rows = []
    for number in range(split.scenes):
        values = rng.choice(10, size=4, replace=False)
        chosen = [rng.choice(np.flatnonzero(labels == value)) for value in values]
        scene, boxes = draw_scene(images[chosen], rng)
        scene.save(image_folder / f"{number:05d}.png")
        asked = [int(index) for index in rng.permutation(4)[: split.questions]]
        rows.append(
            {
                "id": f"{name}-{number:05d}",
                "image": f"images/{name}/{number:05d}.png",
                "scene": [int(value) for value in values],
                "digits": [int(values[index]) for index in asked],
                "boxes": [list(boxes[index]) for index in asked],
            }
        )
    return rows


def write_digits(folder: Path, splits: Sequence[str] = ("tune", "eval")) -> dict[str, int]:
    """Write splits as `folder`/NAME.json with their images; returns the number of rows of each split.

    The files are byte-identical on every machine with the same numpy, Pillow and scikit-learn.
    """
    counts = {}
    for name in splits:
        rows = write_box_split(name, BOX_SPLITS[name], folder) if name in BOX_SPLITS else write_split(name, SPLITS[name], folder)
        replace_text(folder / f"{name}.json", json.dumps(rows, indent=1))
        counts[name] = len(rows)
    return counts
