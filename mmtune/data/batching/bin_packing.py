"""Sequence packing as bin packing: assign samples to packs of a maximum number of tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

Lengths = np.ndarray[Any, np.dtype[np.int64]]

GOOD_EFFICIENCY = 0.98
"""Efficiency of best-fit decreasing above which no other packing is tried."""
PAIR_THRESHOLDS = (0.995, 1.0)
"""Thresholds for packing pairs: three samples of the mean remaining length must fit into this share of the capacity."""
SLACK = 256
"""A pair fills a pack if it leaves at most 1/SLACK of the capacity free."""


def pack_lengths(lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Assign samples to packs of at most `capacity` tokens.

    The first candidate is best-fit decreasing: the longest sample first, each into the fullest pack with enough room. It needs at
    most 11/9 of the optimal number of packs, plus one (Johnson 1974). It is worst if two or three samples fill a pack, such as
    conversations about an image of 576 tokens in packs of 2,048. So packs are also filled one by one, with the pair of samples
    that leaves the least room, and the candidate with the fewest packs is returned.

    The complexity is O(n log n) in the number of samples.

    Args:
        lengths: tokens of each sample, from 1 to `capacity`.
        capacity: maximum number of tokens of a pack.

    Returns:
        For each pack the indices into `lengths`; every index occurs once. The result is deterministic.

    Raises:
        ValueError: a length is out of range.
    """
    values = np.asarray(lengths, dtype=np.int64)
    if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= capacity:
        raise ValueError(f"expected lengths from 1 to {capacity} (the capacity), got {values.min()} to {values.max()}")
    packs = _best_fit(values, capacity)
    if packing_efficiency(values, packs, capacity) >= GOOD_EFFICIENCY:
        return packs
    # If three samples of the mean length fit anyway, all thresholds give the same packs.
    thresholds = PAIR_THRESHOLDS[-1:] if 3 * values.mean() <= min(PAIR_THRESHOLDS) * capacity else PAIR_THRESHOLDS
    return min([packs, *(_fill_packs(values, capacity, threshold) for threshold in thresholds)], key=len)


def packing_efficiency(lengths: Sequence[int] | np.ndarray[Any, Any], packs: list[list[int]], capacity: int) -> float:
    """The fraction of the packs' capacity that samples use, from 0 to 1; 1 if there are no packs."""
    return float(np.asarray(lengths).sum() / (len(packs) * capacity)) if packs else 1.0


def _best_fit(values: Lengths, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct free capacities, ascending
    packs_by_room: dict[int, list[int]] = {}
    for position in np.argsort(-values, kind="stable").tolist():
        length = int(values[position])
        index = bisect_left(rooms, length)
        if index < len(rooms):
            room = rooms[index]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del packs_by_room[room], rooms[index]
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(position)
        left = room - length
        if left:
            if left not in packs_by_room:
                packs_by_room[left] = []
                insort(rooms, left)
            packs_by_room[left].append(pack)
    return packs


def _fill_packs(values: Lengths, capacity: int, threshold: float) -> list[list[int]]:
    """Fill packs one by one: start with the longest remaining sample, then add a sample or pair that fills it, or the longest.

    Pairs are used only once three samples of the mean remaining length fit into a pack. Before that, they would use up the short
    samples that packs of three need later.
    """
    stock = _RemainingSamples(values, capacity)
    slack = capacity // SLACK
    packs: list[list[int]] = []
    while stock.count:
        room = capacity
        use_pairs = 3 * stock.total <= threshold * capacity * stock.count
        packs.append([])
        while (longest := stock.longest(room)) is not None:
            pair = stock.pair(room, slack) if use_pairs and packs[-1] and longest < room - slack else None
            for length in pair or (longest,):
                packs[-1].append(stock.take(length))
                room -= length
    return packs


class _RemainingSamples:
    """The remaining samples by length. A sample of n tokens sets bit n of `present`, and bit capacity - n of `mirrored`."""

    def __init__(self, values: Lengths, capacity: int) -> None:
        self._capacity = capacity
        self._positions: dict[int, list[int]] = {}
        for position in range(len(values) - 1, -1, -1):
            self._positions.setdefault(int(values[position]), []).append(position)
        self._present = sum(1 << length for length in self._positions)
        self._mirrored = sum(1 << (capacity - length) for length in self._positions)
        self.count, self.total = len(values), int(values.sum())

    def take(self, length: int) -> int:
        """Remove a sample of this length and return its index."""
        self.count, self.total = self.count - 1, self.total - length
        position = self._positions[length].pop()
        if not self._positions[length]:
            self._present ^= 1 << length
            self._mirrored ^= 1 << (self._capacity - length)
        return position

    def longest(self, room: int) -> int | None:
        """The longest remaining length up to `room`."""
        fitting = self._present & ((2 << room) - 1)
        return fitting.bit_length() - 1 if fitting else None

    def pair(self, room: int, slack: int) -> tuple[int, int] | None:
        """Two remaining lengths whose sum is at most `room` and at most `slack` less, as close to each other as possible."""
        for total in range(room, max(room - slack, 2) - 1, -1):
            half = (total + 1) // 2
            # Lengths of at least half the total for which the other length of the pair is present too.
            halves = (self._present & (self._mirrored >> (self._capacity - total)) & ((1 << total) - 1)) >> half
            if 2 * half == total and halves & 1 and len(self._positions[half]) < 2:
                halves ^= 1
            if halves:
                longer = half + (halves & -halves).bit_length() - 1
                return longer, total - longer
        return None
