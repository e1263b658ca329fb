"""Private members of torch's data loader."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


def end_workers(loader: DataLoader[Any]) -> None:
    """End the persistent workers of a loader. They ignore the signal by which the interpreter's exit would end them."""
    loader._iterator = None
