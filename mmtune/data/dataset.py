"""Training data: the samples of all sources, indexed or streamed, encoded in data-loader workers, with errors per row."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

from mmtune.data.data_report import DataReport, MediaChanged, StopRunError
from mmtune.data.encoding.encode import IGNORE_INDEX, OverLength, encode_sample, process_images
from mmtune.data.encoding.feature_store import FeatureStore
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.media.image_headers import inspect_image
from mmtune.data.media.media import blank_image
from mmtune.data.message import RowError, Sample, text_message
from mmtune.data.sources.held_out_split import describe_split
from mmtune.data.sources.reader import SourceReader
from mmtune.data.sources.source import Row
from mmtune.data.time_spans import SpanLog
from mmtune.data.validation.issues import ISSUE_TYPES
from mmtune.recipe.recipe import DataSection, Source, source_names
from mmtune.utils.errors import UserError

LazySample = Callable[[], Sample]
"""Returns the sample of a row when called; can raise RowError."""
Encoded = dict[str, Any]
"""The tensors of `encode_sample`, the row's id as `row`, and an optional note about changes to its media as `note`."""


def open_readers(sources: Sequence[Source]) -> list[SourceReader]:
    """A reader for each source. Row ids start with the file name, or with the whole path if file names are not unique."""
    paths = {source.path for source in sources}
    files = Counter(Path(path).name for path in paths)
    several = len(paths) > 1 and any(not Path(path).is_file() for path in paths)
    return [SourceReader(source, source.path if several or files[Path(source.path).name] > 1 else None) for source in sources]


class IndexedSamples(Sequence[Sample]):
    """The samples of several sources by index, converted from rows on demand."""

    def __init__(self, sources: Sequence[Source], planned: bool = False) -> None:
        """
        Args:
            sources: the recipe's sources.
            planned: whether the lengths of the rows are counted before training. If so, a row with regions in its text keeps the
                augmentation of its first visit, because other coordinates could have another number of tokens.

        Raises:
            UserError: a missing or unreadable file, or an unknown template.
        """
        self._planned = planned
        self._readers = open_readers(sources)
        self._rows = [reader.open() for reader in self._readers]
        self.templates = [reader.template for reader in self._readers]
        self.counts = [len(rows) for rows in self._rows]
        self._ends = list(accumulate(self.counts))
        self.names = source_names(sources)
        self.held_out = {
            name: reader.held_out_counts
            for name, reader in zip(self.names, self._readers, strict=True)
            if reader.held_out_counts is not None
        }
        """By the name of a source with `held_out`: the counts of its split."""

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """The sample of a row at its first visit. Raises RowError."""
        return self.visit(range(len(self))[index], 0)

    def visit(self, index: int, number: int) -> Sample:
        """The sample of a row at one visit (numbered from 0); every visit draws a new augmentation.

        Raises:
            RowError: the row cannot be converted.
        """
        row_id, row = self.row(index)
        reader = self._readers[self.source_of(index)]
        return reader.sample(row_id, row, 0 if self._planned and reader.template.regions else number)

    def row(self, index: int) -> tuple[str, Row]:
        """The id of a row, and the row as it is in the file, with the row that is joined to it."""
        source = self.source_of(index)
        return self._rows[source][index - self._ends[source] + self.counts[source]]

    def source_of(self, index: int) -> int:
        """The number of the source of a row."""
        return bisect_right(self._ends, index)

    def subset(self, count: int) -> Iterator[LazySample]:
        """Up to `count` samples, evenly spaced over all rows."""
        count = min(count, len(self))
        return (partial(self.__getitem__, step * len(self) // count) for step in range(count))


class StreamedSamples:
    """The samples of several sources as a stream; rows are read on demand."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """
        Raises:
            UserError: an unknown template.
        """
        self._readers = open_readers(sources)
        self.weights = [source.weight for source in sources]
        self.names = source_names(sources)
        self.held_out: dict[str, dict[str, int]] = {}

    @property
    def stream_openers(self) -> list[Callable[[int], Iterator[LazySample]]]:
        """For each source, a function from the epoch number to the stream of its samples."""
        return [partial(_stream_samples, reader) for reader in self._readers]

    def subset(self, count: int) -> Iterator[LazySample]:
        """The first samples of each source, about `count` in total."""
        share = -(-count // len(self._readers))
        return (sample for open_stream in self.stream_openers for sample in islice(open_stream(0), share))


def _stream_samples(reader: SourceReader, visit: int) -> Iterator[LazySample]:
    return (partial(_load_sample, reader, visit, read) for read in reader.stream())


def _load_sample(reader: SourceReader, visit: int, read: Callable[[], tuple[str, Row]]) -> Sample:
    return reader.sample(*read(), visit)


def open_samples(section: DataSection) -> IndexedSamples | StreamedSamples:
    """Open the recipe's training data, by index or as a stream, and print how many rows are held out.

    Raises:
        UserError: a missing or unreadable file, or an unknown template.
    """
    if section.stream:
        return StreamedSamples(section.train)
    samples = IndexedSamples(section.train, section.planned)
    for name, counts in samples.held_out.items():
        print(describe_split(name, counts))
    return samples


def check_rows(samples: IndexedSamples | StreamedSamples, report: DataReport, limit: int) -> None:
    """Check up to `limit` rows with the headers and ends of their images. Intact images are not decoded."""
    for lazy_sample in samples.subset(limit):
        report.checked += 1
        try:
            check_headers(lazy_sample())
        except RowError as error:
            report.add(error)


def check_headers(sample: Sample) -> None:
    """Check the headers and ends of a sample's images.

    Raises:
        RowError: an image that cannot be read.
    """
    for image in sample.images:
        for name, detail in inspect_image(image).issues:
            if ISSUE_TYPES[name].severity == "error":
                raise RowError(sample.id, "image", detail, name)


OVER_LENGTH_HINT = "to continue, set data.over_length: drop_sample, drop_media or shrink_media"


class SampleEncoder:
    """Encodes samples according to a recipe's data section, and returns the errors of rows instead of raising them.

    Args:
        processor: the model's processor.
        section: the recipe's data section.

    Attributes:
        spans: records the time of encoding, as `preprocess`, and within it that of decoding images; None: no record.
        features: where the features of images are looked up, which encoded samples then have as `vision_features`; None: nowhere.
    """

    def __init__(self, processor: ProcessorMixin, section: DataSection) -> None:
        self._processor = processor
        self._section = section
        self.spans: SpanLog | None = None
        self.features: FeatureStore | None = None

    def __call__(self, lazy_sample: LazySample, source: int = 0) -> Encoded | UserError:
        """Load and encode a sample.

        Returns:
            The tensors of `encode_sample` with the row's id as `row`, and for several sources `source_ids` (int64, shape
            (1, length)) with the number of the source; or the error of the row, which the collator puts aside.
        """
        with nullcontext() if self.spans is None else self.spans.span("preprocess"):
            return self._encode(lazy_sample, source)

    def _encode(self, lazy_sample: LazySample, source: int) -> Encoded | UserError:
        section = self._section
        try:
            sample = lazy_sample()
            note = None
            if section.max_tokens is not None and section.over_length in ("drop_media", "shrink_media"):
                sample, note = self._fit(sample, section.max_tokens)
            images = vision_features = None
            if self.features is not None:
                process = partial(process_images, sample.id, sample.messages, self._processor, self.spans)
                images, vision_features = self.features.encode_images(sample.id, sample.messages, process)
            tensors = encode_sample(sample, self._processor, section.max_tokens, section.supervise, self.spans, images)
            encoded: Encoded = {**tensors, "row": sample.id}
            if vision_features is not None:
                encoded["vision_features"] = vision_features
        except OverLength as error:
            if section.over_length == "error":
                return StopRunError(error.row, error.field, f"{error.detail} ({OVER_LENGTH_HINT})")
            return error
        except UserError as error:  # of the row or the file: raised in the main process, not in a worker
            return error
        if note is not None:
            encoded["note"] = note
        if len(section.train) > 1:
            encoded["source_ids"] = torch.full_like(encoded["labels"], source)
        return encoded

    def _fit(self, sample: Sample, max_tokens: int) -> tuple[Sample, MediaChanged | None]:
        fitted = fit_to_budget(sample, self._processor, max_tokens, self._section.over_length, self._section.supervise)
        changes = [f"{fitted.dropped} images dropped"] * bool(fitted.dropped)
        changes += [f"{fitted.resized} images resized"] * bool(fitted.resized)
        if not changes:
            return sample, None
        return fitted.sample, MediaChanged(sample.id, "image", f"{', '.join(changes)}: now {fitted.counts.tokens} tokens")


class TrainingSet(torch.utils.data.Dataset[Encoded | UserError]):
    """Encoded samples by index, or by index and visit; the item of a row that fails is its RowError."""

    def __init__(self, samples: IndexedSamples, encoder: SampleEncoder) -> None:
        self._samples = samples
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int | tuple[int, int]) -> Encoded | UserError:
        row, visit = index if isinstance(index, tuple) else (index, 0)
        return self._encoder(partial(self._samples.visit, row, visit), self._samples.source_of(row))


def iterate_rows(samples: IndexedSamples) -> Iterator[Sample]:
    """Every sample in order. Raises RowError at the first row that fails."""
    return (samples[index] for index in range(len(samples)))


def dummy_sample(processor: ProcessorMixin) -> Encoded:
    """An encoded question about a blank image without supervised tokens: it adds nothing to the loss and the gradients.

    It replaces a batch whose rows were all dropped, and is added to batches without images so that the vision tower is used.
    """
    question = {"role": "user", "content": [{"type": "image", "image": blank_image()}, {"type": "text", "text": "?"}]}
    answer = text_message("assistant", ".")
    encoded = encode_sample(Sample("dummy sample", [question, answer]), processor)
    return {**encoded, "labels": torch.full_like(encoded["labels"], IGNORE_INDEX)}
