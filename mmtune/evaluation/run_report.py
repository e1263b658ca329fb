"""The HTML report of a run: metrics, loss curve and sample answers in one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.media.media import Media, open_image
from mmtune.evaluation.answers import Answer, read_answers
from mmtune.evaluation.metrics.metric_table import find_metric
from mmtune.evaluation.scores import format_score, further_lines, score_rows, score_title
from mmtune.recipe.recipe import Recipe, Source
from mmtune.run_directory import RunDirectory

THUMBNAIL = 320  # maximum length of the longer side in pixels; smaller images keep their size


def generation_line(summary: dict[str, Any]) -> str:
    """One sentence on the generation settings of a run's answers, and one on unused settings of its base; "" without answers."""
    if "generation" not in summary:
        return ""
    used, unused = summary["generation"], summary["generation_not_used"]
    names = {"eos_token_id": "stop token", "pad_token_id": "padding token", "bos_token_id": "first token"}
    settings = [f"at most {used['max_new_tokens']} new tokens"]
    for key, name in names.items():
        if used[key] is not None:
            settings.append(f"{name} {', '.join(map(str, used[key])) if isinstance(used[key], list) else used[key]}")
    line = f"Answers are generated greedily: {', '.join(settings)}."
    if not unused:
        return line
    names_and_values = ", ".join(f"{key} {value}" for key, value in unused.items())
    return f"{line} The model's generation config also sets {names_and_values}: the release keeps this, no answer here used it."


def write_report(run: RunDirectory, recipe: Recipe, summary: dict[str, Any]) -> None:
    """Write `report.html`: metrics, loss curve, and sample answers with their images, in one file."""
    samples = []
    if recipe.evaluate:
        after = read_answers(run.answers("after"))
        before = {a.id: a.prediction for a in read_answers(run.answers("before"))} if recipe.evaluate.before else {}
        selected = select_answers(after, recipe.evaluate.samples)
        images = _images(selected, recipe.evaluate.sources)
        samples = [
            {
                "answer": answer,
                "reference": " | ".join(dict.fromkeys(answer.references)),
                "right": is_right(answer),
                "score": format_score(answer.score, answer.metric) if answer.parsed else "unparsed",
                "before": before.get(answer.id),
                "images": [_thumbnail_uri(media) for media in images[answer.id]],
            }
            for answer in selected
        ]
    page = Environment(loader=PackageLoader("mmtune.evaluation"), autoescape=True).get_template("report.html.jinja")
    text = page.render(
        title=run.path.name,
        summary=summary,
        scores=score_rows(summary),
        scores_title=score_title(summary) if recipe.evaluate else "",
        further=further_lines(summary),
        generation=generation_line(summary),
        curve=_data_uri(run.loss_curve.read_bytes()),
        samples=samples,
        recipe=run.recipe.read_text(encoding="utf-8"),
    )
    run.report.write_text(text, encoding="utf-8")


def select_answers(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to `count` answers, spread evenly over the questions.

    At least a quarter of them are wrong answers, and more if there are not enough right ones.
    """
    right = [answer for answer in answers if is_right(answer)]
    wrong = _evenly_spaced([answer for answer in answers if not is_right(answer)], max(-(-count // 4), count - len(right)))
    right = _evenly_spaced(right, count - len(wrong))
    return [answer for answer in answers if answer in right or answer in wrong]


def is_right(answer: Answer) -> bool:
    """Whether an answer is shown as right."""
    return answer.parsed and find_metric(answer.metric).is_right(answer.score)


def _evenly_spaced(answers: Sequence[Answer], count: int) -> list[Answer]:
    count = min(count, len(answers))
    return [answers[number * len(answers) // count] for number in range(count)]


def _images(answers: Sequence[Answer], sources: Sequence[Source]) -> dict[str, Sequence[Media]]:
    """The images of each answer by row id. Rows are read again for images that are embedded in a file or have a window."""
    windows = any(source.window is not None for source in sources)
    if not windows and all(Path(name).is_file() for answer in answers for name in answer.images):
        return {answer.id: [Path(name) for name in answer.images] for answer in answers}
    ids = {answer.id for answer in answers}
    return {sample.id: sample.images for sample in iterate_rows(IndexedSamples(sources)) if sample.id in ids}


def _thumbnail_uri(media: Media) -> str:
    image = open_image(media)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
