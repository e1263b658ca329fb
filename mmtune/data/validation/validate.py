"""Data validation: checks of every row and of the header of every image, in several processes, without decoding images.

An error is what training would quarantine, because both use the same code: the data template converts the row, images are opened
in the same way, and with a processor the text is encoded too. Only damage inside an image file is found later, unless images are
decoded here as well.
"""

from __future__ import annotations

import hashlib
import json
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

from mmtune.chat_templates.jinja_rendering import control_tokens
from mmtune.console.styled_console import StyledConsole
from mmtune.data.dataset import open_readers
from mmtune.data.encoding.encode import Supervise, chat_template_of, over_length_error
from mmtune.data.encoding.over_length import set_image_sizes
from mmtune.data.encoding.token_counts import Size, count_tokens
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import MediaRules, augmented_size
from mmtune.data.message import Message, RowError, Sample, all_text_of, split_question
from mmtune.data.processes import map_rows
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.rows import ID_FIELDS, id_in_dataset
from mmtune.data.sources.source import Row, Rows, open_rows
from mmtune.data.templates.regions import BOX_FIELDS
from mmtune.data.templates.template import DataTemplate, load_data_template, shipped_templates
from mmtune.data.templates.unanswered import without_answers
from mmtune.data.templates.unread_media import holds_media
from mmtune.data.validation.issues import ISSUE_TYPES, Issue, new_issue
from mmtune.data.validation.leakage import LEAKS, Digests, LeakageSearch, row_digests
from mmtune.data.validation.region_checks import ConventionCounts, RowConventions, row_conventions, suspect_boxes
from mmtune.data.validation.show_sample import escape_invisible
from mmtune.recipe.recipe import Source
from mmtune.utils.errors import UserError, nearest

FORMAT_ISSUES = (
    *("row_not_json", "row_not_object", "field_missing", "field_type", "template_fails", "role_unknown", "label_unknown"),
    "media_unread",
)
"""Issue types that mean that a row has another format than the data template."""
CONTROL_TOKENS = (
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<image>", "<video>", "<audio>", "<|image|>", "<|video|>", "<|audio|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<image_soft_token>"),
    *("<start_of_image>", "<end_of_image>", "<fake_token_around_image>", "<global-img>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
"""Control tokens of well-known models, for checking the rows' text without the recipe's tokenizer."""

Positions = np.ndarray[Any, np.dtype[np.intp]]
RowHashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of data validation.

    Attributes:
        processor: the recipe's processor; None to check without encoding the text.
        max_tokens: the recipe's `data.max_tokens`.
        over_length: the recipe's `data.over_length`.
        supervise: the recipe's `data.supervise`.
        decode: decode every image.
        leakage: the recipe's `evaluate.leakage`.
    """

    processor: ProcessorMixin | None = None
    max_tokens: int | None = None
    over_length: str = "error"
    supervise: Supervise = "all"
    decode: bool = False
    leakage: str = "error"


@dataclass
class IssueSummary:
    """Counts and first rows of the issues, by type."""

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    faulty_rows: int = 0
    leaked_rows: int = 0
    _last_faulty_row: str | None = field(default=None, init=False, repr=False)

    def add(self, issue: Issue) -> None:
        """Count an issue. The issues of one row must be added in succession."""
        self.counts[issue.issue] += 1
        first = self.first.setdefault(issue.issue, [])
        if not first:
            self.details[issue.issue] = f"{issue.field}: {issue.detail}"
        if len(first) < 3:
            first.append(issue.row)
        if issue.issue in LEAKS:
            self.leaked_rows += 1
        elif issue.severity == "error" and issue.row != self._last_faulty_row:
            self._last_faulty_row = issue.row
            self.faulty_rows += 1

    def severities(self) -> dict[str, int]:
        """The number of issues of each severity."""
        totals = dict.fromkeys(("error", "warning", "note"), 0)
        for name, count in self.counts.items():
            totals[ISSUE_TYPES[name].severity] += count
        return totals

    def as_json(self) -> dict[str, Any]:
        """The counts as a JSON object."""
        return {
            "rows": self.rows,
            "faulty_rows": self.faulty_rows,
            "leaked_rows": self.leaked_rows,
            "severities": self.severities(),
            "counts": dict(self.counts),
        }

    def failure(self) -> str | None:
        """What makes the check fail; None if it passes."""
        faults = [f"{self.faulty_rows:,} of {self.rows:,} rows cannot train"] * bool(self.faulty_rows)
        faults += [f"{self.leaked_rows:,} held-out rows leak into the training data"] * bool(self.leaked_rows)
        return " and ".join(faults) or None

    def show(self) -> None:
        """Print the issues by type, the most severe first: count, first rows, first detail, and fix."""
        table = Table(box=None, show_header=False, pad_edge=False)
        styles = {"error": "bold red", "warning": "yellow", "note": "cyan"}
        for name, issue_type in ISSUE_TYPES.items():
            if count := self.counts[name]:
                rows = ", ".join(self.first[name]) + (", ..." if count > len(self.first[name]) else "")
                detail = escape_invisible(self.details[name][:300])
                description = Text.assemble(rows, "\n", detail, "\n", (issue_type.fix, "dim"))
                severity = Text(issue_type.severity, styles[issue_type.severity])
                table.add_row(severity, Text(name), Text(f"{count:,}", justify="right"), description)
        if self.counts:
            StyledConsole().print(table)
        totals = ", ".join(f"{count:,} {severity}{'' if count == 1 else 's'}" for severity, count in self.severities().items())
        leaked = f", {self.leaked_rows:,} held out and in the training data" if self.leaked_rows else ""
        print(f"checked: {self.rows:,} rows, {self.faulty_rows:,} cannot train{leaked}: {totals}")


@dataclass(frozen=True)
class _OpenSource:
    """An open source and the fields that its template reads."""

    reader: SourceReader
    rows: Rows
    held_out: bool
    known_fields: frozenset[str]

    def to_compare(self, row_id: str, row: Row) -> Sample:
        """The sample of a row; of a held-out row without few-shot examples, which may be training rows."""
        return (self.reader.sample_without_shots if self.held_out else self.reader.sample)(row_id, row)


_CheckedRow = tuple[list[Issue], tuple[int, int], list[str], Digests | None, RowConventions | None]


class Validator:
    """Checks every row of training and evaluation sources."""

    def __init__(
        self, train: Sequence[Source], held_out: Sequence[Source] = (), settings: ValidationSettings | None = None
    ) -> None:
        """
        Args:
            train: the training sources.
            held_out: the evaluation sources, which should have no row in common with the training sources.
            settings: validation settings.

        Raises:
            UserError: a missing or unreadable file, or an unknown template.
        """
        self._settings = settings or ValidationSettings()
        self._control_tokens = _control_token_pattern(self._settings.processor)
        # Opened separately, as in a run, so that the row ids (and the random draws that depend on them) are the same.
        self._sources = [_open_source(reader, held_out=False) for reader in open_readers(train)]
        self._sources += [_open_source(reader, held_out=True) for reader in open_readers(held_out)]
        self.rows = sum(len(source.rows) for source in self._sources)
        self.held_out = {
            reader.source.path: reader.held_out_counts
            for reader in (source.reader for source in self._sources if not source.held_out)
            if reader.held_out_counts is not None
        }
        """By path of a training source with `held_out`: the counts of its split."""
        self._compares_sides = len({source.held_out for source in self._sources}) == 2

    def issues(self, processes: int | None = None) -> Iterator[Issue]:
        """All issues, source by source and row by row; duplicates of a source follow its rows.

        A progress bar is shown on a terminal.

        Args:
            processes: number of processes, as in `map_rows`.

        Raises:
            UserError: an error that is not about a single row, such as a missing chat template.
        """
        search = LeakageSearch(self._load, self._settings.leakage == "warn")
        for number, source in sorted(enumerate(self._sources), key=lambda item: not item[1].held_out):
            digests = np.zeros((2, len(source.rows)), np.uint64)
            unknown_fields: dict[str, list[int]] = {}
            conventions = ConventionCounts(source.reader.template.regions)
            results = map_rows(partial(self._check, source), range(len(source.rows)), processes, "checking rows")
            for position, (issues, row_and_id_digest, fields, compared, fitting) in enumerate(results):
                yield from issues
                if fitting is not None:
                    conventions.add(self._row_id(number, position), fitting, issues)
                if compared is not None and source.held_out:
                    search.add_held_out(number, position, compared, source.reader.source.is_held_out)
                elif compared is not None:
                    search.add_training(number, position, compared)
                digests[:, position] = row_and_id_digest
                for name in fields:
                    unknown_fields.setdefault(name, []).append(position)
            yield from conventions.issues()
            # A row is read once, even if it is the first one with several fields.
            ids = {position: self._row_id(number, position) for position in {rows[0] for rows in unknown_fields.values()}}
            for name, rows in unknown_fields.items():
                yield new_issue(ids[rows[0]], name, "field_unknown", f"in {len(rows):,} rows, first in this one")
            same_row, same_id = map(_first_occurrences, digests)
            same_id[same_row >= 0] = -1  # a copied row also has the same id
            yield from self._duplicates(number, "row", "duplicate_row", same_row)
            yield from self._duplicates(number, "id", "duplicate_id", same_id)
        yield from search.issues()
        yield from search.near_duplicates(processes)

    def _check(self, source: _OpenSource, position: int) -> _CheckedRow:
        """Check one row.

        Returns:
            Its issues; the digests of the row and of its id (0 if there is none); its unknown fields; if there are training and
            held-out rows, the digests that are compared between them; and the conventions that fit its regions, if it has any.
        """
        try:
            row_id, row = source.rows[position]
        except RowError as error:
            return [_issue_of_error(error)], (0, 0), [], None, None
        issues: list[Issue] = []
        media = []
        unpacked = row
        try:
            unpacked = source.reader.template.unpack_shard_row(row_id, row)
            sample = source.reader.sample(row_id, row)
            media = sample.images
            if source.held_out:
                split_question(sample)
            issues += self._check_sample(sample, unpacked, source.held_out)
        except RowError as error:
            issues.append(_issue_of_error(error))
        digests = _digest((row, [str(image) for image in media])), _id_digest(unpacked)
        compared = None
        if self._compares_sides and not any(issue.severity == "error" for issue in issues):
            try:
                images, pairs = row_digests(source.to_compare(row_id, row))
            except RowError as error:
                issues.append(_issue_of_error(error))
            else:  # a copied row is found by its own digest too: its template may draw another prompt for it
                compared = images, (*(pairs[-1:] if source.held_out else pairs), digests[0].to_bytes(8))
        fields = [
            name
            for name in unpacked
            if name not in source.known_fields and not holds_media(name, unpacked[name], provenance=bool(media))
        ]
        return issues, digests, fields, compared, row_conventions(source.reader, position, len(source.rows), row_id, row)

    def _check_sample(self, sample: Sample, row: Row, held_out: bool) -> Iterator[Issue]:
        images = sample.images
        sizes: list[Any] = []
        for number, media in enumerate(images):
            report = inspect_image(media, self._settings.decode)
            sizes.append(report.size)
            where = "image" if len(images) == 1 else f"image[{number}]"
            yield from (new_issue(sample.id, where, name, detail) for name, detail in report.issues)
        text_issues: list[Issue] = []
        for number, message in enumerate(sample.messages):
            text_issues += self._check_text(sample.id, f"messages[{number}]", message)
        text_issues += _undeclared_calls(sample)
        yield from text_issues
        if self._settings.processor is not None and None not in sizes:
            reported = [(issue.field, issue.issue) for issue in text_issues]
            token_issues = self._check_tokens(sample, sizes, held_out)
            yield from (issue for issue in token_issues if (issue.field, issue.issue) not in reported)
        if len(sizes) == 1 and sizes[0] is not None and not sample.regions:
            yield from suspect_boxes(sample.id, row, sizes[0])

    def _check_tokens(self, sample: Sample, sizes: list[Size], held_out: bool) -> Iterator[Issue]:
        """Issues of encoding the text as in training, with image tokens counted from the image sizes."""
        settings = self._settings
        assert settings.processor is not None
        final_sizes = [augmented_size(media, size) for media, size in zip(sample.images, sizes, strict=True)]
        sized = replace(sample, messages=set_image_sizes(sample.messages, final_sizes))
        try:
            counts = count_tokens(sized, settings.processor, settings.supervise)
        except RowError as error:
            yield _issue_of_error(error)
            return
        if counts.supervised == 0:
            detail = f"expected supervised tokens, got none among {counts.tokens:,} tokens"
            yield new_issue(sample.id, "messages", "nothing_supervised", detail)
        if not held_out and settings.max_tokens is not None and counts.tokens > settings.max_tokens:
            issue_type = "too_long" if settings.over_length == "error" else "too_long_by_policy"
            detail = over_length_error(sample.id, counts.tokens, settings.max_tokens).detail
            yield new_issue(sample.id, "messages", issue_type, detail)

    def _check_text(self, row_id: str, where: str, message: Message) -> Iterator[Issue]:
        text = all_text_of(message)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            yield new_issue(row_id, where, "text_not_unicode", f"the text is not valid Unicode: {error}")
        if "\0" in text:
            yield new_issue(row_id, where, "text_nul", f"the text has {text.count(chr(0))} NUL characters")
        if tokens := sorted(set(self._control_tokens.findall(text))):
            yield new_issue(row_id, where, "control_token", f"the text contains {', '.join(tokens)}")

    def _duplicates(self, number: int, where: str, issue_type: str, first_occurrences: Positions) -> Iterator[Issue]:
        for position in np.flatnonzero(first_occurrences >= 0).tolist():
            detail = f"the same as in {self._row_id(number, int(first_occurrences[position]))}"
            yield new_issue(self._row_id(number, position), where, issue_type, detail)

    def _load(self, number: int, position: int) -> Sample:
        source = self._sources[number]
        return source.to_compare(*source.rows[position])

    def _row_id(self, number: int, position: int) -> str:
        return self._sources[number].rows[position][0]


def _open_source(reader: SourceReader, held_out: bool) -> _OpenSource:
    known = reader.template.fields_read | reader.ignored | {*reader.template.ignore, *ID_FIELDS, *BOX_FIELDS}
    return _OpenSource(reader, reader.open(), held_out, frozenset(known))


def _issue_of_error(error: RowError) -> Issue:
    return new_issue(error.row, error.field, error.issue, error.detail)


def guess_template(path: str, answered: bool = True) -> str:
    """The name of the shipped data template that fits a file's first rows best.

    Args:
        path: the path of a source.
        answered: whether every row has an answer.

    Raises:
        UserError: the file cannot be read, or no template or several templates fit it.
    """
    scores: dict[str, tuple[int, float]] = {}
    read_error = ""
    for name in shipped_templates():
        template = load_data_template(name) if answered else without_answers(load_data_template(name))
        try:
            rows = open_rows(path, rows=template.rows)
        except UserError as error:
            if template.rows is None or not read_error:
                read_error = str(error)
            continue
        scores[name] = _template_fit(template, rows)
    if not scores:
        raise UserError(read_error)
    best = [name for name, score in scores.items() if score == max(scores.values()) and score[0]]
    if len(best) != 1:
        reason = f"{', '.join(best)} fit equally well" if best else f"no shipped template reads {_describe_rows(path)}"
        raise UserError(f"{path}: cannot choose a data template: {reason}; set --template")
    return best[0]


def _describe_rows(path: str) -> str:
    try:
        _, row = open_rows(path)[0]
    except RowError:  # not an object, or truncated: no template can read it
        raise
    except UserError:  # rows under a key, which only some templates read
        return "its first rows"
    return f"rows with the fields {', '.join(map(str, row))} (see docs/data_templates.md for the fields of each template)"


def _template_fit(template: DataTemplate, rows: Rows) -> tuple[int, float]:
    """The number of first rows in the template's format, and the similarity of their fields to its example."""
    fitting, similarity = 0, 0.0
    rules = MediaRules(Path())  # missing media are not an issue of the format
    for index in range(min(len(rows), 20)):
        try:
            row_id, row = rows[index]
            similarity += len(row.keys() & template.example.keys()) / len(row.keys() | template.example.keys())
            template.sample(row_id, row, rules)
        except RowError as error:
            fitting += error.issue not in FORMAT_ISSUES
        else:
            fitting += 1
    return fitting, round(similarity, 6)


def _control_token_pattern(processor: ProcessorMixin | None) -> re.Pattern[str]:
    """A pattern of the control tokens that a row's text should not contain."""
    if processor is not None:
        return control_tokens(processor.tokenizer, chat_template_of(processor)).anywhere
    return re.compile("|".join(re.escape(token) for token in sorted(CONTROL_TOKENS, key=len, reverse=True)))


def _first_occurrences(digests: RowHashes) -> Positions:
    """For each digest the position of its first occurrence; -1 if that is the digest itself, or the digest is 0."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    first_positions = first[inverse]
    first_positions[(first_positions == np.arange(len(digests))) | (digests == 0)] = -1
    return first_positions


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=_json_default)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) or 1


def _json_default(value: Any) -> str:
    return hashlib.blake2b(value).hexdigest() if isinstance(value, bytes) else str(value)


def _id_digest(row: Row) -> int:
    value = id_in_dataset(row)
    return 0 if value is None else _digest(value)


def _undeclared_calls(sample: Sample) -> Iterator[Issue]:
    """Issues of calls of functions that the row's schemas, if it has any, do not declare."""
    declared = {tool["function"]["name"] for tool in sample.tools}
    for number, message in enumerate(sample.messages if declared else ()):
        for name in (call["function"]["name"] for call in message.get("tool_calls", ())):
            if name not in declared:
                detail = f"a call of {name!r}, which the row's tools do not declare" + nearest(name, declared)
                yield new_issue(sample.id, f"messages[{number}]", "tool_undeclared", detail)
