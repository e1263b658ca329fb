"""Packing efficiency on lengths like those of LLaVA's instruction data.

The lengths are synthetic: 95 % of the samples have one image of 576 tokens (CLIP at 336 pixels, patches of 14), as in LLaVA-1.5;
the others are text only. Text lengths are lognormal with sigma 0.8 and at least 20 tokens; the median is 330 without an image,
and 120, 180 or 250 with one. A sample over the capacity is dropped, as with `over_length: drop_sample`. If most samples are
longer than a third of the capacity (the higher medians with 2,048 tokens), no packing fills it.

Compared with: best-fit decreasing alone; packs filled in the order of the rows; batches of 16 in the order of the rows, padded to
their longest sample.

Usage: python benchmarks/data_packing.py [--rows 200000] [--seed 0]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mmtune.data.batching.bin_packing import _best_fit, pack_lengths, packing_efficiency

MEDIANS = (120, 180, 250)


def llava_lengths(rows: int, seed: int, median: int = 120) -> np.ndarray:
    rng = np.random.default_rng(seed)
    with_image = rng.random(rows) < 0.95
    text = np.exp(rng.normal(np.log(np.where(with_image, median, 330)), 0.8)).astype(np.int64)
    return np.maximum(text, 20) + 576 * with_image


def in_order(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for position, length in enumerate(lengths.tolist()):
        if length > room:
            packs.append([])
            room = capacity
        packs[-1].append(position)
        room -= length
    return packs


def padded(lengths: np.ndarray, batch: int = 16) -> float:
    """The share of a batch that is not padding."""
    groups = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return float(lengths.sum() / sum(len(group) * int(group.max()) for group in groups))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{arguments.rows:,} samples; filled share of the token budget")
    print("median text  capacity   packs  samples   packed  best fit  in order  padded  seconds")
    for median in MEDIANS:
        every = llava_lengths(arguments.rows, arguments.seed, median)
        for capacity in (2048, 4096):
            lengths = every[every <= capacity]
            start = time.perf_counter()
            packs = pack_lengths(lengths, capacity)
            seconds = time.perf_counter() - start
            others = (packs, _best_fit(lengths, capacity), in_order(lengths, capacity))
            full, best_fit, ordered = (packing_efficiency(lengths, each, capacity) for each in others)
            print(
                f"{median:11} {capacity:9} {len(packs):7} {len(lengths):8} {full:8.2%} {best_fit:9.2%} {ordered:9.2%} "
                f"{padded(lengths):7.2%} {seconds:8.1f}"
            )


if __name__ == "__main__":
    main()
