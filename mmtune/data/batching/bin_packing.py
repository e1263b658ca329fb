"""Which samples share a sequence of bounded length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

Lengths = np.ndarray[Any, np.dtype[np.int64]]

GOOD = 0.98
"""Packs so full are not tried to be made fuller."""
LEADS = (0.995, 1.0)
"""Where packs of pairs become packs of three and more: at that share of the mean length with which three fill a pack."""
SLACK = 256
"""A pair fills a pack if no more than one token in so many stays free."""


def pack_lengths(lengths: Sequence[int] | np.ndarray[Any, Any], capacity: int) -> list[list[int]]:
    """Divide samples into packs of at most `capacity` tokens.

    Best-fit decreasing comes first: the longest sample first, each into the fullest pack that has room. It needs at most 11/9 of
    the fewest packs possible, and one more (Johnson 1974). It wastes most where two or three samples fill a pack, as in 2,048
    tokens conversations about an image of 576 do. So packs are also filled one by one, the rest of each by the pair that leaves
    least free, and the fewest packs are taken.

    The work grows as n log n in the number of samples.

    Args:
        lengths: tokens of each sample, at least 1 and at most `capacity`.
        capacity: tokens of a pack.

    Returns:
        Positions in `lengths`, pack by pack, each position once. The same lengths give the same packs.

    Raises:
        ValueError: a length that does not fit.
    """
    values = np.asarray(lengths, dtype=np.int64)
    if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= capacity:
        raise ValueError(f"lengths from {values.min()} to {values.max()} do not go into packs of {capacity} tokens")
    packs = _best_fit(values, capacity)
    if packing_efficiency(values, packs, capacity) >= GOOD:
        return packs
    # With a mean length of which three fit anyway, all leads come to the same.
    leads = LEADS[-1:] if 3 * values.mean() <= min(LEADS) * capacity else LEADS
    return min([packs, *(_pack_by_pack(values, capacity, lead) for lead in leads)], key=len)


def packing_efficiency(lengths: Sequence[int] | np.ndarray[Any, Any], packs: list[list[int]], capacity: int) -> float:
    """The share of the packs' tokens that samples fill, from 0 to 1; 1 where there are no packs."""
    return float(np.asarray(lengths).sum() / (len(packs) * capacity)) if packs else 1.0


def _best_fit(values: Lengths, capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct amounts of room, ascending
    having: dict[int, list[int]] = {}  # packs by the room that they have
    for position in np.argsort(-values, kind="stable").tolist():
        length = int(values[position])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = having[room].pop()
            if not having[room]:
                del having[room], rooms[place]
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(position)
        left = room - length
        if left:
            if left not in having:
                having[left] = []
                insort(rooms, left)
            having[left].append(pack)
    return packs


def _pack_by_pack(values: Lengths, capacity: int, lead: float) -> list[list[int]]:
    """The longest sample that is left begins a pack; then what fills it, one or a pair, or else the longest that fits.

    Pairs wait until three samples of the mean length that is left go into a pack. Before, they would take the short samples that
    packs of three need later.
    """
    stock = _Stock(values, capacity)
    slack = capacity // SLACK
    packs: list[list[int]] = []
    while stock.count:
        room = capacity
        pair_up = 3 * stock.total <= lead * capacity * stock.count
        packs.append([])
        while (longest := stock.longest(room)) is not None:
            pair = stock.pair(room, slack) if pair_up and packs[-1] and longest < room - slack else None
            for length in pair or (longest,):
                packs[-1].append(stock.take(length))
                room -= length
    return packs


class _Stock:
    """Samples that are left, by length. Bit n of `present` says that one has n tokens, of `mirrored` capacity - n."""

    def __init__(self, values: Lengths, capacity: int) -> None:
        self._capacity = capacity
        self._positions: dict[int, list[int]] = {}
        for position in range(len(values) - 1, -1, -1):
            self._positions.setdefault(int(values[position]), []).append(position)
        self._present = sum(1 << length for length in self._positions)
        self._mirrored = sum(1 << (capacity - length) for length in self._positions)
        self.count, self.total = len(values), int(values.sum())

    def take(self, length: int) -> int:
        """The position of a sample of that length, which is then gone."""
        self.count, self.total = self.count - 1, self.total - length
        position = self._positions[length].pop()
        if not self._positions[length]:
            self._present ^= 1 << length
            self._mirrored ^= 1 << (self._capacity - length)
        return position

    def longest(self, most: int) -> int | None:
        """The longest length up to `most`."""
        fitting = self._present & ((2 << most) - 1)
        return fitting.bit_length() - 1 if fitting else None

    def pair(self, most: int, slack: int) -> tuple[int, int] | None:
        """Two lengths that make `most` together or up to `slack` less, as near to each other as can be."""
        for total in range(most, max(most - slack, 2) - 1, -1):
            half = (total + 1) // 2
            # Lengths from half the total on whose partner is there too.
            halves = (self._present & (self._mirrored >> (self._capacity - total)) & ((1 << total) - 1)) >> half
            if 2 * half == total and halves & 1 and len(self._positions[half]) < 2:
                halves ^= 1
            if halves:
                longer = half + (halves & -halves).bit_length() - 1
                return longer, total - longer
        return None
