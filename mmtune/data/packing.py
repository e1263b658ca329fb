"""Which samples share a sequence of bounded length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack_lengths(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Divide samples into packs of at most `capacity` tokens: the longest first, each into the fullest pack that has room.

    This is best-fit decreasing, which needs at most 11/9 of the fewest packs possible, and a few (Johnson 1974). A pack is found
    by a search among the distinct amounts of room left, so that the work grows as n log n.

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


def packing_efficiency(lengths: Sequence[int] | np.ndarray, packs: list[list[int]], capacity: int) -> float:
    """The share of the packs' tokens that samples fill, from 0 to 1; 1 where there are no packs."""
    return float(np.asarray(lengths).sum() / (len(packs) * capacity)) if packs else 1.0
