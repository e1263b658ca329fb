"""Losses by token, for any objective: cross entropy, fp32 or wider, and a bounded number of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose fp32 distributions are in memory at a time: a vocabulary may have 150,000 entries."""


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32, or in the wider dtype that it has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every token: logits of shape (tokens, vocabulary) and int64 targets of shape (tokens,) to (tokens,)."""
    return nn.functional.cross_entropy(widen(logits), targets, reduction="none")


def by_chunks(compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """A function of every token, computed on `CHUNK` tokens at a time and again in the backward pass, which saves its memory.

    Args:
        compare: from tensors of shape (tokens, ...) to shape (tokens,).
        tensors: its arguments, of shape (tokens, ...).
    """
    chunks = zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(compare, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])
