"""The training rows in the order and the batches that a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import TrainingArguments

from mmtune.data.batches import Batches, Mixture
from mmtune.data.collate import Collator
from mmtune.data.dataset import Encoder, Samples, StreamedSamples, TrainingSet
from mmtune.data.message import RowError
from mmtune.data.stream import SampleStream
from mmtune.recipe import DataSection
from mmtune.world import World


def rows_to_take(samples: Samples | StreamedSamples, arguments: TrainingArguments) -> int:
    """How many rows there are; of a stream, how many the run takes."""
    if isinstance(samples, Samples):
        return len(samples)
    every = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return int(arguments.max_steps * every)


def order_rows(
    samples: Samples | StreamedSamples,
    encoder: Encoder,
    collator: Collator,
    section: DataSection,
    arguments: TrainingArguments,
    world: World,
    lengths: NDArray[np.int64] | None = None,
) -> tuple[Dataset[Any], Batches | None]:
    """What the Trainer takes its batches from.

    Args:
        lengths: tokens of every row, 0 for one that cannot train; None where they were not counted.

    Returns:
        The rows by index, and which of them make which batch; or a stream of batches and None.
    """
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    size = arguments.per_device_train_batch_size
    if isinstance(samples, StreamedSamples):
        stream = SampleStream(
            samples.openers,
            samples.weights,
            lambda rows: collator([encoder(handle, source) for source, handle in rows]),
            seed=seed,
            window=section.shuffle_window if arguments.train_sampling_strategy == "random" else 1,
            size=size,
            rank=world.rank,
            world=world.size,
        )
        return stream, None
    mixture = Mixture.by_ratio if section.mix == "ratio" else Mixture.by_repeats
    batches = Batches(
        mixture(samples.counts, [source.weight for source in section.train]),
        seed=seed,
        size=size,
        accumulation=arguments.gradient_accumulation_steps,
        rank=world.rank,
        world=world.size,
        lengths=lengths,
        tokens=section.tokens_per_batch or (section.max_tokens if section.packing else None),
        packed=section.packing,
        largest_first=section.largest_batch_first,
        drop_last=arguments.dataloader_drop_last,
        shuffled=arguments.train_sampling_strategy == "random",
        epochs=math.ceil(arguments.num_train_epochs),
    )
    return TrainingSet(samples, encoder), batches


def optimizer_steps(arguments: TrainingArguments, batches: Batches | None) -> int:
    """How many optimizer steps the run takes."""
    if arguments.max_steps > 0 or batches is None:
        return int(arguments.max_steps)
    return math.ceil(arguments.num_train_epochs * -(-len(batches) // arguments.gradient_accumulation_steps))


def first_batches(
    samples: Samples | StreamedSamples, encoder: Encoder, collator: Collator, size: int = 4, count: int = 16
) -> Iterator[dict[str, Any]]:
    """Up to `count` batches of rows from all over the data, for initializations that look at data; rows that fail are left out.

    The same whatever the run's batches and processes are, so that the start is the same in every layout.
    """
    encoded = (encoder(handle) for handle in samples.some(size * count))
    usable = (row for row in encoded if not isinstance(row, RowError))
    while rows := list(islice(usable, size)):
        batch = collator(rows)
        yield {key: value for key, value in batch.items() if key not in ("rows", "faults", "source_ids")}
