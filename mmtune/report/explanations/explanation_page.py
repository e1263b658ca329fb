"""HTML page of an explanation: heat maps over the images and the words of the prompt, for each token of the answer."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmtune.data.media.media import Media
from mmtune.data.validation.show_sample import escape_invisible, show_line_breaks
from mmtune.evaluation.answers import Answer
from mmtune.explain.explanation import CellScores, Explanation, Scores, top_cells
from mmtune.recipe.recipe import Source
from mmtune.report.answer_cards import readable_images
from mmtune.report.pages import data_uri, render_page
from mmtune.report.sample_page import page_image
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.files import read_json_object

RAISES, LOWERS = (245, 130, 32), (45, 125, 245)
"""Orange and blue, which people with any color blindness tell apart, and which show on black and on white."""
OPAQUE = 215
"""The opacity, of 255, of the cell with the largest score."""
LEVELS = 5
"""Steps of a word's color, in explanation.css."""
SHOWN_WORDS, MIN_WORDS = 20_000, 10
"""Words of all tokens together, and of one token at least: of a long prompt only those with the largest scores are shown."""
TOP_CELLS, SMALL_SHARE = 5, 0.01
"""Cells that are listed below a map, if their share of the positive scores is not smaller."""
EXPLANATION_BYTES = 1_000_000
"""A report leaves out further explanations once it has this many bytes of them; `explanations.json` has all."""
EXPLANATION_STYLES, EXPLANATION_SCRIPTS = ("explanation.css",), ("explanation.js",)


def write_explanation(explanation: Explanation, images: Sequence[Media], prompt: str, path: Path) -> None:
    """Write a self-contained HTML page.

    Args:
        images: of the conversation, in order.
        prompt: the question, for the top of the page.

    Raises:
        UserError: the file cannot be written.
    """
    page = explanation_html(explanation, images, f"Explanation: {escape_invisible(explanation.answer)[:80]}", prompt)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {reason_of(error)}") from error


def explanation_html(explanation: Explanation, images: Sequence[Media], title: str, prompt: str = "") -> str:
    """The page of an explanation; `images` and `prompt` as for `write_explanation`."""
    return render_page(
        "explanation.html.jinja",
        styles=EXPLANATION_STYLES,
        scripts=EXPLANATION_SCRIPTS,
        title=title,
        prompt=escape_invisible(prompt),
        explained=explanation_values(explanation, images),
    )


def explanations_by_row(path: Path, answers: Sequence[Answer], sources: Sequence[Source]) -> dict[str, dict[str, Any]]:
    """The values of the templates for the explanations of a run, by row id.

    Args:
        path: `explanations.json` of the run.
        answers: those that the page shows; the others are left out.
        sources: of the rows, for images that are embedded in a file.
    """
    recorded = {each["id"]: each for each in read_json_object(path)["explanations"]} if path.is_file() else {}
    explained = [answer for answer in answers if answer.id in recorded]
    images, _ = readable_images(explained, sources)
    values: dict[str, dict[str, Any]] = {}
    budget = EXPLANATION_BYTES
    for number, answer in enumerate(explained):
        if budget > 0 and len(images.get(answer.id, ())) == len(recorded[answer.id]["images"]):
            explanation = Explanation.from_dict(recorded[answer.id])
            values[answer.id] = explanation_values(explanation, images[answer.id], f"explained-{number}")
            budget -= len(json.dumps(values[answer.id]))
    return values


def explanation_values(explanation: Explanation, images: Sequence[Media], key: str = "token") -> dict[str, Any]:
    """The values of the templates for one explanation.

    Args:
        key: the name of the choice of a token, unique in the page.
    """
    count = len(explanation.tokens)
    total = sum(token.log_probability for token in explanation.tokens)
    labels = [("whole answer", total), *((_label(t.text), t.log_probability) for t in explanation.tokens)]
    chosen = [list(range(count)), *([number] for number in range(count))]
    return {
        "key": key,
        "method": explanation.method,
        "images": [
            {**page_image(media, ()), "views": [_map_view(scores, tokens) for tokens in chosen]}
            for media, scores in zip(images, explanation.images, strict=True)
        ],
        "views": [
            {"label": label, "log_probability": f"{round(value, 2) + 0.0:.2f}", **_word_view(explanation, tokens)}
            for (label, value), tokens in zip(labels, chosen, strict=True)
        ],
    }


def _label(text: str) -> str:
    """The text of a token, with spaces shown if it has nothing else."""
    return show_line_breaks(text if text.strip(" ") else "\u2423" * len(text))


def _map_view(image: CellScores, tokens: Sequence[int]) -> dict[str, Any]:
    """The overlay of an image for a token, or for several: their sum."""
    scores = image.scores[list(tokens)].sum(axis=0)
    lines = [
        f"x {x1} to {x2}, y {y1} to {y2}: {score:+.2f} nats, {share:.0%}"
        for (x1, y1, x2, y2), score, share in top_cells(image, scores, TOP_CELLS)
        if share >= SMALL_SHARE
    ]
    return {"uri": data_uri(heat_map(scores), "png"), "scale": f"{_largest(scores):.2f}", "lines": lines}


def _word_view(explanation: Explanation, tokens: Sequence[int]) -> dict[str, Any]:
    scores = [sum(word.scores[number] for number in tokens) for word in explanation.words]
    largest = _largest(np.array(scores or [0.0]))
    count = max(MIN_WORDS, SHOWN_WORDS // (1 + len(explanation.tokens)))
    shown = sorted(sorted(range(len(scores)), key=lambda number: -abs(scores[number]))[:count])
    words = [
        {
            "text": escape_invisible(explanation.words[number].text),
            "score": f"{scores[number]:+.2f}",
            "level": _level(scores[number], largest),
        }
        for number in shown
    ]
    return {"words": words, "word_scale": f"{largest:.2f}", "words_left_out": len(scores) - len(words)}


def heat_map(scores: Scores) -> bytes:
    """A PNG image with one pixel for each cell: orange where the score is positive, blue where it is negative.

    The opacity is proportional to the score; that of the largest is `OPAQUE`.

    Args:
        scores: shape (rows, columns).
    """
    strength = np.abs(scores) / (_largest(scores) or 1)
    color = np.where((scores > 0)[..., None], np.array(RAISES), np.array(LOWERS))
    pixels: NDArray[np.uint8] = np.dstack([color, strength * OPAQUE]).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def _largest(scores: Scores) -> float:
    return float(np.abs(scores).max())


def _level(score: float, largest: float) -> str:
    """The class of a word's color; "" for a score near 0."""
    level = round(LEVELS * abs(score) / largest) if largest else 0
    return f"{'raises' if score > 0 else 'lowers'}-{level}" if level else ""
