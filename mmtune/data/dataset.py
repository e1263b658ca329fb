"""The training rows: of every source, encoded lazily in data-loader workers, a faulty one set aside by its id."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from mmtune.data.data_report import DataReport, MediaChanged, StopRunError
from mmtune.data.encoding.encode import IGNORE_INDEX, OverLength, encode_sample
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import Media, blank_image
from mmtune.data.message import RowError, Sample
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.source import Row
from mmtune.data.validation.issues import ISSUE_TYPES
from mmtune.recipe.recipe import DataSection, Source
from mmtune.utils.errors import UserError

LazySample = Callable[[], Sample]
"""Gives a row's sample when called; may raise RowError."""
Encoded = dict[str, Any]
"""Tensors as `encode_sample` gives them, the row's id as `row`, and as `note` what was done to its media."""


def open_readers(sources: Sequence[Source]) -> list[SourceReader]:
    """Of each source; its rows' ids begin with the file's name, or with the whole path where that would not keep them apart."""
    paths = {source.path for source in sources}
    files = Counter(Path(path).name for path in paths)
    several = len(paths) > 1 and any(not Path(path).is_file() for path in paths)
    return [SourceReader(source, source.path if several or files[Path(source.path).name] > 1 else None) for source in sources]


def _names(sources: Sequence[Source]) -> list[str]:
    """The sources by the name of their file, or by its path where others have that name; sources of one file are numbered."""
    files = Counter(Path(path).name for path in {source.path for source in sources})
    times: Counter[str] = Counter()
    names = []
    for source in sources:
        name = source.path if files[Path(source.path).name] > 1 else Path(source.path).name
        times[name] += 1
        names.append(name if times[name] == 1 else f"{name} ({times[name]})")
    return names


class IndexedSamples(Sequence[Sample]):
    """The rows of several sources in order, turned into samples when asked for."""

    def __init__(self, sources: Sequence[Source], planned: bool = False) -> None:
        """
        Args:
            sources: the recipe's.
            planned: whether the lengths of the rows are counted before they train. Then a row whose text writes boxes keeps the
                augmentation of its first visit: other numbers could be another number of tokens.

        Raises:
            UserError: a missing or unreadable file, or an unknown template.
        """
        self._planned = planned
        self._readers = open_readers(sources)
        self._rows = [reader.open() for reader in self._readers]
        self.counts = [len(rows) for rows in self._rows]
        self._ends = list(accumulate(self.counts))
        self.names = _names(sources)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """The sample of a row's first visit, or a RowError that names the row."""
        return self.visit(range(len(self))[index], 0)

    def visit(self, index: int, number: int) -> Sample:
        """The sample of a row as its visit with this number, from 0, has it: every visit draws its own augmentation.

        Raises:
            RowError: naming the row.
        """
        source = self.source_of(index)
        row_id, row = self._rows[source][index - self._ends[source] + self.counts[source]]
        reader = self._readers[source]
        return reader.sample(row_id, row, 0 if self._planned and reader.template.boxes else number)

    def source_of(self, index: int) -> int:
        """The number of the source that a row comes from."""
        return bisect_right(self._ends, index)

    def subset(self, count: int) -> Iterator[LazySample]:
        """Up to `count` rows, spread evenly."""
        count = min(count, len(self))
        return (partial(self.__getitem__, step * len(self) // count) for step in range(count))


class StreamedSamples:
    """The rows of several sources as they come, none of them looked at before it is asked for."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """
        Raises:
            UserError: an unknown template.
        """
        self._readers = open_readers(sources)
        self.weights = [source.weight for source in sources]
        self.names = _names(sources)

    @property
    def stream_openers(self) -> list[Callable[[int], Iterator[LazySample]]]:
        """For each source, what opens it for the visit with a number."""
        return [partial(_handles, reader) for reader in self._readers]

    def subset(self, count: int) -> Iterator[LazySample]:
        """The first rows of each source, `count` in all."""
        share = -(-count // len(self._readers))
        return (handle for open_source in self.stream_openers for handle in islice(open_source(0), share))


def _handles(reader: SourceReader, visit: int) -> Iterator[LazySample]:
    return (partial(_parsed, reader, visit, read) for read in reader.stream())


def _parsed(reader: SourceReader, visit: int, read: Callable[[], tuple[str, Row]]) -> Sample:
    return reader.sample(*read(), visit)


def open_samples(section: DataSection) -> IndexedSamples | StreamedSamples:
    """The recipe's training rows, by index or as a stream.

    Raises:
        UserError: a missing or unreadable file, or an unknown template.
    """
    return StreamedSamples(section.train) if section.stream else IndexedSamples(section.train, section.planned)


def check_rows(samples: IndexedSamples | StreamedSamples, report: DataReport, limit: int) -> None:
    """Read up to `limit` rows and their images' headers and ends; faults go to the report. Decodes nothing that looks whole."""
    for handle in samples.subset(limit):
        report.checked += 1
        try:
            sample = handle()
            for image in sample.images:
                _check_header(sample.id, image)
        except RowError as error:
            report.add(error)


def _check_header(row_id: str, image: Media) -> None:
    for name, detail in inspect_image(image).issues:
        if ISSUE_TYPES[name].severity == "error":
            raise RowError(row_id, "image", detail, name)


OVER_LENGTH_HINT = "data.over_length: drop_sample, drop_media and shrink_media would go on"


class SampleEncoder:
    """Samples to tensors by a recipe's data section; what is wrong with one comes back as its RowError.

    Args:
        processor: the model's.
        section: of the recipe.
    """

    def __init__(self, processor: ProcessorMixin, section: DataSection) -> None:
        self._processor = processor
        self._section = section

    def __call__(self, handle: LazySample, source: int = 0) -> Encoded | UserError:
        """
        Returns:
            As `encode_sample`, with the row's id as `row`, and with several sources `source_ids` (int64, shape (1, length)), each
            the number of the source; or the row's error, for the collator to set aside.
        """
        section = self._section
        try:
            sample = handle()
            note = None
            if section.max_tokens is not None and section.over_length in ("drop_media", "shrink_media"):
                sample, note = self._fitted(sample, section.max_tokens)
            encoded: Encoded = {**encode_sample(sample, self._processor, section.max_tokens, section.supervise), "row": sample.id}
        except OverLength as error:
            if section.over_length == "error":
                return StopRunError(error.row, error.field, f"{error.detail} ({OVER_LENGTH_HINT})")
            return error
        except UserError as error:  # of the row, or of the whole file: raised where the batch is taken, not in a worker
            return error
        if note is not None:
            encoded["note"] = note
        if len(section.train) > 1:
            encoded["source_ids"] = torch.full_like(encoded["input_ids"], source)
        return encoded

    def _fitted(self, sample: Sample, max_tokens: int) -> tuple[Sample, MediaChanged | None]:
        fitted = fit_to_budget(sample, self._processor, max_tokens, self._section.over_length, self._section.supervise)
        done = [f"{fitted.dropped} images dropped"] * bool(fitted.dropped)
        done += [f"{fitted.resized} images made smaller"] * bool(fitted.resized)
        if not done:
            return sample, None
        return fitted.sample, MediaChanged(sample.id, "image", f"{', '.join(done)}: {fitted.counts.tokens} tokens now")


class TrainingSet(torch.utils.data.Dataset[Encoded | UserError]):
    """Encoded samples by index, or by index and visit; a row that fails comes back as its RowError."""

    def __init__(self, samples: IndexedSamples, encoder: SampleEncoder) -> None:
        self._samples = samples
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int | tuple[int, int]) -> Encoded | UserError:
        row, visit = index if isinstance(index, tuple) else (index, 0)
        return self._encoder(partial(self._samples.visit, row, visit), self._samples.source_of(row))


def iterate_rows(samples: IndexedSamples) -> Iterator[Sample]:
    """Every sample in order; raises at the first row that fails."""
    return (samples[index] for index in range(len(samples)))


def dummy_sample(processor: ProcessorMixin) -> Encoded:
    """A question about a blank image with no position supervised, encoded: it adds nothing to the loss or to any gradient.

    It takes the place of a batch whose every row was dropped, and the vision tower's part where a batch has no image.
    """
    question = {"role": "user", "content": [{"type": "image", "image": blank_image()}, {"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "."}]}
    encoded = encode_sample(Sample("stand-in", [question, answer]), processor)
    return {**encoded, "labels": torch.full_like(encoded["labels"], IGNORE_INDEX)}
