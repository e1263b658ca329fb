"""Source reader: the rows of one recipe source, joined with a second file, converted to samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmtune.data.media.image_content import media_key
from mmtune.data.media.image_settings import ImageSettings
from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, Sample
from mmtune.data.sources.source import FileWatch, LazyRow, Row, Rows, default_media_root, open_rows, stream_rows
from mmtune.data.templates.prompts import PromptSettings, draw
from mmtune.data.templates.regions import RowConvention
from mmtune.data.templates.template import DataTemplate, Join, load_data_template, lookup
from mmtune.data.templates.unanswered import without_answers
from mmtune.recipe.recipe import Shots, Source
from mmtune.utils.errors import RecipeValueError, UserError, nearest


class SourceReader:
    """Converts the rows of one source to samples: data template, join, prompt settings and few-shot examples.

    Args:
        source: the recipe's source.
        name: the file name to use in row ids; None uses the file's own name.
        answered: whether every row has an answer; otherwise the last answer of a sample is a placeholder.

    Raises:
        UserError: an unknown template, a missing or unreadable file, or a source setting that the template does not support.
    """

    def __init__(self, source: Source, name: str | None = None, answered: bool = True) -> None:
        self.source = source
        self.template = check_source(source) if answered else without_answers(check_source(source))
        root = Path(source.media_root) if source.media_root else default_media_root(source.path)
        self.rules = MediaRules(root, source.allow_outside_root, source.allow_urls)
        self._name = name
        self._watch = FileWatch()
        words = None if source.verbalizer is None else dict(source.verbalizer)
        self._images = ImageSettings(source.window, source.augment, source.seed)
        self.ignored = frozenset(source.ignore) | {field.split(".")[0] for field in source.where or ()}
        self._prompting = PromptSettings(
            source.seed,
            source.system,
            source.shuffle_options,
            words,
            dict(source.values or {}),
            self.ignored,
            source.image_placeholder == "add",
        )
        join = self.template.join
        self._join_table = None if join is None else _JoinTable(join, source.join or source.path)
        self.held_out_counts: dict[str, int] | None = None
        self._shots = None if source.shots is None else _FewShotExamples(source, source.shots, name)

    def open(self) -> Rows:
        """Open the rows by index: the first `limit` rows that pass `where` and the template's `leave_out_empty`.

        With `held_out` these are the training rows or, for `source.held_out_part()`, the held-out rows, and `held_out_counts`
        is set.
        """
        rows = open_rows(self.source.path, self._name, rows=self.template.rows)
        indices: Sequence[int] = range(len(rows))
        if self._has_filter:
            indices = [index for index in indices if self._passes_filter(partial(rows.__getitem__, index))]
            if not indices:
                where = [f"`where: {_format_where(self.source.where)}`"] if self.source.where else []
                not_empty = [f"a `{field}` that is not empty" for field in (self.template.leave_out_empty,) if field]
                raise UserError(f"{self.source.path}: no row matches {' and '.join([*where, *not_empty])}")
        selected = _RowSubset(rows, indices[: self.source.limit])
        if self.source.held_out is None:
            return selected
        from mmtune.data.sources.held_out_split import split_source  # imports torch, which recipes are checked without

        split = split_source(self.source, selected, self.sample_without_shots)
        self.held_out_counts = split.counts()
        return _RowSubset(selected, (split.held_out if self.source.is_held_out else split.training).tolist())

    def stream(self) -> Iterator[LazyRow]:
        """Stream the same rows, each parsed on demand; with `where`, each row is parsed once more for the filter."""
        rows = stream_rows(self.source.path, self._name, rows=self.template.rows, watch=self._watch)
        return islice(filter(self._passes_filter, rows) if self._has_filter else rows, self.source.limit)

    def sample(self, row_id: str, row: Row, visit: int = 0) -> Sample:
        """Convert a row to a sample, with its few-shot examples before the question.

        Args:
            row_id: the row's id.
            row: the row as read from the file.
            visit: how many times the run used this row before; every visit draws a new augmentation.

        Raises:
            RowError: the row, or a few-shot example drawn for it, cannot be converted.
        """
        sample = self.sample_without_shots(row_id, row, visit)
        if self._shots is None:
            return sample
        start = 1 if sample.messages[0]["role"] == "system" else 0
        examples = [message for example in self._shots.draw_for(row_id, row, sample) for message in example]
        return replace(sample, messages=[*sample.messages[:start], *examples, *sample.messages[start:]], shots=len(examples))

    def sample_without_shots(self, row_id: str, row: Row, visit: int = 0) -> Sample:
        """As `sample`, without few-shot examples. Raises RowError."""
        joined = row if self._join_table is None else self._join_table.join(row_id, row)
        images = replace(self._images, visit=visit)
        return replace(self.template.sample(row_id, joined, self.rules, self._prompting, images), source=self.source.path)

    def fitting_conventions(self, row_id: str, row: Row) -> dict[str, frozenset[RowConvention]]:
        """For each kind of region that the template declares, the conventions in which all of the row's are possible.

        Raises:
            RowError, DataIssueError: the row has no such regions, or no image that can be read.
        """
        joined = row if self._join_table is None else self._join_table.join(row_id, row)
        return self.template.columns().fitting_conventions(row_id, joined, self.rules, self._prompting)

    @property
    def _has_filter(self) -> bool:
        return bool(self.source.where) or self.template.leave_out_empty is not None

    def _passes_filter(self, parse: LazyRow) -> bool:
        try:
            _, row = parse()
        except RowError:
            return True  # the error is raised again, and counted, when the row is read
        not_empty = self.template.leave_out_empty
        if not_empty is not None and row.get(not_empty) == []:
            return False
        return all(_equals_any(lookup(row, field), value) for field, value in (self.source.where or {}).items())


class _RowSubset:
    """Selected rows of a file. Row ids stay those of the file."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        return self._rows[self._indices[index]]


class _JoinTable:
    """A second list of rows, looked up by the value of one field. Only the values and the row indices are kept in memory."""

    def __init__(self, join: Join, path: str) -> None:
        self._join = join
        self._path = path
        self._rows = open_rows(path, rows=join.rows)
        self._field = join.to or join.by
        self._indices: dict[int | str, int] = {}
        self._duplicates: set[int | str] = set()
        for index in range(len(self._rows)):
            try:
                _, joined_row = self._rows[index]
            except RowError as error:
                raise UserError(f"join: {error}") from error
            key = _join_key(joined_row.get(self._field))
            if key is not None and self._indices.setdefault(key, index) != index:
                self._duplicates.add(key)

    def join(self, row_id: str, row: Row) -> Row:
        """The row with the matching row of the second list under `joined`.

        Raises:
            RowError: no row matches, or more than one.
        """
        field, value = self._join.by, row.get(self._join.by)
        key = _join_key(value)
        if key is None:
            raise RowError(
                row_id,
                field,
                f"expected an integer or text that identifies a row of {self._path}, got {value!r}"[:300],
                "field_type" if field in row else "field_missing",
            )
        if "joined" in row:
            raise RowError(
                row_id, "joined", "the row already has a field `joined`, which the join would overwrite; rename it", "field_type"
            )
        if key not in self._indices or key in self._duplicates:
            count = "several rows" if key in self._duplicates else "no row"
            detail = f"expected one row with {self._field}: {value!r} in {self._path}, found {count}"
            raise RowError(row_id, field, detail[:400], "partner_missing")
        return {**row, "joined": self._rows[self._indices[key]][1]}


class _FewShotExamples:
    """Few-shot examples: other rows, of the same or another file, as turns before the question."""

    def __init__(self, source: Source, shots: Shots, name: str | None) -> None:
        self._count = shots.count
        self._path = shots.path
        self._same_file = shots.path == source.path
        self._seed = source.seed
        self._same_image = shots.same_image
        self._reader = SourceReader(_shots_source(source, shots), name if self._same_file else None)
        self._rows = self._reader.open()
        needed = self._count + (self._same_file and shots.where is None)  # the row itself is not its own example
        if len(self._rows) < needed:
            raise UserError(
                f"shots: {shots.path}: expected at least {needed} rows for {self._count} examples, got {len(self._rows)}; "
                "lower `shots.count`"
            )

    def draw_for(self, row_id: str, row: Row, sample: Sample) -> list[list[dict[str, Any]]]:
        """Draw examples for a row: the messages of each, without system messages.

        Args:
            row_id: the row's id.
            row: the row.
            sample: the row without examples. Its function schemas must be those of the examples, and its images are in none of
                them, unless the recipe allows it.

        Raises:
            RowError: an example cannot be converted or has other function schemas, or too few rows differ from this one.
        """
        examples: list[list[dict[str, Any]]] = []
        images = set() if self._same_image else {media_key(image) for image in sample.images}
        for index in _lazy_permutation(len(self._rows), self._seed, row_id):
            if len(examples) == self._count:
                break
            try:
                other_id, other = self._rows[index]
                if other == row or (self._same_file and other_id == row_id):
                    continue
                example = self._reader.sample(other_id, other)
            except RowError as error:
                raise RowError(row_id, "shots", f"few-shot example: {error}", error.issue) from error
            if not images.isdisjoint(map(media_key, example.images)):
                continue
            if example.tools != sample.tools:
                detail = f"few-shot example {other_id}: expected the function schemas of this row; remove `shots` from the source"
                raise RowError(row_id, "shots", detail, "tool_malformed")
            examples.append([message for message in example.messages if message["role"] != "system"])
        if len(examples) < self._count:
            differ = "differ from this one" + (" and are about other images" if images else "")
            detail = f"{self._path}: expected {self._count} rows that {differ}, got {len(examples)}"
            raise RowError(row_id, "shots", detail, "shots_too_few")
        return examples


def _lazy_permutation(count: int, seed: int, row_id: str) -> Iterator[int]:
    """Lazy random permutation of the indices, fixed by the seed and the row id; O(k) for the first k items of a long list."""
    seen: set[int] = set()
    attempt = 0
    while len(seen) < count:
        index = int(draw(seed, row_id, "shots", attempt) * count)
        attempt += 1
        if index not in seen:
            seen.add(index)
            yield index


def _shots_source(source: Source, shots: Shots) -> Source:
    """The source settings for few-shot examples: the keys of `shots`, and those of the source that apply to the same file."""
    same_file, template = shots.path == source.path, shots.template or source.template
    settings: dict[str, Any] = {
        "path": shots.path,
        "template": template,
        "media_root": shots.media_root or (source.media_root if same_file else None),
        "join": shots.join or (source.join if same_file else None),
        "where": shots.where,
        "limit": None,
        "shots": None,
        "system": None,
        "augment": None,
        "held_out": source.held_out if same_file else None,
    }
    if template != source.template:
        settings |= {"verbalizer": None, "shuffle_options": False, "values": None, "image_placeholder": "error", "ignore": ()}
    return source.model_copy(update=settings).training_part()


def check_source(source: Source) -> DataTemplate:
    """Load a source's template and check that it supports the settings of the source. No row is read.

    Raises:
        UserError: an unknown or invalid template.
        RecipeValueError: the template does not support a source setting; its key is that of the setting.
    """
    template = load_data_template(source.template)
    name, verbalizer, join = source.template, template.verbalizer, template.join
    if source.image_placeholder == "add" and (template.conversation is None or template.images is None):
        raise RecipeValueError(
            "image_placeholder", f"`add` needs a template with `conversation` and `images`, and {name} does not have both"
        )
    if source.shuffle_options and template.options is None:
        raise RecipeValueError("shuffle_options", f"the template {name} has no `options` section; remove the line")
    if source.verbalizer is not None and verbalizer is None:
        raise RecipeValueError("verbalizer", f"the template {name} has no `verbalizer` section; remove the line")
    for value in source.values or {}:
        if value not in template.values:
            hint = nearest(value, set(template.values)) if template.values else "; the template has no `values` section"
            raise RecipeValueError("values", f"unknown value '{value}' of the template {name}{hint}")
    if source.join is not None and (join is None or join.same_file):
        raise RecipeValueError("join", f"the template {name} does not join a second file; remove the line")
    if source.join is None and join is not None and not join.same_file:
        raise RecipeValueError("join", f"the template {name} joins a second file; add a line to the source: join: FILE")
    if source.augment is not None and source.augment.moves and (column := template.undeclared_boxes()):
        raise RecipeValueError(
            "augment",
            f"{source.path}: resize, crop and flip would move the image but not the box '{column}', which the template "
            f"{name} writes into its text; declare the box in the template (`boxes`), or remove these three from `augment`",
        )
    if source.shots is not None:
        check_source(_shots_source(source, source.shots))
    return template


def _join_key(value: Any) -> int | str | None:
    """The value if it can identify a row: an integer or text, not a boolean; 1 and "1" are different keys."""
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _equals_any(value: Any, expected: Any) -> bool:
    return any(type(value) is type(item) and value == item for item in (expected if isinstance(expected, list) else [expected]))


def _format_where(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}: {value!r}" for field, value in where.items())


def example_rows(template: DataTemplate, count: int) -> list[Row]:
    """Copies of a template's example row. They differ in an unused field, so that one can be a few-shot example of another."""
    rows = [{**template.example, "copy": number} for number in range(count)]
    if template.rows == "*":
        key = template.example.get("__key__", "row")
        rows = [{**row, "__key__": f"{key}{number}"} for number, row in enumerate(rows)]
    return rows


def write_rows(template: DataTemplate, rows: Sequence[Row], path: Path) -> dict[str, str]:
    """Write rows, and the rows joined with them, in the file structure that a template reads.

    Args:
        template: the template that will read them.
        rows: rows like the template's example.
        path: a `.json` file.

    Returns:
        The keys of a source: `path`, and `join` if the template joins a second file.
    """
    joined = {row["joined"][join.to or join.by]: row["joined"] for row in rows} if (join := template.join) else {}
    document = _to_document(template.rows, [{name: value for name, value in row.items() if name != "joined"} for row in rows])
    keys = {"path": str(path)}
    if join is not None:
        joined_document = _to_document(join.rows, list(joined.values()))
        if join.same_file:
            document |= joined_document
        else:
            keys["join"] = str(path.with_stem(f"{path.stem}_joined"))
            Path(keys["join"]).write_text(json.dumps(joined_document, ensure_ascii=False), encoding="utf-8")
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return keys


def _to_document(rows_key: str | None, rows: list[Row]) -> Any:
    """The JSON document from which a template with `rows: rows_key` reads these rows."""
    if rows_key == "*":
        return {row["__key__"]: {name: value for name, value in row.items() if name != "__key__"} for row in rows}
    return rows if rows_key is None else {rows_key: rows}
