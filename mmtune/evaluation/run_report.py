"""HTML pages in one file: the report of a run, and a comparison of models, with sample answers and their images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.media.drawing import draw_regions
from mmtune.data.media.media import Media, open_image
from mmtune.data.region_text import Corners, read_areas, read_points
from mmtune.data.validation.issues import DataIssueError
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.comparison import Comparison, column_names, difference_rows, differences_to_dicts, gain, unmatched_lines
from mmtune.evaluation.metrics.answer_text import to_ascii
from mmtune.evaluation.metrics.metric_table import recorded_metric
from mmtune.evaluation.scores import (
    difference_lines,
    format_score,
    further_lines,
    gap_line,
    group_rows,
    group_title,
    score_rows,
    score_title,
)
from mmtune.recipe.recipe import Recipe, Source
from mmtune.run_directory import RunDirectory

CHANGED = 24
"""Maximum number of rows that a comparison shows as worse, and as better."""
THUMBNAIL = 320  # maximum length of the longer side in pixels; smaller images keep their size


Item = TypeVar("Item")


def generation_line(summary: dict[str, Any]) -> str:
    """One sentence on the generation settings of a run's answers, and one on unused settings of its base; "" without answers."""
    if "generation" not in summary:
        return ""
    from mmtune.models.generation import SAMPLING_SETTINGS  # imports torch, which a page of compared answers does not need

    used, unused = summary["generation"], summary["generation_not_used"]
    names = {"eos_token_id": "stop token", "pad_token_id": "padding token", "bos_token_id": "first token"}
    settings = [f"at most {used['max_new_tokens']} new tokens"]
    for key, name in names.items():
        if used[key] is not None:
            settings.append(f"{name} {', '.join(map(str, used[key])) if isinstance(used[key], list) else used[key]}")
    line = f"Answers are generated greedily: {', '.join(settings)}."
    if not unused:
        return line
    of_sampling, others = (
        ", ".join(f"{key} {value}" for key, value in unused.items() if (key in SAMPLING_SETTINGS) == sampling)
        for sampling in (True, False)
    )
    parts = [f"{of_sampling}, which a release keeps"] * bool(of_sampling) + [f"{others}, which a release leaves out"] * bool(
        others
    )
    return f"{line} The base's generation config also sets {'; and '.join(parts)}. No answer here used it."


@dataclass(frozen=True)
class DrawnRegions:
    """The regions of one text that are drawn on an image: whose text it is, their color, and their corners as fractions."""

    of: str
    color: str
    regions: Sequence[Corners]


@dataclass(frozen=True)
class ProfileSection:
    """The profile of a run in its report: a title, a table as text by column, and sentences."""

    title: str
    rows: list[dict[str, str]]
    lines: list[str]


def write_report(run: RunDirectory, recipe: Recipe, summary: dict[str, Any], profile: ProfileSection | None = None) -> None:
    """Write `report.html`: metrics, loss curve, and sample answers with their images, in one file.

    With answers of the base, rows on which tuning changed the score come first.

    Args:
        profile: of the run's steps; None where they were not profiled.
    """
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    if recipe.evaluate:
        count, sources = recipe.evaluate.samples, recipe.evaluate.sources
        after = read_answers(run.answers("after"))
        before = {answer.id: answer for answer in read_answers(run.answers("before"))} if recipe.evaluate.before else {}
        pairs = [(before.get(answer.id), answer) for answer in after]
        worse, better = (
            _evenly_spaced([pair for pair in pairs if pair[0] and sign * gain(pair[0], pair[1]) > 0], count // 4)
            for sign in (-1, 1)
        )
        shown = {pair[1].id for pair in (*worse, *better)}
        rest = select_answers([answer for answer in after if answer.id not in shown], count - len(shown))
        titled = {
            "Worse than the base": worse,
            "Better than the base": better,
            "Other answers" if shown else "Answers": [(before.get(answer.id), answer) for answer in rest],
        }
        groups = [(title, sample_cards(chosen, ("base", "tuned"), sources)) for title, chosen in titled.items()]
    page_text = render_page(
        "report.html.jinja",
        title=run.path.name,
        summary=summary,
        scores=score_rows(summary),
        scores_title=score_title(summary) if recipe.evaluate else "",
        by_field=[(group_title(each), group_rows(each), gap_line(each)) for each in summary.get("groups", ())],
        further=further_lines(summary) + difference_lines(summary.get("comparison", [])),
        tasks=[
            (score_title(each, name), score_rows(each), further_lines(each, True) + difference_lines(each.get("comparison", [])))
            for name, each in summary.get("tasks", {}).items()
        ],
        generation=generation_line(summary),
        curve=_data_uri(run.loss_curve.read_bytes()),
        profile=profile,
        groups=groups,
        recipe=run.recipe.read_text(encoding="utf-8"),
    )
    run.report.write_text(page_text, encoding="utf-8")


def write_comparison(comparisons: Sequence[tuple[tuple[str, str], Comparison]], path: Path, sources: Sequence[Source]) -> None:
    """Write a page with the differences of each comparison, and the rows that became worse and better with their images.

    Args:
        comparisons: the names of both models, and the comparison.
        path: the HTML file.
        sources: the sources of the rows, for images that are embedded in a file; without them such images are left out.
    """
    sections = []
    for names, comparison in comparisons:
        groups = []
        for title, sign in (("Worse", -1), ("Better", 1)):
            pairs = [pair for pair in comparison.pairs if sign * gain(*pair) > 0]
            chosen = _evenly_spaced(pairs, CHANGED)
            count = f"{len(pairs):,} rows" + (f", {len(chosen)} of them" if len(chosen) < len(pairs) else "")
            groups.append((f"{title}: {count}", sample_cards(chosen, names, sources)))
        sections.append(
            {
                "title": f"{names[1]} against {names[0]}",
                "unmatched": unmatched_lines(comparison, names),
                "rows": difference_rows(comparison.tasks, column_names(names)),
                "lines": difference_lines(differences_to_dicts(comparison.tasks)),
                "groups": groups,
            }
        )
    path.write_text(
        render_page("comparison.html.jinja", title="Comparison", sections=sections), encoding="utf-8", errors="replace"
    )


def render_page(template: str, **values: Any) -> str:
    """A page from one of the templates; all text is escaped."""
    return Environment(loader=PackageLoader("mmtune.evaluation"), autoescape=True).get_template(template).render(**values)


def sample_cards(
    pairs: Sequence[tuple[Answer | None, Answer]], names: tuple[str, str], sources: Sequence[Source]
) -> list[dict[str, Any]]:
    """What a page shows of rows: images, question, references, and the answers of one or two models."""
    images = _images([answer for _, answer in pairs], sources)
    drawn = {second.id: _drawn_regions(first, second, names) for first, second in pairs}
    return [
        {
            "question": second.question,
            "reference": " | ".join(dict.fromkeys(second.references)),
            "images": [_thumbnail(media, drawn[second.id]) for media in images.get(second.id, ())],
            "drawn": ", ".join(f"{each.of} {each.color}" for each in drawn[second.id] if each.regions),
            "answers": [
                {
                    "label": f"{name}, {format_score(answer.score, answer.metric) if answer.parsed else 'unparsed'}",
                    "prediction": answer.prediction,
                    "right": is_right(answer),
                }
                for name, answer in zip(names[::-1], (second, first), strict=True)
                if answer is not None
            ],
            "label": f"{second.id} · {second.task}" if second.task else second.id,
        }
        for first, second in pairs
    ]


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
    return answer.parsed and recorded_metric(answer.metric).is_right(answer.score)


def _evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _images(answers: Sequence[Answer], sources: Sequence[Source]) -> dict[str, Sequence[Media]]:
    """The images of each answer by row id. Rows are read again for images that are embedded in a file or have a window."""
    if not sources:
        return {answer.id: [Path(name) for name in answer.images if Path(name).is_file()] for answer in answers}
    windows = any(source.window is not None for source in sources)
    if not windows and all(Path(name).is_file() for answer in answers for name in answer.images):
        return {answer.id: [Path(name) for name in answer.images] for answer in answers}
    ids = {answer.id for answer in answers}
    return {sample.id: sample.images for sample in iterate_rows(IndexedSamples(sources)) if sample.id in ids}


def _drawn_regions(first: Answer | None, second: Answer, names: tuple[str, str]) -> list[DrawnRegions]:
    """The regions of the reference and of the predictions; none for a question with several images."""
    if len(second.images) != 1:
        return []
    texts = [("reference", "green", second, second.item().references[0])]
    texts += [
        (name, color, answer, answer.item().prediction)
        for name, color, answer in zip(names, ("orange", "red"), (first, second), strict=True)
        if answer is not None
    ]
    return [DrawnRegions(of, color, _regions_in(text, answer.extent)) for of, color, answer, text in texts]


def _regions_in(text: str, extent: Sequence[float]) -> list[Corners]:
    """The regions of a text as fractions of the image's width and height."""
    if len(extent) != 2 or min(extent) <= 0:
        return []
    regions = read_areas(to_ascii(text)) or read_points(to_ascii(text))
    return [tuple((x / extent[0], y / extent[1]) for x, y in corners) for corners in regions]


def _thumbnail(media: Media, drawn: Sequence[DrawnRegions]) -> dict[str, str]:
    """The `uri` of a small copy of an image with regions drawn on it; `problem` if it cannot be read."""
    try:
        image = open_image(media)
    except DataIssueError as error:
        return {"problem": str(error)}
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    for each in drawn:
        draw_regions(image, each.regions, each.color)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"uri": _data_uri(buffer.getvalue())}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
