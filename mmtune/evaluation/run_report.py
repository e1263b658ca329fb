"""What a run achieved, for people: one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.media.media import Media, open_image
from mmtune.evaluation.evaluate import Answer, read_answers
from mmtune.evaluation.scores import score_rows
from mmtune.recipe.recipe import Recipe, Source
from mmtune.run_directory import RunDirectory

THUMBNAIL = 320  # pixels of the longer side; a smaller image is kept as it is and enlarged by the page


def generation_line(summary: dict[str, Any]) -> str:
    """With which settings the answers of a run were generated, and which of its base's settings were not used; or nothing."""
    if "generation" not in summary:
        return ""
    used, unused = summary["generation"], summary["generation_not_used"]
    names = {"eos_token_id": "ended by token", "pad_token_id": "padded with token", "bos_token_id": "begun with token"}
    told = [f"at most {used['max_new_tokens']} new tokens"]
    for key, name in names.items():
        if used[key] is not None:
            told.append(f"{name} {', '.join(map(str, used[key])) if isinstance(used[key], list) else used[key]}")
    line = f"Answers are generated greedily, {', '.join(told)}."
    if not unused:
        return line
    settings = ", ".join(f"{key} {value}" for key, value in unused.items())
    return f"{line} The model's own generation config also has {settings}: it stays in the release, and no answer here used it."


def write_report(run: RunDirectory, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Write `report.html`: figures, loss curve, and answers with their images, all inside the one file."""
    samples = []
    if recipe.evaluate:
        after = read_answers(run.answers("after"))
        before = {a.id: a.prediction for a in read_answers(run.answers("before"))} if recipe.evaluate.before else {}
        shown = select_answers(after, recipe.evaluate.samples)
        images = _images(shown, recipe.evaluate.data)
        samples = [
            {
                "answer": answer,
                "before": before.get(answer.id),
                "images": [_picture(media) for media in images[answer.id]],
            }
            for answer in shown
        ]
    page = Environment(loader=PackageLoader("mmtune.evaluation"), autoescape=True).get_template("report.html.jinja")
    text = page.render(
        title=run.path.name,
        summary=summary,
        scores=score_rows(summary),
        generation=generation_line(summary),
        curve=_data_uri(run.loss_curve.read_bytes()),
        samples=samples,
        recipe=run.recipe.read_text(encoding="utf-8"),
    )
    run.report.write_text(text, encoding="utf-8")


def select_answers(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to `count` answers spread evenly over the questions; a quarter of the places, and what right ones leave, for wrong."""
    right = [answer for answer in answers if answer.correct]
    wrong = _spread([answer for answer in answers if not answer.correct], max(-(-count // 4), count - len(right)))
    right = _spread(right, count - len(wrong))
    return [answer for answer in answers if answer in right or answer in wrong]


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    count = min(count, len(answers))
    return [answers[number * len(answers) // count] for number in range(count)]


def _images(answers: Sequence[Answer], sources: Sequence[Source]) -> dict[str, Sequence[Media]]:
    """The images of each answer by its id. What lies inside another file, or has a window, is found again in the rows."""
    windows = any(source.window is not None for source in sources)
    if not windows and all(Path(name).is_file() for answer in answers for name in answer.images):
        return {answer.id: [Path(name) for name in answer.images] for answer in answers}
    wanted = {answer.id for answer in answers}
    return {sample.id: sample.images for sample in iterate_rows(IndexedSamples(sources)) if sample.id in wanted}


def _picture(media: Media) -> str:
    image = open_image(media)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
