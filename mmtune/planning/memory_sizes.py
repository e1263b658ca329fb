"""Memory sizes such as 24GB."""

from __future__ import annotations

import re

from mmtune.utils.errors import UserError

UNITS = (
    {"": 1, "B": 1} | {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)} | {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}
)


def parse_memory(text: str) -> int:
    """Convert a size to bytes, such as `24GB` (10^9 bytes) or `24GiB` (2^30 bytes).

    Raises:
        UserError: the text is not a memory size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit += "" if unit in UNITS or unit.endswith("B") else "B"
    if match is None or unit not in UNITS or not float(match[1]):
        raise UserError(f"expected a memory size such as 24GB (10^9 bytes) or 24GiB (2^30 bytes), got {text!r}")
    return int(float(match[1]) * UNITS[unit])


def format_memory(size: int) -> str:
    """A number of bytes as GB (10^9 bytes) or MB (10^6 bytes)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
