"""Cards of answers on a page: images with regions drawn on them, question, references, and the answers of one or two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.media.drawing import draw_regions
from mmtune.data.media.media import Media, open_image
from mmtune.data.region_text import Corners, read_areas, read_points
from mmtune.data.validation.issues import DataIssueError
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.comparison import gain
from mmtune.evaluation.metrics.answer_text import to_ascii
from mmtune.evaluation.metrics.metric_table import recorded_metric
from mmtune.evaluation.scores import format_score
from mmtune.recipe.recipe import Source
from mmtune.report.pages import embedded_image
from mmtune.utils.errors import UserError

THUMBNAIL = 320  # maximum length of the longer side in pixels; smaller images keep their size
SHOWN_CARDS = 300
"""A page shows at most this many answers, whatever `evaluate.samples` is."""
SHOWN_CHARACTERS = 2_000
"""Characters of one text of a card; fewer with many cards, which have `ALL_CHARACTERS` together."""
ALL_CHARACTERS = 300_000
IMAGE_BYTES = 4_000_000
"""The embedded images of a page's cards together."""

BLUE, YELLOW, ORANGE = "#56b4e9", "#f0e442", "#d55e00"
"""Colors of regions, which people with any color blindness tell apart (Okabe and Ito)."""
COLOR_NAMES = {BLUE: "blue", YELLOW: "yellow", ORANGE: "orange"}

Item = TypeVar("Item")
AnswerPair = tuple[Answer | None, Answer]
"""The answers of the base, where there is one, and of the tuned model to one question."""


@dataclass(frozen=True)
class DrawnRegions:
    """The regions of one text that are drawn on an image: whose text it is, their color, and their corners as fractions."""

    of: str
    color: str
    regions: Sequence[Corners]


def choose_answers(before: Sequence[Answer], after: Sequence[Answer], count: int) -> dict[str, list[AnswerPair]]:
    """The answers that a report shows, by the title of their group: those that tuning made worse and better, then others.

    Args:
        before: of the base; empty if it was not evaluated.
        after: of the tuned model.
        count: how many, at most `SHOWN_CARDS`; a quarter each for those that became worse and better.
    """
    count, base = min(count, SHOWN_CARDS), {answer.id: answer for answer in before}
    pairs: list[AnswerPair] = [(base.get(answer.id), answer) for answer in after]
    worse, better = (
        evenly_spaced([pair for pair in pairs if pair[0] and sign * gain(pair[0], pair[1]) > 0], count // 4) for sign in (-1, 1)
    )
    shown = {pair[1].id for pair in (*worse, *better)}
    rest = select_answers([answer for answer in after if answer.id not in shown], count - len(shown))
    groups: dict[str, list[AnswerPair]] = {
        "Worse than the base": worse,
        "Better than the base": better,
        "Other answers" if shown else "Answers": [(base.get(answer.id), answer) for answer in rest],
    }
    return {title: chosen for title, chosen in groups.items() if chosen}


def sample_cards(pairs: Sequence[AnswerPair], names: tuple[str, str], sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What a page shows of rows: images, question, references, and the answers of one or two models.

    Images are left out with a sentence once they are `IMAGE_BYTES` together, and long texts are cut.
    """
    images, problem = readable_images([answer for _, answer in pairs], sources)
    budget = IMAGE_BYTES
    cards = []
    for first, second in pairs:
        drawn = drawn_regions(first, second, names)
        shown: list[dict[str, str]] = [{"problem": problem}] if problem else []
        for media in images.get(second.id, ()):
            shown.append(_page_thumbnail(media, drawn) if budget > 0 else {"problem": "an image is left out: the page has many"})
            budget -= len(shown[-1].get("uri", ""))
        change = 0.0 if first is None else gain(first, second)
        length = min(SHOWN_CHARACTERS, ALL_CHARACTERS // len(pairs))
        cards.append(
            {
                "id": second.id,
                "question": shortened(second.question, length),
                "reference": shortened(" | ".join(dict.fromkeys(second.references)), length),
                "images": shown,
                "drawn": ", ".join(f"{each.of} {COLOR_NAMES[each.color]}" for each in drawn if each.regions),
                "answers": [
                    {
                        "label": f"{name}, {format_score(answer.score, answer.metric) if answer.parsed else 'unparsed'}",
                        "prediction": shortened(answer.prediction, length),
                        "right": is_right(answer),
                    }
                    for name, answer in zip(names[::-1], (second, first), strict=True)
                    if answer is not None
                ],
                "group": second.group,
                "change": "better" if change > 0 else "worse" if change < 0 else "same",
                "label": shortened(f"{second.id} · {second.task}" if second.task else second.id, 300),
            }
        )
    return cards


def shortened(text: str, length: int) -> str:
    """The first characters of a longer text, with its length."""
    return text if len(text) <= length else f"{text[:length]}\u2026 ({len(text):,} characters)"


def select_answers(answers: Sequence[Answer], count: int) -> list[Answer]:
    """Up to `count` answers, spread evenly over the questions.

    At least a quarter of them are wrong answers, and more if there are not enough right ones.
    """
    right = [answer for answer in answers if is_right(answer)]
    wrong = evenly_spaced([answer for answer in answers if not is_right(answer)], max(-(-count // 4), count - len(right)))
    right = evenly_spaced(right, count - len(wrong))
    selected = set(map(id, (*right, *wrong)))
    return [answer for answer in answers if id(answer) in selected]


def is_right(answer: Answer) -> bool:
    """Whether an answer is shown as right."""
    return answer.parsed and recorded_metric(answer.metric).is_right(answer.score)


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Up to `count` of the items, spread evenly over them."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def images_of(answers: Sequence[Answer], sources: Sequence[Source]) -> dict[str, Sequence[Media]]:
    """The images of each answer by row id. Rows are read again for images that are embedded in a file or have a window."""
    if not sources:
        return {answer.id: [Path(name) for name in answer.images if Path(name).is_file()] for answer in answers}
    windows = any(source.window is not None for source in sources)
    if not windows and all(Path(name).is_file() for answer in answers for name in answer.images):
        return {answer.id: [Path(name) for name in answer.images] for answer in answers}
    ids = {answer.id for answer in answers}
    return {sample.id: sample.images for sample in iterate_rows(IndexedSamples(sources)) if sample.id in ids}


def readable_images(answers: Sequence[Answer], sources: Sequence[Source]) -> tuple[Mapping[str, Sequence[Media]], str]:
    """`images_of`, and a sentence where the data cannot be read, such as in another working directory than that of the run."""
    try:
        return images_of(answers, sources), ""
    except UserError as error:
        return {}, shortened(f"the images cannot be read: {error}", 500)


def drawn_regions(first: Answer | None, second: Answer, names: tuple[str, str]) -> list[DrawnRegions]:
    """The regions of the reference and of the predictions; none for a question with several images."""
    if len(second.images) != 1:
        return []
    texts = [("reference", BLUE, second, second.item().references[0])]
    texts += [
        (name, color, answer, answer.item().prediction)
        for name, color, answer in zip(names, (YELLOW, ORANGE), (first, second), strict=True)
        if answer is not None
    ]
    return [DrawnRegions(of, color, _regions_in(text, answer.extent)) for of, color, answer, text in texts]


def _regions_in(text: str, extent: Sequence[float]) -> list[Corners]:
    """The regions of a text as fractions of the image's width and height."""
    if len(extent) != 2 or min(extent) <= 0:
        return []
    regions = read_areas(to_ascii(text)) or read_points(to_ascii(text))
    return [tuple((x / extent[0], y / extent[1]) for x, y in corners) for corners in regions]


def thumbnail(media: Media, drawn: Sequence[DrawnRegions]) -> Image.Image:
    """A small copy of an image with regions drawn on it.

    Raises:
        DataIssueError: the image cannot be read.
    """
    image = open_image(media)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    for each in drawn:
        draw_regions(image, each.regions, each.color)
    return image


def _page_thumbnail(media: Media, drawn: Sequence[DrawnRegions]) -> dict[str, str]:
    """The `uri` of a thumbnail; `problem` if the image cannot be read."""
    try:
        image = thumbnail(media, drawn)
    except DataIssueError as error:
        return {"problem": str(error)}
    return {"uri": embedded_image(image)}
