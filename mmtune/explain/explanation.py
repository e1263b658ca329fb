"""An explanation of one answer: for each of its tokens, a score of every image cell and every word of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels; the pixels of x2 and y2 are outside."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class AnswerToken:
    """A token of the answer: its text, and the natural logarithm of its probability."""

    text: str
    log_probability: float


@dataclass(frozen=True)
class PromptWord:
    """A word of the prompt: its text, and a score for each token of the answer, in nats."""

    text: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class CellScores:
    """The scores of the cells of one image.

    Attributes:
        width, height: of the image in pixels, upright.
        scores: nats, shape (answer tokens, rows, columns).
    """

    width: int
    height: int
    scores: Scores

    def cell_box(self, row: int, column: int) -> Box:
        """The pixels of a cell."""
        _, rows, columns = self.scores.shape
        xs, ys = cell_edges(self.width, columns), cell_edges(self.height, rows)
        return xs[column], ys[row], xs[column + 1], ys[row + 1]


@dataclass(frozen=True)
class Explanation:
    """What the tokens of an answer rest on.

    A positive score says that the token is more probable with the cell or the word than without it.

    Attributes:
        method: a name of `EXPLANATION_METHODS`.
        answer: its text.
        tokens: of the answer, without its end of turn.
        images: of the conversation, in order.
        words: of the prompt, in order.
    """

    method: str
    answer: str
    tokens: tuple[AnswerToken, ...]
    images: tuple[CellScores, ...]
    words: tuple[PromptWord, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "method": self.method,
            "answer": self.answer,
            "tokens": [{"text": token.text, "log_probability": token.log_probability} for token in self.tokens],
            "images": [{"width": image.width, "height": image.height, "scores": image.scores.tolist()} for image in self.images],
            "words": [{"text": word.text, "scores": list(word.scores)} for word in self.words],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """The explanation of `to_dict`."""
        return cls(
            values["method"],
            values["answer"],
            tuple(AnswerToken(**token) for token in values["tokens"]),
            tuple(CellScores(each["width"], each["height"], np.array(each["scores"])) for each in values["images"]),
            tuple(PromptWord(each["text"], tuple(each["scores"])) for each in values["words"]),
        )


def cell_edges(length: int, cells: int) -> list[int]:
    """The edges of cells that divide a length in pixels as evenly as possible."""
    return [round(number * length / cells) for number in range(cells + 1)]


def cell_grid(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """(rows, columns) of nearly square cells for an image of a size (width, height) in pixels.

    Args:
        longer_side: the number of cells along the longer side, at most its pixels.
    """
    width, height = size
    longest = max(size)
    return max(1, round(longer_side * height / longest)), max(1, round(longer_side * width / longest))


def mass_inside(image: CellScores, scores: Scores, boxes: Sequence[Box]) -> float:
    """The share of the positive scores of an image that is inside boxes which do not overlap; NaN if no score is positive.

    A cell that lies partly inside counts by the share of its pixels.

    Args:
        image: with the extent of the cells.
        scores: of one token, shape (rows, columns).
    """
    positive = np.maximum(scores, 0)
    if not positive.any():
        return float("nan")
    rows, columns = scores.shape
    inside = np.zeros_like(positive)
    for x1, y1, x2, y2 in boxes:
        inside += np.outer(_overlaps(cell_edges(image.height, rows), y1, y2), _overlaps(cell_edges(image.width, columns), x1, x2))
    return float((positive * inside).sum() / positive.sum())


def _overlaps(edges: Sequence[int], low: int, high: int) -> Scores:
    """For each interval between edges, the share of it inside (low, high)."""
    starts, ends = np.array(edges[:-1]), np.array(edges[1:])
    return np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None) / (ends - starts)


def top_cells(image: CellScores, scores: Scores, count: int) -> list[tuple[Box, float, float]]:
    """The cells of an image with the largest positive scores: box, score, and share of all positive scores.

    Args:
        image: with the extent of the cells.
        scores: of one token or of the whole answer, shape (rows, columns).
    """
    total = float(np.maximum(scores, 0).sum())
    places = np.argsort(-scores, axis=None, kind="stable")[:count]
    cells = [(divmod(int(place), scores.shape[1]), float(scores.flat[place])) for place in places]
    return [(image.cell_box(row, column), score, score / total) for (row, column), score in cells if score > 0]


def top_words(words: Sequence[PromptWord], scores: Sequence[float], count: int) -> list[tuple[str, float]]:
    """The words with the largest positive scores, and the scores.

    Args:
        scores: of the words, for one token or for the whole answer.
    """
    order = sorted(range(len(words)), key=lambda number: -scores[number])[:count]
    return [(words[number].text, scores[number]) for number in order if scores[number] > 0]
