"""Advice from the numbers of a profile: which part of a step is large, and which key of the recipe changes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LARGE_LOADER = LARGE_PROCESSES = LARGE_OPTIMIZER = 0.1
LARGE_COMMUNICATION = LARGE_PADDING = 0.2
LARGE_TOWER = LARGE_OTHER = 0.25
"""Shares of a step, or of the positions, from which on there is advice."""
BUSY = 0.8
"""Workers that are busy for this fraction of the time have no reserve."""
RESERVE = 1.25
"""How many more workers are advised than the measured work needs."""


@dataclass(frozen=True)
class RunFacts:
    """Settings of a run that advice depends on.

    Attributes:
        device: torch's name of it.
        workers: data-loader workers of a process.
        persistent_workers: whether they stay from one epoch to the next.
        prefetched: batches that each of them makes ahead.
        cores: usable CPU cores for each process of this machine.
        accumulation: batches of an optimizer step.
        packing: whether samples are packed.
        by_length: whether the rows of a step have similar lengths.
        stream: whether rows are read as a stream.
        balanced: whether rows are counted beforehand, so that the batches of the processes are balanced.
        tower_frozen: whether no parameter of the vision towers is trained.
        sharded: whether the weights are sharded.
    """

    device: str
    workers: int
    persistent_workers: bool
    prefetched: int
    cores: int
    accumulation: int
    packing: bool
    by_length: bool
    stream: bool
    balanced: bool
    tower_frozen: bool
    sharded: bool


@dataclass(frozen=True)
class LoaderLoad:
    """The load of data-loader workers.

    Attributes:
        busy: fraction of the time in which they work.
        at_epochs: whether most of the wait for them is in the first step of an epoch.
        decoding: whether most of their work is decoding images.
    """

    busy: float
    at_epochs: bool
    decoding: bool


@dataclass(frozen=True)
class _Finding:
    """A share with what to do about it; it is advice from the share `large` on."""

    name: str
    share: float
    large: float
    text: str


def advise(shares: Mapping[str, float], padding: float, facts: RunFacts, load: LoaderLoad | None) -> list[str]:
    """Sentences on what the numbers suggest, the largest share first.

    Args:
        shares: of the parts in a step (`PARTS`).
        padding: fraction of the positions.
        load: of the data-loader workers; None without workers.
    """
    step = "of the step"
    data = shares["loader"] + shares["decode"] + shares["preprocess"]
    findings = [
        _Finding(f"data preparation: {data:.0%} {step}", data, LARGE_LOADER, _data_advice(data, shares, facts, load)),
        _Finding(
            f"waiting for other processes: {shares['processes']:.0%} {step}",
            shares["processes"],
            LARGE_PROCESSES,
            "their rows are of different size or their loaders of different speed"
            + ("" if facts.balanced or facts.stream else "; data.plan: true balances the batches of the processes"),
        ),
        _Finding(
            f"communication: {shares['communication']:.0%} {step}",
            shares["communication"],
            LARGE_COMMUNICATION,
            "fewer bytes pass between processes with whole weights in each (DDP or ZeRO-1, if they fit into memory)"
            if facts.sharded
            else f"with train.gradient_accumulation_steps above {facts.accumulation} the gradients are averaged less often",
        ),
        _Finding(
            f"the optimizer: {shares['optimizer']:.0%} {step}",
            shares["optimizer"],
            LARGE_OPTIMIZER,
            f"with train.gradient_accumulation_steps above {facts.accumulation} it steps less often; fewer parameters train with "
            "a smaller r or fewer target_modules",
        ),
        _Finding(f"padding: {padding:.0%} of the positions", padding, LARGE_PADDING, _padding_advice(facts)),
        _Finding(
            f"the frozen vision tower: {shares['vision']:.0%} {step}",
            shares["vision"] if facts.tower_frozen else 0.0,
            LARGE_TOWER,
            "it reads every image once more in each epoch; where the number of image tokens depends on the size of an image, "
            "smaller images make it faster (data.max_tokens with data.over_length: shrink_media)",
        ),
        _Finding(f"other: {shares['other']:.0%} {step}", shares["other"], LARGE_OTHER, "the trace shows what it is"),
    ]
    large = sorted((each for each in findings if each.share >= each.large), key=lambda each: -each.share)
    return [f"{each.name}; {each.text}" for each in large]


def _data_advice(share: float, shares: Mapping[str, float], facts: RunFacts, load: LoaderLoad | None) -> str:
    if load is None:
        work, before, decoding = share, "it runs in the training process", shares["decode"] > share / 2
    else:
        work, decoding = load.busy * facts.workers, load.decoding
        before = f"the data-loader workers ({facts.workers}) are busy {load.busy:.0%} of the time"
        if load.at_epochs:
            keep = "" if facts.persistent_workers else "; train.dataloader_persistent_workers: true keeps the workers"
            return f"most of it is the first step of an epoch, before any batch is ready{keep}"
        if load.busy < BUSY:
            ahead = max(2 * facts.prefetched, math.ceil(facts.accumulation / facts.workers) + facts.prefetched)
            return f"{before}, so single batches are late: set train.dataloader_prefetch_factor: {ahead}"
    needed = max(math.ceil(RESERVE * work / max(1 - share, 0.01)), facts.workers + 1)
    smaller = "; decoding is most of it: smaller image files help too" if decoding else ""
    if needed > facts.cores:
        cores = f"{facts.cores} core{'s' * (facts.cores != 1)}"
        return f"{before}, and it takes {needed} cores to hide it where each process has {cores}{smaller}"
    note = " (they share the cores with the model)" if facts.device == "cpu" else ""
    return f"{before}: set train.dataloader_num_workers: {needed}{note}{smaller}"


def _padding_advice(facts: RunFacts) -> str:
    if facts.stream:
        return "the rows of a stream are batched as they come; without data.stream, data.packing: true needs no padding"
    if facts.packing:
        return "with data.packing these are the dummy samples of batches without images"
    grouped = "" if facts.by_length else ", and train.train_sampling_strategy: group_by_length needs less"
    return f"data.packing: true needs no padding{grouped}"
