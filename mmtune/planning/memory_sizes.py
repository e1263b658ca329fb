"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from mmtune.utils.errors import UserError

UNITS = (
    {"": 1, "B": 1} | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)} | {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}
)


def parse_memory(text: str) -> int:
    """Bytes of an amount such as `24GB` (10^9 bytes) or `24GiB` (2^30 bytes).

    Raises:
        UserError: when it is not an amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit += "" if unit in UNITS or unit.endswith("B") else "B"
    if match is None or unit not in UNITS or not float(match[1]):
        raise UserError(f"{text!r} is not an amount of memory; expected, for example, 24GB (10^9 bytes) or 24GiB (2^30 bytes)")
    return int(float(match[1]) * UNITS[unit])
