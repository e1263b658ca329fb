"""Embeddings of a prompt's tokens: read or replaced while the model runs, and the mean embedding that stands for no word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmtune.utils.errors import UserError

ROWS_AT_ONCE = 8192


@contextmanager
def changed_embeddings(model: nn.Module, shape: torch.Size, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change the embeddings of the prompt in every forward pass of the block, before images are put among them.

    Args:
        shape: of `input_ids`; other calls of the embedding, such as that of a decoder, stay as they are.
        change: from embeddings of shape (rows, tokens, width) to what the model reads instead.

    Raises:
        UserError: the model embeds its tokens elsewhere.
    """
    changed = False

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        nonlocal changed
        ids = args[0] if args else kwargs["input"]
        if ids.shape != shape:
            return output
        changed = True
        return change(output)

    handle = _embedding(model).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not changed:
        raise UserError(f"{type(model).__name__} embeds its prompt outside its input embeddings, so no word can be replaced")


@torch.no_grad()
def mean_embedding(model: nn.Module) -> torch.Tensor:
    """The mean of the embeddings of the vocabulary, fp32, shape (width,), as the model computes them, adapters included."""
    embedding = _embedding(model)
    weight: Any = embedding.weight
    count = weight.shape[0]
    total = torch.zeros((), device=weight.device)
    for start in range(0, count, ROWS_AT_ONCE):
        ids = torch.arange(start, min(start + ROWS_AT_ONCE, count), device=weight.device)
        total = total + embedding(ids[None])[0].float().sum(dim=0)
    return total / count


def _embedding(model: Any) -> nn.Module:
    module: nn.Module = model.get_input_embeddings()
    return module
