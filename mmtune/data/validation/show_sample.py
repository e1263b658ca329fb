"""One sample as training sees it, token by token: in the terminal, as a page, as JSON."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmtune.chat_templates.rendering import render_prompt
from mmtune.console.styled_console import StyledConsole
from mmtune.data.dataset import open_readers
from mmtune.data.encoding.encode import OverLength, chat_template_of, encode_text, to_template_messages
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.encoding.token_counts import sample_replacements
from mmtune.data.media.media import ImageView, Media, open_image
from mmtune.data.message import RowError, Sample
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.rows import Row, id_in_dataset
from mmtune.recipe.recipe import DataSection, Source
from mmtune.utils.errors import UserError

Kind = Literal["prompt", "supervised", "media"]
STYLES = {"prompt": "", "supervised": "bold green", "media": "cyan"}
PICTURE = 640  # pixels of the longer side on the page
SMALL = 128  # pixels of the longer side up to which a picture stays as it is
UNFINISHED = "\ufffd"
"""What a tokenizer gives for a part of a character's bytes."""


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        id: in the vocabulary.
        text: what it adds to the decoded text; of the tokens that share a character the last has it, and the others are empty.
        kind: `supervised` if the loss falls on it, `media` if it is part of what stands for an image, else `prompt`.
    """

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class SampleView:
    """One sample, encoded.

    Attributes:
        sample: what is encoded; with fewer or smaller images if the recipe's `data.over_length` says so.
        tokens: all of them.
        prompt: the rendered text up to where the last answer begins, one placeholder for an image.
        notes: what the recipe does to the sample because of its length, and to its images.
    """

    sample: Sample
    tokens: list[Token]
    prompt: str
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """The row's id and its tokens."""
        return {"row": self.sample.id, "tokens": [{"id": t.id, "text": t.text, "kind": t.kind} for t in self.tokens]}

    def summary(self) -> str:
        """How many tokens there are of each kind."""
        counts = [f"{sum(token.kind == kind for token in self.tokens):,} {kind}" for kind in ("supervised", "prompt", "media")]
        return f"{len(self.tokens):,} tokens: {', '.join(counts)}"


def find_sample(train: Sequence[Source], held_out: Sequence[Source], row_id: str) -> Sample:
    """The sample of the row with an id, as a run makes it.

    Args:
        train: where to look first.
        held_out: where to look then.
        row_id: as messages and reports name the row, such as `train.json[17]`, or the row's own id (`id`, `question_id`, ...).

    Raises:
        UserError: when no row has the id, or it is the own id of several.
        RowError: when the row cannot be read.
    """
    example = ""
    own: dict[str, tuple[SourceReader, Row]] = {}
    for reader in (*open_readers(train), *open_readers(held_out)):
        rows = reader.open()
        for index in _likely_first(row_id, len(rows)):
            try:
                found, row = rows[index]
            except RowError as error:
                if error.row == row_id:
                    raise
                continue
            if found == row_id:
                return reader.sample(found, row)
            example = found
            # A shard's row may have it in its `json`.
            ids = [id_in_dataset(each) for each in (row, row.get("json")) if isinstance(each, dict)]
            if row_id in [str(each) for each in ids if each is not None]:
                own[found] = (reader, row)
    if len(own) > 1:
        listed = ", ".join([*own][:10]) + ", ..." * (len(own) > 10)
        raise UserError(f"{len(own)} rows have the id {row_id!r} as their own; name one of them: {listed}")
    for found, (reader, row) in own.items():
        return reader.sample(found, row)
    raise UserError(f"no row has the id {row_id!r}; ids are like {example!r}")


def _likely_first(row_id: str, count: int) -> Iterator[int]:
    """Every index; those that the id's number speaks for come first."""
    number = re.search(r"(\d+)\]?$", row_id)
    likely = [index for index in (int(number[1]) - 1, int(number[1])) if 0 <= index < count] if number else []
    yield from likely
    yield from (index for index in range(count) if index not in likely)


def view_sample(sample: Sample, processor: ProcessorMixin, section: DataSection) -> SampleView:
    """Encode a sample as a recipe trains on it, without opening its images.

    Args:
        sample: the sample.
        processor: the model's.
        section: the recipe's, for `supervise`, `max_tokens` and `over_length`.

    Raises:
        RowError: a sample that cannot be encoded.
    """
    notes = []
    if section.max_tokens is not None:
        try:
            fitted = fit_to_budget(sample, processor, section.max_tokens, section.over_length, section.supervise)
        except OverLength as error:
            notes.append(f"does not train: {error.detail} (data.over_length: {section.over_length})")
        else:
            sample = fitted.sample
            notes += [f"{fitted.dropped} images dropped, so that it fits data.max_tokens"] if fitted.dropped else []
            notes += [f"{fitted.resized} images made smaller, so that it fits data.max_tokens"] if fitted.resized else []
    if any(isinstance(image, ImageView) and image.change is not None for image in sample.images):
        notes.append("images are augmented as when the row trains first; every later time is drawn again")
    encoded = encode_text(sample.id, sample.messages, processor, sample_replacements(sample, processor), section.supervise)
    kinds: list[Kind] = [
        "media" if media else "supervised" if supervised else "prompt"
        for media, supervised in zip(encoded.media, encoded.supervised, strict=True)
    ]
    texts = token_texts(processor.tokenizer, encoded.input_ids)
    tokens = [Token(*each) for each in zip(encoded.input_ids, texts, kinds, strict=True)]
    question = to_template_messages(sample.id, sample.messages[:-1])
    prompt = render_prompt(question, chat_template_of(processor), processor.tokenizer)
    return SampleView(sample, tokens, prompt, notes)


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[str]:
    """What each token adds to the decoded text. Joined, they are the text.

    A character of several tokens is the last one's; a token is decoded behind the one before it, because many tokenizers
    leave out a space at the beginning.
    """

    def decoded(start: int, end: int) -> str:
        text = tokenizer.decode(input_ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    texts = []
    start = given = 0  # tokens from `start` on are decoded together; the text of those before `given` is given out
    for end in range(1, len(input_ids) + 1):
        before, now = decoded(start, given), decoded(start, end)
        if now.endswith(UNFINISHED) and end < len(input_ids):
            after = decoded(start, end + 1)
            if not (after.startswith(now) and len(after) > len(now)):  # the next token changes it: it was not whole
                texts.append("")
                continue
        texts.append(now[len(before) :])
        start, given = given, end
    return texts


# ---- terminal


def print_sample(view: SampleView, console: Console | None = None) -> None:
    """Print a sample: runs of tokens of one kind, each beside the name of its kind, so that it reads without colours too."""
    console = console or StyledConsole(highlight=False)
    console.print(Text(escape_invisible(view.sample.id), "bold"))
    console.print(Text(view.summary()))
    for note in view.notes:
        console.print(Text(note, "yellow"))
    for number, media in enumerate(view.sample.images, start=1):
        console.print(Text(f"image {number}: {escape_invisible(str(media))}"))
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for kind, grouped in groupby(view.tokens, key=lambda token: token.kind):
        run = list(grouped)
        text = collapse_repeats(run) if kind == "media" else "".join(token.text for token in run)
        table.add_row(Text(f"{kind:>10} |", STYLES[kind] or "dim"), Text(show_line_breaks(text), STYLES[kind]))
    console.print(table)


def collapse_repeats(tokens: Sequence[Token]) -> str:
    """The text of media tokens, those that repeat as `<image> x 576`."""
    parts = []
    for _, run in groupby(tokens, key=lambda token: token.id):
        same = list(run)
        parts.append(same[0].text if len(same) == 1 else f"{same[0].text} x {len(same)}")
    return " ".join(parts)


def escape_invisible(text: str) -> str:
    """Characters that show nothing, or move what stands beside them, as escapes; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def show_line_breaks(text: str) -> str:
    """As `escape_invisible`, with a mark at the end of each line."""
    return escape_invisible(text).replace("\n", "\u23ce\n").removesuffix("\n")


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


# ---- page


@dataclass(frozen=True)
class _Shown:
    """Tokens that are shown as one: several that make one character, or repeated ones of an image."""

    text: str
    ids: str
    kind: Kind
    times: int = 1


def write_page(view: SampleView, path: Path) -> None:
    """Write a page with the sample's pictures and its tokens, their ids on hover; everything is inside the one file.

    Raises:
        UserError: when the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("mmtune.data.validation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    style = environment.get_template("sample.css").render()
    page = environment.get_template("sample.html.jinja").render(
        row=escape_invisible(view.sample.id),
        summary=view.summary(),
        notes=view.notes,
        pictures=[_picture(media) for media in view.sample.images],
        runs=[(kind, list(_shown(list(run)))) for kind, run in groupby(view.tokens, key=lambda token: token.kind)],
        prompt=escape_invisible(view.prompt),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii"),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _shown(tokens: Sequence[Token]) -> Iterator[_Shown]:
    """Tokens of one kind."""
    if tokens[0].kind == "media":
        for number, run in groupby(tokens, key=lambda token: token.id):
            same = list(run)
            yield _Shown(escape_invisible(same[0].text), str(number), "media", len(same))
        return
    ids: list[str] = []
    for position, token in enumerate(tokens):
        ids.append(str(token.id))
        if token.text or position == len(tokens) - 1:
            yield _Shown(show_line_breaks(token.text) + "\n" * token.text.endswith("\n"), " ".join(ids), token.kind)
            ids = []


def _picture(media: Media) -> dict[str, Any]:
    name = escape_invisible(str(media))
    try:
        image = open_image(media)
    except ValueError as error:
        return {"name": name, "fault": escape_invisible(str(error))}
    size = f"{image.width} x {image.height}"
    small = max(image.size) <= SMALL
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"name": name, "size": size, "small": small, "data": f"data:image/{kind};base64,{data}"}
