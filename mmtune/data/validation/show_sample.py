"""View of one encoded sample, token by token: in the terminal and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmtune.chat_templates.rendering import render_prompt
from mmtune.console.styled_console import StyledConsole
from mmtune.data.dataset import open_readers
from mmtune.data.encoding.encode import (
    EncodedText,
    OverLength,
    chat_template_of,
    encode_prompt_text,
    encode_text,
    to_template_messages,
)
from mmtune.data.encoding.native_regions import with_native_regions
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.encoding.token_counts import sample_replacements
from mmtune.data.media.media import ImageView
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.rows import Row, id_in_dataset
from mmtune.data.templates.regions import Region, pixels
from mmtune.recipe.recipe import DataSection, Source
from mmtune.utils.errors import UserError

Kind = Literal["prompt", "supervised", "media", "padding"]
STYLES = {"prompt": "", "supervised": "bold green", "media": "cyan"}
REPLACEMENT_CHARACTER = "\ufffd"
"""The text that a tokenizer decodes from an incomplete character."""


@dataclass(frozen=True)
class Token:
    """One token.

    Attributes:
        id: the token id.
        text: the text that it adds to the decoded text; a character of several tokens belongs to the last of them.
        kind: `supervised` if the loss includes it, `media` if it belongs to an expanded image placeholder, `padding` in a
            batch, else `prompt`.
    """

    id: int
    text: str
    kind: Kind


@dataclass(frozen=True)
class SampleView:
    """One encoded sample.

    Attributes:
        sample: the sample, with fewer or smaller images if the recipe's `data.over_length` requires it.
        tokens: all its tokens.
        prompt: the rendered text up to the start of the last answer, with one placeholder for each image.
        notes: changes that the recipe makes to the sample because of its length, and to its images.
    """

    sample: Sample
    tokens: list[Token]
    prompt: str
    notes: list[str]

    def regions_of(self, image: int) -> tuple[Region, ...]:
        """The declared regions in the image of a number, from 0: they are in the row's own one, after those of examples."""
        return self.sample.regions if self.sample.own_images and image == len(self.sample.images) - 1 else ()

    def as_json(self) -> dict[str, Any]:
        """The row's id and its tokens."""
        return {"row": self.sample.id, "tokens": [{"id": t.id, "text": t.text, "kind": t.kind} for t in self.tokens]}

    def summary(self) -> str:
        """The number of tokens of each kind."""
        counts = [f"{sum(token.kind == kind for token in self.tokens):,} {kind}" for kind in ("supervised", "prompt", "media")]
        return f"{len(self.tokens):,} tokens: {', '.join(counts)}"


def find_sample(train: Sequence[Source], held_out: Sequence[Source], row_id: str) -> Sample:
    """Find the row with an id, and convert it to a sample as in a run.

    Args:
        train: the training sources, which are searched first.
        held_out: the evaluation sources.
        row_id: the row id of messages and reports, such as `train.json[17]`, or the value of the row's id field (`id`,
            `question_id`, ...).

    Raises:
        UserError: no row has the id, or several rows have it in their id field.
        RowError: the row cannot be read.
    """
    example = ""
    matches: dict[str, tuple[SourceReader, Row]] = {}
    for reader in (*open_readers(train), *open_readers(held_out)):
        rows = reader.open()
        for index in _likely_first(row_id, len(rows)):
            try:
                candidate_id, row = rows[index]
            except RowError as error:
                if error.row == row_id:
                    raise
                continue
            if candidate_id == row_id:
                return reader.sample(candidate_id, row)
            example = candidate_id
            # A row of a shard can have the id field in its `json` member.
            ids = [id_in_dataset(each) for each in (row, row.get("json")) if isinstance(each, dict)]
            if row_id in [str(each) for each in ids if each is not None]:
                matches[candidate_id] = (reader, row)
    if len(matches) > 1:
        ids_of_matches = ", ".join([*matches][:10]) + ", ..." * (len(matches) > 10)
        raise UserError(f"{len(matches)} rows have {row_id!r} in their id field; choose one of the row ids {ids_of_matches}")
    for candidate_id, (reader, row) in matches.items():
        return reader.sample(candidate_id, row)
    raise UserError(f"no row has the id {row_id!r}; expected an id such as {example!r}")


def _likely_first(row_id: str, count: int) -> Iterator[int]:
    """Every index, starting with those that match the number in the row id."""
    number = re.search(r"(\d+)\]?$", row_id)
    likely = [index for index in (int(number[1]) - 1, int(number[1])) if 0 <= index < count] if number else []
    yield from likely
    yield from (index for index in range(count) if index not in likely)


def view_sample(sample: Sample, processor: ProcessorMixin, section: DataSection) -> SampleView:
    """Encode a sample as in training, without decoding its images.

    Args:
        sample: the sample.
        processor: the model's processor.
        section: the recipe's data section, for `supervise`, `max_tokens` and `over_length`.

    Raises:
        RowError: the sample cannot be encoded.
    """
    notes = []
    if section.max_tokens is not None:
        try:
            fitted = fit_to_budget(sample, processor, section.max_tokens, section.over_length, section.supervise)
        except OverLength as error:
            notes.append(f"not used in training: {error.detail} (data.over_length: {section.over_length})")
        else:
            sample = fitted.sample
            notes += [f"{fitted.dropped} images dropped to fit data.max_tokens"] if fitted.dropped else []
            notes += [f"{fitted.resized} images resized to fit data.max_tokens"] if fitted.resized else []
    if any(isinstance(image, ImageView) and image.augmentation is not None for image in sample.images):
        notes.append("images have the augmentation of the first visit; every later visit draws a new one")
    sample = with_native_regions(sample, processor)
    replacements = sample_replacements(sample, processor)
    encoded = encode_text(sample.id, sample.messages, processor, replacements, section.supervise, sample.tools)
    return SampleView(sample, _tokens(encoded, processor), _rendered(sample, sample.messages[:-1], processor), notes)


def view_prompt(sample: Sample, processor: ProcessorMixin) -> SampleView:
    """Encode all messages of a sample as `encode_prompt` does, without decoding its images.

    Raises:
        RowError: the sample cannot be encoded.
    """
    replacements = sample_replacements(sample, processor)
    encoded = encode_prompt_text(sample.id, sample.messages, processor, replacements, sample.tools)
    return SampleView(sample, _tokens(encoded, processor), _rendered(sample, sample.messages, processor), [])


def _tokens(encoded: EncodedText, processor: ProcessorMixin) -> list[Token]:
    kinds: list[Kind] = [
        "media" if media else "supervised" if supervised else "prompt" for _, media, supervised in encoded.tokens()
    ]
    input_ids = [token for token, _, _ in encoded.tokens()]
    texts = token_texts(processor.tokenizer, input_ids)
    return [Token(*each) for each in zip(input_ids, texts, kinds, strict=True)]


def _rendered(sample: Sample, messages: list[Message], processor: ProcessorMixin) -> str:
    template_messages = to_template_messages(sample.id, messages)
    return render_prompt(template_messages, chat_template_of(processor), processor.tokenizer, sample.tools)


def token_texts(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[str]:
    """The text that each token adds to the decoded text; joined, they are the decoded text.

    A character of several tokens belongs to the last of them. A token is decoded together with the previous one, because many
    tokenizers strip a leading space.
    """

    def decoded(start: int, end: int) -> str:
        text = tokenizer.decode(input_ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    texts = []
    start = done = 0  # tokens from `start` on are decoded together; the texts of tokens before `done` are in `texts`
    for end in range(1, len(input_ids) + 1):
        before, now = decoded(start, done), decoded(start, end)
        if now.endswith(REPLACEMENT_CHARACTER) and end < len(input_ids):
            after = decoded(start, end + 1)
            if not (after.startswith(now) and len(after) > len(now)):  # the next token changes it: the character was incomplete
                texts.append("")
                continue
        texts.append(now[len(before) :])
        start, done = done, end
    return texts


# ---- terminal


def print_sample(view: SampleView, console: Console | None = None) -> None:
    """Print a sample as runs of tokens of one kind, each with the name of its kind, so that it is readable without colours."""
    console = console or StyledConsole(highlight=False)
    console.print(Text(escape_invisible(view.sample.id), "bold"))
    console.print(Text(view.summary()))
    for note in view.notes:
        console.print(Text(note, "yellow"))
    for number, media in enumerate(view.sample.images, start=1):
        console.print(Text(f"image {number}: {escape_invisible(str(media))}"))
        for region in view.regions_of(number - 1):
            console.print(Text(f"  {region.kind} {pixels(region)}, in pixels of {region.width} x {region.height}"))
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for kind, grouped in groupby(view.tokens, key=lambda token: token.kind):
        run = list(grouped)
        text = collapse_repeats(run) if kind == "media" else "".join(token.text for token in run)
        table.add_row(Text(f"{kind:>10} |", STYLES[kind] or "dim"), Text(show_line_breaks(text), STYLES[kind]))
    console.print(table)


def collapse_repeats(tokens: Sequence[Token]) -> str:
    """The text of media tokens, with repeated ones as `<image> x 576`."""
    parts = []
    for _, run in groupby(tokens, key=lambda token: token.id):
        same = list(run)
        parts.append(same[0].text if len(same) == 1 else f"{same[0].text} x {len(same)}")
    return " ".join(parts)


def escape_invisible(text: str) -> str:
    """The text with invisible and control characters as escapes, except line breaks."""
    return "".join(char if char.isprintable() or char == "\n" else _escape(char) for char in text)


def show_line_breaks(text: str) -> str:
    """Like `escape_invisible`, with a visible symbol at the end of each line."""
    return escape_invisible(text).replace("\n", "\u23ce\n").removesuffix("\n")


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
