"""Scenes of real handwritten digits with questions, in LLaVA's conversation format.

The digits are the 1,797 8x8 images of the UCI "Optical Recognition of Handwritten Digits" test set that ship inside
scikit-learn (`sklearn.datasets.load_digits`), so the data set needs no download. A scene shows four of them in a
2 x 2 grid. Every fifth image is held out: `eval` and `read_eval` scenes are drawn from those alone, and no training
part, the built-in checkpoint's included, ever shows one.

Parts:

* `read`: what the built-in checkpoint learns first: reading the four digits, naming a position, finding a digit.
* `words`: what it learns next: the same, repeating words after you, and concluding with "Answer:". Without it the words
  that no answer holds would share one embedding, and no small adapter could tell them apart.
* `read_eval`, `words_eval`: questions of each about held-out digits.
* `tune`: what the quickstart teaches: whether a digit is there, how often, whether two are the same, and which is larger. An
  answer reads the digits first and then concludes, so that a model of two million parameters can be right for the right
  reason.
* `eval`: the same questions as `tune` about held-out digits.
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

CELL = 16  # pixels of one grid cell; a scene is 2 x 2 cells
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
ANSWER_MARK = "Answer:"


@dataclass(frozen=True)
class Split:
    """One file of the data set: how many scenes, from which digits, asked which tasks."""

    scenes: int
    held_out: bool
    tasks: tuple[str, ...]
    questions: int  # turns in a conversation
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


def digit_images(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The digits of one side of the split.

    Returns:
        images: float array (N, 8, 8), 0 to 16 as in the source.
        labels: int array (N,), 0 to 9.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    mine = (np.arange(len(data.target)) % 5 == 4) == held_out
    return data.images[mine], data.target[mine]


def draw_scene(digits: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Four digits (4, 8, 8) in reading order on one grey-level canvas; size, tilt and place vary a little."""
    scene = Image.new("L", (2 * CELL, 2 * CELL), 0)
    for index, digit in enumerate(digits):
        size = int(rng.integers(12, 16))
        glyph = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        glyph = glyph.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
        x, y = rng.integers(0, CELL - size + 1, size=2)
        scene.paste(glyph, ((index % 2) * CELL + int(x), (index // 2) * CELL + int(y)))
    return scene


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
    wanted = _pick(rng, [x for x in d if d.count(x) == 1] or [d[0]])
    places = [POSITIONS[i] for i in range(4) if d[i] == wanted]
    return f"Where is the {wanted}?", ", ".join(places)


def _concluding(d: list[int], answer: str) -> str:
    return f"{' '.join(map(str, d))}. {ANSWER_MARK} {answer}"


def _each(d: list[int], wanted: int) -> str:
    """Every digit as it is read, and whether it is the one that was asked for."""
    return " ".join(f"{digit} {'yes' if digit == wanted else 'no'}" for digit in d)


def _presence(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    absent = [x for x in range(10) if x not in d]
    wanted = _pick(rng, d if rng.random() < 0.5 else absent)
    question = f"Is there {'an' if wanted == 8 else 'a'} {wanted} in the picture?"
    return question, f"{_each(d, wanted)}. {ANSWER_MARK} {'yes' if wanted in d else 'no'}"


def _count(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    common = max(d, key=d.count)
    wanted = _pick(rng, [common, _pick(rng, d), int(rng.integers(10))])
    return f"How many times does {wanted} appear?", f"{_each(d, wanted)}. {ANSWER_MARK} {d.count(wanted)}"


def _same(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    equal = [(a, b) for a, b in pairs if d[a] == d[b]]
    a, b = _pick(rng, equal if equal and rng.random() < 0.5 else pairs)
    question = f"Are the {POSITIONS[a]} and the {POSITIONS[b]} digit the same?"
    return question, _concluding([d[a], d[b]], "yes" if d[a] == d[b] else "no")


def _larger(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.choice(4, size=2, replace=False)
    question = f"Which is the larger digit, {POSITIONS[a]} or {POSITIONS[b]}?"
    return question, _concluding([d[a], d[b]], str(max(d[a], d[b])))


def _conclude(d: list[int], rng: np.random.Generator) -> tuple[str, str]:
    i = int(rng.integers(4))
    return f"Read the digits. Name the {POSITIONS[i]} digit.", _concluding(d, str(d[i]))


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


def write_split(name: str, part: Split, folder: Path) -> list[dict]:
    """Draw every scene of `part` under `folder`/images/`name` and return its rows, in LLaVA's format plus `task`."""
    rng = np.random.default_rng(part.seed)
    images, labels = digit_images(part.held_out)
    pictures = folder / "images" / name
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(part.scenes):
        # A repeated digit every other scene: four independent digits rarely repeat, and a count would be 1 or 0.
        values = rng.integers(10, size=4)
        if rng.random() < 0.5:
            values[rng.permutation(4)[: int(rng.integers(2, 5))]] = rng.integers(10)
        chosen = [rng.choice(np.flatnonzero(labels == value)) for value in values]
        digits = [int(value) for value in values]
        draw_scene(images[chosen], rng).save(pictures / f"{number:05d}.png")
        offset = number % len(part.tasks)
        tasks = [part.tasks[(offset + turn) % len(part.tasks)] for turn in range(part.questions)]
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


def write_digits(folder: Path, parts: Sequence[str] = ("tune", "eval")) -> dict[str, int]:
    """Write the named parts as `folder`/NAME.json with their images; returns rows per part.

    The same parts are the same bytes on every machine with the same numpy, Pillow and scikit-learn.
    """
    counts = {}
    for name in parts:
        rows = write_split(name, SPLITS[name], folder)
        replace_text(folder / f"{name}.json", json.dumps(rows, indent=1))
        counts[name] = len(rows)
    return counts
