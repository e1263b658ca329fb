"""Training data: rows, their order, and the batches of each process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.batching.collate import METADATA_KEYS, collate, pack
from mmtune.data.batching.sample_stream import SampleStream
from mmtune.data.data_report import DataReport
from mmtune.data.dataset import (
    OVER_LENGTH_HINT,
    IndexedSamples,
    LazySample,
    SampleEncoder,
    StreamedSamples,
    TrainingSet,
)
from mmtune.data.encoding.encode import over_length_error
from mmtune.data.message import RowError, Sample
from mmtune.data.time_spans import SpanLog, TimedCollator
from mmtune.distributed.context import DistributedContext
from mmtune.distributed.sharded_parameters import gathered_forward
from mmtune.models.packed_attention import check_packable, verify_packing
from mmtune.objectives.sft import pad_token_id
from mmtune.planning.token_plan import plan_section
from mmtune.recipe.recipe import DataSection, Recipe
from mmtune.training.run_inputs import RunInputs
from mmtune.utils.errors import RecipeValueError, UserError

MakeBatch = Callable[[Sequence[Any]], dict[str, Any]]
"""Makes a batch of encoded rows, as `Collator` does."""


def rows_to_take(samples: IndexedSamples | StreamedSamples, arguments: TrainingArguments) -> int:
    """The number of rows; of a stream, the number that the run trains on."""
    if isinstance(samples, IndexedSamples):
        return len(samples)
    every = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return int(arguments.max_steps * every)


def plan_rows(
    samples: IndexedSamples | StreamedSamples,
    recipe: Recipe,
    processor: ProcessorMixin,
    report: DataReport,
    dist: DistributedContext,
) -> NDArray[np.int64] | None:
    """Count the tokens of every row, if the recipe needs it. Rows that cannot be trained on are reported.

    Returns:
        Tokens of every row in training, shape (rows,); 0 for rows that are left out. None if rows are not counted.

    Raises:
        UserError: more rows are invalid than the recipe allows, or a row is too long under `over_length: error`.
    """
    section = recipe.data
    if not (section.planned and isinstance(samples, IndexedSamples)):
        if section.stream and section.max_tokens is not None and section.over_length == "error":
            print(
                "data.stream: rows are not counted beforehand, so one that is longer than data.max_tokens stops the run at its "
                "batch"
            )
        return None
    plan, outcome = plan_section(samples, section, processor, dist)
    dropped = outcome.dropped if dist.is_main_process else []
    limit = section.max_tokens or 0  # without a limit no row is dropped
    longer = [over_length_error(samples[row].id, int(plan.tokens[row]), limit) for row in dropped]
    if longer and section.over_length == "error":
        raise UserError(f"{len(longer)} rows are too long, the first: {longer[0]} ({OVER_LENGTH_HINT})")
    for fault in (*plan.errors.values(), *dist.broadcast_object(longer)):
        report.add(fault)
    report.checked = len(samples)
    report.stop_past(section.max_bad_fraction)
    return outcome.lengths


@dataclass(frozen=True)
class TrainingData:
    """The rows of a run, encoded on access, in their batches.

    Attributes:
        samples: the rows before they are encoded.
        rows: a map-style data set of encoded rows, or a stream of batches.
        batches: the row indices of each batch; None for a stream.
        spans: records the time of encoding and collating; None without a profile.
    """

    samples: IndexedSamples | StreamedSamples
    encoder: SampleEncoder
    collator: MakeBatch
    rows: Dataset[Any]
    batches: MixtureBatchSampler | None
    pad_token_id: int
    spans: SpanLog | None

    @property
    def source_names(self) -> Sequence[str]:
        """Names of the sources whose losses are logged separately; none where there is only one source."""
        return self.samples.names if len(self.samples.names) > 1 else ()

    def first_batches(self, size: int = 4, count: int = 16) -> Iterator[dict[str, Any]]:
        """Up to `count` padded batches of rows spread over the data, for initializations that read data.

        Invalid rows are left out. The batches are the same under every parallelism strategy.
        """
        usable = _usable(self.samples, self.encoder, size * count)
        while rows := list(islice(usable, size)):
            yield collate(rows, self.pad_token_id)


def prepare_data(inputs: RunInputs, processor: ProcessorMixin) -> TrainingData:
    """Create the encoder, collator and batches of a run."""
    samples, section, arguments, dist = inputs.samples, inputs.recipe.data, inputs.arguments, inputs.dist
    encoder = inputs.objective.encoder(processor, section)
    collator: MakeBatch = inputs.objective.collator(processor, section.packing, always_images=dist.size > 1)
    spans = SpanLog() if inputs.profile else None
    if spans is not None:
        encoder.spans, collator = spans, TimedCollator(collator, spans)
    rows: Dataset[Any]
    if isinstance(samples, IndexedSamples):
        rows, batches = TrainingSet(samples, encoder), make_batches(samples, section, arguments, dist, inputs.lengths)
    else:
        rows, batches = _stream(samples, encoder, collator, section, arguments, dist), None
    return TrainingData(samples, encoder, collator, rows, batches, pad_token_id(processor), spans)


def _stream(
    samples: StreamedSamples,
    encoder: SampleEncoder,
    collator: MakeBatch,
    section: DataSection,
    arguments: TrainingArguments,
    dist: DistributedContext,
) -> SampleStream:
    return SampleStream(
        samples.stream_openers,
        samples.weights,
        partial(_make_batch, collator, encoder),
        seed=_seed(arguments),
        window=section.shuffle_window if arguments.train_sampling_strategy == "random" else 1,
        size=arguments.per_device_train_batch_size,
        rank=dist.rank,
        world_size=dist.size,
    )


def make_batches(
    samples: IndexedSamples,
    section: DataSection,
    arguments: TrainingArguments,
    dist: DistributedContext,
    lengths: NDArray[np.int64] | None,
) -> MixtureBatchSampler:
    """The batches of this process.

    Args:
        lengths: tokens of every row, 0 for one that cannot train; None where rows were not counted.
    """
    counts = samples.counts
    if lengths is not None:
        ends = list(accumulate(counts))
        counts = [int((lengths[end - count : end] > 0).sum()) for count, end in zip(counts, ends, strict=True)]
    mix = Mixture.by_ratio if section.mix == "ratio" else Mixture.by_repeats
    mixture = mix(counts, [source.weight for source in section.train])
    for name, count, take in zip(samples.names, counts, mixture.draws, strict=True):
        if count and not take:
            raise RecipeValueError(
                "data.train", f"the weight of {name} is too small: an epoch has none of its {count} rows; give a larger weight"
            )
    every = arguments.per_device_train_batch_size * dist.size
    by_tokens = section.packing or section.tokens_per_batch is not None
    if arguments.dataloader_drop_last and not by_tokens and len(mixture) < every:
        raise RecipeValueError(
            "train.dataloader_drop_last", f"expected at least {every} rows for one batch, got {len(mixture)}; leave it out"
        )
    return MixtureBatchSampler(
        mixture,
        seed=_seed(arguments),
        size=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        rank=dist.rank,
        world_size=dist.size,
        lengths=lengths,
        tokens=section.tokens_per_batch or (section.max_tokens if section.packing else None),
        packed=section.packing,
        largest_first=section.largest_batch_first,
        drop_last=arguments.dataloader_drop_last,
        shuffled=arguments.train_sampling_strategy != "sequential",
        by_length=arguments.train_sampling_strategy == "group_by_length",
        epochs=math.ceil(arguments.num_train_epochs),
        steps=arguments.max_steps if arguments.max_steps > 0 else None,
        visits=any(source.augment is not None for source in section.train),
    )


def _make_batch(collator: MakeBatch, encoder: SampleEncoder, rows: Sequence[tuple[int, LazySample]]) -> dict[str, Any]:
    return collator([encoder(handle, source) for source, handle in rows])


def _seed(arguments: TrainingArguments) -> int:
    return int(arguments.seed if arguments.data_seed is None else arguments.data_seed)


def optimizer_steps(arguments: TrainingArguments, batches: MixtureBatchSampler | None) -> int:
    """The number of optimizer steps of the run."""
    if arguments.max_steps > 0 or batches is None:
        return int(arguments.max_steps)
    return math.ceil(arguments.num_train_epochs * -(-len(batches) // arguments.gradient_accumulation_steps))


def first_samples(data: TrainingData) -> dict[str, Sample]:
    """The samples of this process's first batch by id, before they are encoded; none of a stream, whose rows have no index.

    A row that fails is left out.
    """
    samples: dict[str, Sample] = {}
    if data.batches is None or not isinstance(data.samples, IndexedSamples):
        return samples
    for index in next(iter(data.batches), ()):
        row, visit = index if isinstance(index, tuple) else (index, 0)
        with contextlib.suppress(RowError):
            sample = data.samples.visit(row, visit)
            samples[sample.id] = sample
    return samples


def prove_packed_rows(model: PreTrainedModel, data: TrainingData) -> None:
    """Compare a few short rows, packed, with the same rows alone; rows with images are preferred.

    Raises:
        UserError: the model does not keep packed samples apart.
    """
    if not isinstance(data.samples, IndexedSamples):
        return
    with gathered_forward(model):
        check_packable(model)
        usable = _usable(data.samples, data.encoder, 64)
        chosen = sorted(usable, key=lambda row: ("pixel_values" not in row, row["input_ids"].shape[1]))[:3]
        if len(chosen) > 1:
            verify_packing(model, pack(chosen), [collate([row], data.pad_token_id) for row in chosen])


def _usable(samples: IndexedSamples | StreamedSamples, encoder: SampleEncoder, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of up to `count` rows spread over the data; invalid rows are left out."""
    for handle in samples.subset(count):
        row = encoder(handle)
        if not isinstance(row, UserError):
            yield {key: value for key, value in row.items() if key not in (*METADATA_KEYS, "source_ids")}
