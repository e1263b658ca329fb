"""HTML page of one encoded sample: its images and its tokens, with the token ids on hover."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mmtune.data.media.drawing import draw_regions
from mmtune.data.media.media import Media, open_image
from mmtune.data.templates.regions import Region
from mmtune.data.validation.show_sample import Kind, SampleView, Token, escape_invisible, show_line_breaks
from mmtune.families.box_convention import KIND_NAMES
from mmtune.report.pages import data_uri, render_page
from mmtune.utils.errors import UserError

MAX_PAGE_EDGE = 640  # longer edge of an image on the page, in pixels
REGION_COLOR = "#1a7f37"
SMALL_EDGE = 128  # images with a longer edge of at most this many pixels are lossless on the page


@dataclass(frozen=True)
class PageToken:
    """Tokens that the page shows as one: those of one character, or repeated ones of an image or of padding."""

    text: str
    ids: str
    kind: Kind
    times: int = 1


def write_page(view: SampleView, path: Path) -> None:
    """Write a self-contained HTML page with the sample's images and its tokens, with token ids on hover.

    Raises:
        UserError: the file cannot be written.
    """
    text = render_page("sample.html.jinja", styles=("tokens.css",), title=escape_invisible(view.sample.id), **sample_values(view))
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def sample_values(view: SampleView) -> dict[str, Any]:
    """The values of the templates for one sample."""
    return {
        "summary": view.summary(),
        "notes": view.notes,
        "images": [page_image(media, view.regions_of(number)) for number, media in enumerate(view.sample.images)],
        "runs": [(kind, list(page_tokens(list(run)))) for kind, run in groupby(view.tokens, key=lambda token: token.kind)],
        "prompt": escape_invisible(view.prompt),
    }


def page_tokens(tokens: Sequence[Token]) -> Iterator[PageToken]:
    """Group tokens of one kind for the page."""
    if tokens[0].kind in ("media", "padding"):
        for number, run in groupby(tokens, key=lambda token: token.id):
            same = list(run)
            yield PageToken(escape_invisible(same[0].text), str(number), same[0].kind, len(same))
        return
    ids: list[str] = []
    for position, token in enumerate(tokens):
        ids.append(str(token.id))
        if token.text or position == len(tokens) - 1:
            yield PageToken(show_line_breaks(token.text) + "\n" * token.text.endswith("\n"), " ".join(ids), token.kind)
            ids = []


def _count_regions(regions: Sequence[Region]) -> str:
    """Such as ", 2 boxes drawn"; empty without regions."""
    counts = Counter(region.kind for region in regions)
    return "".join(f", {count} {kind if count == 1 else KIND_NAMES[kind]} drawn" for kind, count in counts.items())


def image_name(media: Media) -> str:
    """The name of an image on a page: its path below the working directory, or the whole path."""
    return escape_invisible(str(media).removeprefix(f"{Path.cwd()}/"))


def page_image(media: Media, regions: Sequence[Region]) -> dict[str, Any]:
    """The values of an image on the page, on which its regions are drawn."""
    name = image_name(media)
    try:
        image = open_image(media)
    except ValueError as error:
        return {"name": name, "error": escape_invisible(str(error))}
    size = f"{image.width} x {image.height}"
    small = max(image.size) <= SMALL_EDGE
    image.thumbnail((MAX_PAGE_EDGE, MAX_PAGE_EDGE))
    draw_regions(image, [region.corner_shares for region in regions], REGION_COLOR)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    image_format = "png" if small else "jpeg"
    uri = data_uri(buffer.getvalue(), image_format)
    return {"name": name, "size": size, "small": small, "regions": _count_regions(regions), "data": uri}
