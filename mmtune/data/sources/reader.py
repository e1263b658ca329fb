"""One source of a recipe: its rows, their partners, and what turns each into a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mmtune.data.media.image_settings import ImageSettings
from mmtune.data.media.media import MediaRules
from mmtune.data.message import RowError, Sample
from mmtune.data.sources.source import FileWatch, LazyRow, Row, Rows, default_media_root, open_rows, stream_rows
from mmtune.data.templates.prompts import PromptSettings, draw
from mmtune.data.templates.template import DataTemplate, Join, load_data_template, lookup
from mmtune.recipe.recipe import Shots, Source
from mmtune.utils.errors import RecipeValueError, UserError, nearest


class SourceReader:
    """Rows of one source to samples: template, partners, prompts and few-shot examples.

    Args:
        source: the recipe's source.
        name: stands for the file in the rows' ids; None takes the file's own name.

    Raises:
        UserError: an unknown template, a file that is missing or cannot be read, or a setting that the template does not support.
    """

    def __init__(self, source: Source, name: str | None = None) -> None:
        self.source = source
        self.template = check_source(source)
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
        self._partners = None if self.template.join is None else _Partners(self.template.join, source.join or source.path)
        self._shots = None if source.shots is None else _Shots(source, source.shots, name)

    def open(self) -> Rows:
        """The rows by index; of those that `where` and the template's `leave_out_empty` let pass, the first `limit`."""
        rows = open_rows(self.source.path, self._name, rows=self.template.rows)
        chosen: Sequence[int] = range(len(rows))
        if self._chooses:
            chosen = [index for index in chosen if self._wanted(partial(rows.__getitem__, index))]
            if not chosen:
                wanted = [*([_spelt(self.source.where)] if self.source.where else []), self.template.leave_out_empty]
                raise UserError(f"{self.source.path}: no row has {' and '.join(filter(None, wanted))}")
        return _Chosen(rows, chosen[: self.source.limit])

    def stream(self) -> Iterator[LazyRow]:
        """The same rows in turn, each parsed when it is called for; with `where`, parsed once more to be chosen."""
        rows = stream_rows(self.source.path, self._name, rows=self.template.rows, watch=self._watch)
        return islice(filter(self._wanted, rows) if self._chooses else rows, self.source.limit)

    def sample(self, row_id: str, row: Row, visit: int = 0) -> Sample:
        """The sample of a row, its few-shot examples before it.

        Args:
            row_id: of the row.
            row: as the source holds it.
            visit: how many times the row has trained before, for the draws of `augment`.

        Raises:
            RowError: for a row, or an example drawn for it, that cannot be read.
        """
        sample = self._alone(row_id, row, visit)
        if self._shots is None:
            return sample
        start = 1 if sample.messages[0]["role"] == "system" else 0
        examples = [message for example in self._shots.drawn(row_id, row) for message in example]
        return replace(sample, messages=[*sample.messages[:start], *examples, *sample.messages[start:]])

    def _alone(self, row_id: str, row: Row, visit: int) -> Sample:
        joined = row if self._partners is None else self._partners.join(row_id, row)
        images = replace(self._images, visit=visit)
        return replace(self.template.sample(row_id, joined, self.rules, self._prompting, images), source=self.source.path)

    @property
    def _chooses(self) -> bool:
        return bool(self.source.where) or self.template.leave_out_empty is not None

    def _wanted(self, parse: LazyRow) -> bool:
        try:
            _, row = parse()
        except RowError:
            return True  # it is met again, and counted, where it is read
        needed = self.template.leave_out_empty
        if needed is not None and row.get(needed) == []:
            return False
        return all(_is_among(lookup(row, field), value) for field, value in (self.source.where or {}).items())


class _Chosen:
    """Some of the rows of a file, by index, under their own ids."""

    def __init__(self, rows: Rows, chosen: Sequence[int]) -> None:
        self._rows = rows
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[str, Row]:
        return self._rows[self._chosen[index]]


class _Partners:
    """Another list, looked up by the value of one field. Only that value and the row's place are kept in memory."""

    def __init__(self, join: Join, path: str) -> None:
        self._join = join
        self._path = path
        self._rows = open_rows(path, rows=join.rows)
        self._field = join.to or join.by
        self._places: dict[int | str, int] = {}
        self._several: set[int | str] = set()
        for place in range(len(self._rows)):
            try:
                _, partner = self._rows[place]
            except RowError as error:
                raise UserError(f"join: {error}") from error
            key = _key(partner.get(self._field))
            if key is not None and self._places.setdefault(key, place) != place:
                self._several.add(key)

    def join(self, row_id: str, row: Row) -> Row:
        """The row with its partner under `joined`.

        Raises:
            RowError: when it has no partner, or more than one.
        """
        field, value = self._join.by, row.get(self._join.by)
        key = _key(value)
        if key is None:
            raise RowError(
                row_id,
                field,
                f"expected a number or text that names a row of {self._path}, found {value!r}"[:300],
                "field_type" if field in row else "field_missing",
            )
        if "joined" in row:
            raise RowError(
                row_id, "joined", "the row has a field of this name, which is where its partner would be", "field_type"
            )
        if key not in self._places or key in self._several:
            many = "several rows have" if key in self._several else "no row has"
            raise RowError(row_id, field, f"{many} {self._field} {value!r} in {self._path}"[:400], "partner_missing")
        return {**row, "joined": self._rows[self._places[key]][1]}


class _Shots:
    """Few-shot examples: other rows of a named file, as turns that come before the question."""

    def __init__(self, source: Source, shots: Shots, name: str | None) -> None:
        own = shots.path == source.path
        self._count = shots.count
        self._path = shots.path
        self._same_file = own
        self._seed = source.seed
        self._reader = SourceReader(_source_of(source, shots), name if own else None)
        self._rows = self._reader.open()
        if len(self._rows) < self._count + (own and shots.where is None):
            raise UserError(f"shots: {shots.path} holds {len(self._rows)} rows, too few for {self._count} examples of other rows")

    def drawn(self, row_id: str, row: Row) -> list[list[dict[str, Any]]]:
        """The messages of each example, a system message left out.

        Raises:
            RowError: when an example cannot be read, or too few of the rows differ from this one.
        """
        examples: list[list[dict[str, Any]]] = []
        for place in _permutation(len(self._rows), self._seed, row_id):
            if len(examples) == self._count:
                break
            try:
                other_id, other = self._rows[place]
                if other == row or (self._same_file and other_id == row_id):
                    continue
                messages = self._reader.sample(other_id, other).messages
            except RowError as error:
                raise RowError(row_id, "shots", f"the example {error}", error.issue) from error
            examples.append([message for message in messages if message["role"] != "system"])
        if len(examples) < self._count:
            raise RowError(
                row_id, "shots", f"{self._path} holds {len(examples)} rows unlike this one, not {self._count}", "shots_too_few"
            )
        return examples


def _permutation(count: int, seed: int, row_id: str) -> Iterator[int]:
    """Lazy random permutation of the indices, by seed and row id: O(k) for the first k items."""
    seen: set[int] = set()
    turn = 0
    while len(seen) < count:
        index = int(draw(seed, row_id, "shots", turn) * count)
        turn += 1
        if index not in seen:
            seen.add(index)
            yield index


def _source_of(source: Source, shots: Shots) -> Source:
    """The source that few-shot examples are read by: the shots' own keys, and the source's where they mean the same."""
    own, template = shots.path == source.path, shots.template or source.template
    settings: dict[str, Any] = {
        "path": shots.path,
        "template": template,
        "media_root": shots.media_root or (source.media_root if own else None),
        "join": shots.join or (source.join if own else None),
        "where": shots.where,
        "limit": None,
        "shots": None,
        "system": None,
        "augment": None,
    }
    if template != source.template:
        settings |= {"verbalizer": None, "shuffle_options": False, "values": None, "image_placeholder": "error", "ignore": ()}
    return source.model_copy(update=settings)


def check_source(source: Source) -> DataTemplate:
    """A source's template, checked to be one that can do what the source asks of it. No row is read.

    Raises:
        UserError: the template is unknown or invalid.
        RecipeValueError: the template does not support a setting of the source; its key is the setting's.
    """
    template = load_data_template(source.template)
    name, verbalizer, join = source.template, template.verbalizer, template.join
    if source.image_placeholder == "add" and (template.conversation is None or template.images is None):
        raise RecipeValueError("image_placeholder", f"the template {name} puts images into no conversation of the rows'")
    if source.shuffle_options and template.options is None:
        raise RecipeValueError("shuffle_options", f"the template {name} declares no options to shuffle")
    if source.verbalizer is not None and verbalizer is None:
        raise RecipeValueError("verbalizer", f"the template {name} declares no labels to put into words")
    for value in source.values or {}:
        if value not in template.values:
            hint = nearest(value, set(template.values)) if template.values else "; it has none"
            raise RecipeValueError("values", f"the template {name} has no value '{value}'{hint}")
    if source.join is not None and (join is None or join.same_file):
        raise RecipeValueError("join", f"the template {name} reads no second file")
    if source.join is None and join is not None and not join.same_file:
        raise RecipeValueError("join", f"the template {name} needs a second file; name it in the source: join: FILE")
    if source.augment is not None and source.augment.moves and (written := template.undeclared_boxes()):
        raise RecipeValueError(
            "augment",
            f"{source.path}: resize, crop and flip move the image, and the template {name} writes '{written}' into its "
            "text as it is; declare it in the template (`boxes`), or take these out of `augment`",
        )
    if source.shots is not None:
        check_source(_source_of(source, source.shots))
    return template


def _key(value: Any) -> int | str | None:
    """Whole numbers and texts name partners; 1 and "1" are two names, and true is none."""
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _is_among(value: Any, wanted: Any) -> bool:
    return any(type(value) is type(item) and value == item for item in (wanted if isinstance(wanted, list) else [wanted]))


def _spelt(where: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}: {value!r}" for field, value in where.items())


def example_rows(template: DataTemplate, count: int) -> list[Row]:
    """Copies of a template's example row. They differ in a field that no template reads: each can be an example of another."""
    rows = [{**template.example, "copy": number} for number in range(count)]
    if template.rows == "*":
        key = template.example.get("__key__", "row")
        rows = [{**row, "__key__": f"{key}{number}"} for number, row in enumerate(rows)]
    return rows


def write_rows(template: DataTemplate, rows: Sequence[Row], path: Path) -> dict[str, str]:
    """Write rows, each with its partner, in the layout that a template reads.

    Args:
        template: the template that will read them.
        rows: as the template's example is.
        path: a `.json` file.

    Returns:
        The keys of a source: `path`, and `join` where the template reads a second file.
    """
    partners = {row["joined"][join.to or join.by]: row["joined"] for row in rows} if (join := template.join) else {}
    document = _laid_out(template.rows, [{name: value for name, value in row.items() if name != "joined"} for row in rows])
    keys = {"path": str(path)}
    if join is not None:
        beside = _laid_out(join.rows, list(partners.values()))
        if join.same_file:
            document |= beside
        else:
            keys["join"] = str(path.with_stem(f"{path.stem}_joined"))
            Path(keys["join"]).write_text(json.dumps(beside, ensure_ascii=False), encoding="utf-8")
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return keys


def _laid_out(layout: str | None, rows: list[Row]) -> Any:
    if layout == "*":
        return {row["__key__"]: {name: value for name, value in row.items() if name != "__key__"} for row in rows}
    return rows if layout is None else {layout: rows}
