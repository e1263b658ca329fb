"""How full packs are on lengths like those of LLaVA's instruction data.

The lengths are made up, after what is published of LLaVA-1.5's mixture of 665 thousand conversations: 94 % have one image of
576 tokens (CLIP at 336 pixels, patches of 14) and the rest are text. The text of a conversation is lognormal: median 180
tokens with an image, 330 without, sigma 0.75, at least 20; a sample over the capacity is left out, as `over_length:
drop_sample` does.

Beside our packing stand packs filled in the order of the rows (a new one whenever the next sample does not fit), and batches
of 16 padded to their longest, of rows in their order and of rows of similar lengths.

Usage: python benchmarks/data_packing.py [--rows 200000] [--seed 0]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mmtune.data.packing import pack_lengths, packing_efficiency


def llava_lengths(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    with_image = rng.random(rows) < 0.94
    text = np.exp(rng.normal(np.log(np.where(with_image, 180, 330)), 0.75)).astype(np.int64)
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
    every = llava_lengths(arguments.rows, arguments.seed)
    print(f"{len(every):,} samples, median {np.median(every):.0f} tokens, 99 % below {np.quantile(every, 0.99):.0f}")
    for capacity in (2048, 4096):
        lengths = every[every <= capacity]
        start = time.perf_counter()
        packs = pack_lengths(lengths, capacity)
        seconds = time.perf_counter() - start
        naive = in_order(lengths, capacity)
        print(
            f"capacity {capacity}: {packing_efficiency(lengths, packs, capacity):.2%} full, {len(packs):,} packs of "
            f"{len(lengths):,} samples in {seconds:.2f} s; rows in order {packing_efficiency(lengths, naive, capacity):.2%}; "
            f"padded batches of 16: in order {padded(lengths):.2%}, similar lengths {padded(np.sort(lengths)):.2%}"
        )


if __name__ == "__main__":
    main()
