"""The doctor: every row of the data and the header of every image, in several processes, without decoding any.

What it calls an error is what training would quarantine, because it asks the same code: the data template makes the sample,
images are opened as training opens them, and with a processor at hand the text is encoded too. Only damage inside an image
file can pass here and fail there, unless the images are decoded here as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import ProcessorMixin

from mmtune.console.styled_console import StyledConsole
from mmtune.data.dataset import open_readers
from mmtune.data.encoding.encode import Supervise, over_length_error
from mmtune.data.encoding.over_length import set_image_sizes
from mmtune.data.encoding.token_counts import Size, count_tokens
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import MediaRules, augmented_size
from mmtune.data.message import Message, RowError, Sample, split_question, text_of
from mmtune.data.processes import map_rows
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.rows import ID_FIELDS, id_in_dataset
from mmtune.data.sources.source import Row, Rows, open_rows
from mmtune.data.templates.boxes import BOX_FIELDS
from mmtune.data.templates.template import DataTemplate, load_data_template, shipped_templates
from mmtune.data.templates.unread_media import holds_media
from mmtune.data.validation.issues import ISSUE_TYPES, Issue, issue
from mmtune.data.validation.show_sample import escape_invisible
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError

FORM = (
    *("row_not_json", "row_not_object", "field_missing", "field_type", "template_fails", "role_unknown", "label_unknown"),
    "media_unread",
)
CONTROL_TOKENS = (
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<image>", "<video>", "<audio>", "<|image|>", "<|video|>", "<|audio|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<image_soft_token>"),
    *("<start_of_image>", "<end_of_image>", "<fake_token_around_image>", "<global-img>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
"""Control tokens of well-known models, looked for in the rows' text when the recipe's own tokenizer is not at hand."""

Positions = np.ndarray[Any, np.dtype[np.intp]]
Digests = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class ValidationSettings:
    """What rows are held to besides their templates.

    Attributes:
        processor: the recipe's; None encodes no text.
        max_tokens: the recipe's `data.max_tokens`.
        over_length: the recipe's `data.over_length`.
        supervise: the recipe's `data.supervise`.
        decode: decode every image too.
    """

    processor: ProcessorMixin | None = None
    max_tokens: int | None = None
    over_length: str = "error"
    supervise: Supervise = "all"
    decode: bool = False


@dataclass
class IssueSummary:
    """What was found, counted."""

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    faulty_rows: int = 0
    _faulty: str | None = field(default=None, init=False, repr=False)

    def add(self, found: Issue) -> None:
        """Count an issue; the errors of one row come one after the other."""
        self.counts[found.issue] += 1
        first = self.first.setdefault(found.issue, [])
        if not first:
            self.details[found.issue] = f"{found.field}: {found.detail}"
        if len(first) < 3:
            first.append(found.row)
        if found.severity == "error" and found.row != self._faulty:
            self._faulty = found.row
            self.faulty_rows += 1

    def severities(self) -> dict[str, int]:
        """The number of issues of each severity."""
        totals = dict.fromkeys(("error", "warning", "note"), 0)
        for name, count in self.counts.items():
            totals[ISSUE_TYPES[name].severity] += count
        return totals

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        return {"rows": self.rows, "faulty_rows": self.faulty_rows, "severities": self.severities(), "counts": dict(self.counts)}

    def show(self) -> None:
        """Print each type of issue, the gravest first: how many, the first rows, what the first one says, what to do."""
        table = Table(box=None, show_header=False, pad_edge=False)
        styles = {"error": "bold red", "warning": "yellow", "note": "cyan"}
        for name, kind in ISSUE_TYPES.items():
            if count := self.counts[name]:
                rows = ", ".join(self.first[name]) + (", ..." if count > len(self.first[name]) else "")
                told = Text.assemble(rows, "\n", escape_invisible(self.details[name][:300]), "\n", (kind.fix, "dim"))
                table.add_row(Text(kind.severity, styles[kind.severity]), Text(name), Text(f"{count:,}", justify="right"), told)
        if self.counts:
            StyledConsole().print(table)
        totals = ", ".join(f"{count:,} {severity}{'' if count == 1 else 's'}" for severity, count in self.severities().items())
        print(f"checked: {self.rows:,} rows, {self.faulty_rows:,} cannot train: {totals}")


@dataclass(frozen=True)
class _OpenSource:
    """One source, open."""

    reader: SourceReader
    rows: Rows
    held_out: bool
    known: frozenset[str]


class Validator:
    """Checks every row of some sources."""

    def __init__(self, train: Sequence[Source], held_out: Sequence[Source] = (), rules: ValidationSettings | None = None) -> None:
        """
        Args:
            train: the sources that train.
            held_out: those of the evaluation, which should have no row in common with them.
            rules: what rows are held to.

        Raises:
            UserError: a missing or unreadable file, or an unknown template.
        """
        self._rules = rules or ValidationSettings()
        self._control = _spelling(self._rules.processor)
        # Opened apart, as a run opens them: rows have the ids, and with them the draws, that they have there.
        self._parts = [_open(each, bool(part)) for part, of in enumerate((train, held_out)) for each in open_readers(of)]
        self.rows = sum(len(part.rows) for part in self._parts)

    def issues(self, processes: int | None = None) -> Iterator[Issue]:
        """Everything that is found, source after source and row after row; what comes of comparing rows follows them.

        A bar shows the progress on a terminal.

        Args:
            processes: how many work at once, as `map_rows`.

        Raises:
            UserError: what is wrong with more than a row, such as a model without a chat template.
        """
        compared: list[Digests] = []
        for number, part in enumerate(self._parts):
            digests = np.zeros((2, len(part.rows)), np.uint64)
            unread: dict[str, list[int]] = {}
            checked = map_rows(partial(self._check, part), range(len(part.rows)), processes, "checking rows")
            for position, (found, compare, fields) in enumerate(checked):
                yield from found
                digests[:, position] = compare
                for name in fields:
                    unread.setdefault(name, []).append(position)
            first = {having[0] for having in unread.values()}
            ids = {
                position: self._row_id(number, position) for position in first
            }  # a row is read once, however many fields it has
            for name, having in unread.items():
                yield issue(ids[having[0]], name, "field_unknown", f"{len(having):,} rows have it, this one first")
            earlier, same_id = map(_first_occurrences, digests)
            same_id[earlier >= 0] = -1  # that a copied row has the same id says nothing new
            yield from self._repeated(number, "row", "duplicate_row", earlier)
            yield from self._repeated(number, "id", "duplicate_id", same_id)
            compared.append(digests[0])
        yield from self._held_out(compared)

    def _check(self, part: _OpenSource, position: int) -> tuple[list[Issue], tuple[int, int], list[str]]:
        """Of a row what is found, digests of it and of its own id (0 where there is nothing to compare), and fields not read."""
        try:
            row_id, row = part.rows[position]
        except RowError as error:
            return [_issue_of_error(error)], (0, 0), []
        found: list[Issue] = []
        media = []
        read = row
        try:
            read = part.reader.template.unpacked(row_id, row)
            sample = part.reader.sample(row_id, row)
            media = sample.images
            if part.held_out:
                split_question(sample)
            found += self._sample(sample, read, part.reader.template.boxes is not None, part.held_out)
        except RowError as error:
            found.append(_issue_of_error(error))
        digests = _digest((row, [str(image) for image in media])), _id_digest(read)
        unread = [name for name in read if name not in part.known and not holds_media(name, read[name], bool(media))]
        return found, digests, unread

    def _sample(self, sample: Sample, row: Row, declared: bool, held_out: bool) -> Iterator[Issue]:
        images = sample.images
        sizes: list[Any] = []
        for number, media in enumerate(images):
            report = inspect_image(media, self._rules.decode)
            sizes.append(report.size)
            where = "image" if len(images) == 1 else f"image[{number}]"
            yield from (issue(sample.id, where, name, detail) for name, detail in report.issues)
        told: list[Issue] = []
        for number, message in enumerate(sample.messages):
            told += self._text(sample.id, f"messages[{number}]", message)
        yield from told
        if self._rules.processor is not None and None not in sizes:
            known = [(each.field, each.issue) for each in told]
            yield from (each for each in self._tokens(sample, sizes, held_out) if (each.field, each.issue) not in known)
        if len(sizes) == 1 and sizes[0] is not None and not declared:
            yield from _boxes(sample.id, row, sizes[0])

    def _tokens(self, sample: Sample, sizes: list[Size], held_out: bool) -> Iterator[Issue]:
        """What comes of encoding the text, as training does, with image tokens counted from the images' sizes."""
        rules = self._rules
        assert rules.processor is not None
        shown = [augmented_size(media, size) for media, size in zip(sample.images, sizes, strict=True)]
        sized = replace(sample, messages=set_image_sizes(sample.messages, shown))
        try:
            counts = count_tokens(sized, rules.processor, rules.supervise)
        except RowError as error:
            yield _issue_of_error(error)
            return
        if counts.supervised == 0:
            yield issue(sample.id, "messages", "nothing_supervised", f"none of {counts.tokens:,} tokens is an answer's")
        if not held_out and rules.max_tokens is not None and counts.tokens > rules.max_tokens:
            kind = "too_long" if rules.over_length == "error" else "too_long_by_policy"
            yield issue(sample.id, "messages", kind, over_length_error(sample.id, counts.tokens, rules.max_tokens).detail)

    def _text(self, row_id: str, where: str, message: Message) -> Iterator[Issue]:
        text = text_of(message)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            yield issue(row_id, where, "text_not_unicode", f"the text is not valid Unicode: {error}")
        if "\0" in text:
            yield issue(row_id, where, "text_nul", f"{text.count(chr(0))} NUL characters")
        if spelt := sorted(set(self._control.findall(text))):
            yield issue(row_id, where, "control_token", f"the text spells {', '.join(spelt)}")

    def _repeated(self, number: int, where: str, kind: str, earlier: Positions) -> Iterator[Issue]:
        for position in np.flatnonzero(earlier >= 0).tolist():
            told = f"the same as that of {self._row_id(number, int(earlier[position]))}"
            yield issue(self._row_id(number, position), where, kind, told)

    def _held_out(self, digests: list[Digests]) -> Iterator[Issue]:
        """The rows of the evaluation that train as well."""
        trains = [number for number, part in enumerate(self._parts) if not part.held_out]
        for number, part in enumerate(self._parts):
            for other in trains if part.held_out else ():
                both, here, there = np.intersect1d(digests[number], digests[other], return_indices=True)
                for position, twin in sorted(zip(here[both != 0].tolist(), there[both != 0].tolist(), strict=True)):
                    told = f"also in the training data: {self._row_id(other, twin)}"
                    yield issue(self._row_id(number, position), "row", "row_held_out", told)

    def _row_id(self, number: int, position: int) -> str:
        return self._parts[number].rows[position][0]


def _open(reader: SourceReader, held_out: bool) -> _OpenSource:
    rows = reader.open()
    known = reader.template.fields_read | reader.ignored | {*reader.template.ignore, *ID_FIELDS, *BOX_FIELDS}
    return _OpenSource(reader, rows, held_out, frozenset(known))


def _issue_of_error(error: RowError) -> Issue:
    return issue(error.row, error.field, error.issue, error.detail)


def guess_template(path: str) -> str:
    """The shipped data template that reads a file's first rows best.

    Args:
        path: a file of rows, as a source names it.

    Raises:
        UserError: a file that cannot be read, or none or several that read it equally well.
    """
    scores: dict[str, tuple[int, float]] = {}
    unread = ""
    for name in shipped_templates():
        template = load_data_template(name)
        try:
            rows = open_rows(path, rows=template.rows)
        except UserError as error:
            if template.rows is None or not unread:
                unread = str(error)
            continue
        scores[name] = _fit(template, rows)
    if not scores:
        raise UserError(unread)
    best = [name for name, score in scores.items() if score == max(scores.values()) and score[0]]
    if len(best) != 1:
        found = f"{', '.join(best)} read it equally well" if best else f"none of those that ship reads {_described(path)}"
        raise UserError(f"{path}: which data template? {found}; name one with --template")
    return best[0]


def _described(path: str) -> str:
    try:
        _, row = open_rows(path)[0]
    except RowError:  # not an object, or cut short: no template reads that
        raise
    except UserError:  # rows that only a template finds, under a key
        return "its first rows"
    return f"rows with the fields {', '.join(map(str, row))} (docs/data_templates.md says what each reads)"


def _fit(template: DataTemplate, rows: Rows) -> tuple[int, float]:
    """How many of the first rows have the template's form, and how alike their fields are to its example's."""
    read, alike = 0, 0.0
    rules = MediaRules(Path())  # that a medium is missing here says nothing of the form
    for index in range(min(len(rows), 20)):
        try:
            row_id, row = rows[index]
            alike += len(row.keys() & template.example.keys()) / len(row.keys() | template.example.keys())
            template.sample(row_id, row, rules)
        except RowError as error:
            read += error.issue not in FORM
        else:
            read += 1
    return read, round(alike, 6)


def _spelling(processor: ProcessorMixin | None) -> re.Pattern[str]:
    """Matches the control tokens that text should not spell."""
    tokens: set[str] = set(CONTROL_TOKENS)
    if processor is not None:
        added = processor.tokenizer.added_tokens_decoder.values()
        template = str(processor.chat_template)
        tokens = {*processor.tokenizer.all_special_tokens, *(t.content for t in added if t.special or t.content in template)}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _first_occurrences(digests: Digests) -> Positions:
    """For each digest the first position that has the same one, if that is an earlier position; else -1."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    earlier = first[inverse]
    earlier[(earlier == np.arange(len(digests))) | (digests == 0)] = -1
    return earlier


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


def _plain(value: Any) -> str:
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else str(value)


def _id_digest(row: Row) -> int:
    given = id_in_dataset(row)
    return 0 if given is None else _digest(given)


def _boxes(row_id: str, row: Row, size: tuple[int, int]) -> Iterator[Issue]:
    """Fields that look like boxes and that the template does not read: outside the image in either layout."""
    for name in BOX_FIELDS:
        given: Any = row.get(name)
        several = isinstance(given, list) and bool(given) and all(isinstance(box, list) for box in given)
        boxes: list[Any] = given if several else [given]
        for number, box in enumerate(boxes):
            numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)
            if numbers and not _inside(box, size):
                where = f"{name}[{number}]" if several else name
                yield issue(row_id, where, "box_suspect", f"{box} in an image of {size[0]} x {size[1]} pixels")


def _inside(box: list[float], size: tuple[int, int]) -> bool:
    left, top, third, fourth = box
    if not all(math.isfinite(edge) and edge >= 0 for edge in box):
        return False
    corners = left < third <= size[0] and top < fourth <= size[1]
    return corners or (left + third <= size[0] and top + fourth <= size[1])
