"""Encoded samples to batches: padded or packed, never truncated, with the rows' ids and the rows that failed beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from mmtune.data.encoding.encode import IGNORE_INDEX
from mmtune.utils.errors import UserError

PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids", "source_ids")
"""What comes with one value a token, shape (1, length); everything else stacks by image, tile or patch."""

METADATA_KEYS = ("row", "note")
"""What an encoded row carries besides tensors: its id, and what was done to its media."""


class RowSize(NamedTuple):
    """What a row brings into its batch: numbers of tokens, of supervised ones, and of values in `pixel_values`."""

    tokens: int
    supervised: int
    pixels: int


class Collator:
    """Batches encoded samples. Beside the batch travel the rows' ids under `rows`, their sizes under `sizes`, without padding and
    stand-ins, and under `faults` the rows that failed or whose media were changed.

    Args:
        pad_token_id: what fills shorter rows up.
        stand_in: a row with an image and nothing supervised (`mmtune.data.dataset.dummy_sample`), put into batches without
            images, so that the vision tower takes part in every step.
        packed: all samples of a batch in one row, in place of a row each.
    """

    def __init__(self, pad_token_id: int, dummy_sample: dict[str, torch.Tensor] | None = None, packed: bool = False) -> None:
        self._pad_token_id = pad_token_id
        self._stand_in = dummy_sample
        self._packed = packed

    def __call__(self, items: Sequence[dict[str, Any] | UserError]) -> dict[str, Any]:
        given = [item for item in items if not isinstance(item, UserError)]
        faults = [item for item in items if isinstance(item, UserError)] + [item["note"] for item in given if "note" in item]
        rows = [item["row"] for item in given if "row" in item]
        encoded = [{key: value for key, value in item.items() if key not in METADATA_KEYS} for item in given]
        sizes = [_size(item) for item in encoded]
        if encoded and self._stand_in is not None and not any("pixel_values" in item for item in encoded):
            encoded.append(self._stand_in)
        batch: dict[str, Any] = {}
        if encoded:
            batch = pack(encoded) if self._packed else collate(encoded, self._pad_token_id)
        return {**batch, "rows": rows, "sizes": sizes, "faults": faults}


def collate(encoded: list[dict[str, torch.Tensor]], pad_token_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad samples of different lengths into one batch, as the processor itself would have padded it.

    Args:
        encoded: from `encode_sample` or `encode_prompt`; at least one.
        pad_token_id: fills `input_ids`.
        side: "right" to train, "left" to generate.

    Returns:
        Per-token tensors of shape (batch, longest), and media tensors joined along their first dimension, the others filled up
        with zeros at their end: tiles that an image lacks, pixels at the bottom and at the right. Idefics' images, which are
        (batch, images, channels, height, width), are zeros for a sample that has none.
    """
    longest = max(sample["input_ids"].shape[1] for sample in encoded)
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    batch: dict[str, torch.Tensor] = {}
    for key in _keys(encoded):
        if key in PER_TOKEN:
            rows = []
            for sample in encoded:
                row = _per_token(sample, key)
                missing = longest - row.shape[1]
                rows.append(pad(row, (missing, 0) if side == "left" else (0, missing), value=fill.get(key, 0)))
            batch[key] = torch.cat(rows)
        else:
            present = [sample[key] for sample in encoded if key in sample]
            if _images_by_sample(encoded) and key in ("pixel_values", "pixel_attention_mask"):
                none = present[0][:, :0]
                present = [sample.get(key, none) for sample in encoded]
            batch[key] = _join(present, dim=0)
    return batch


def pack(encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Put samples one after the other into one row.

    Only `position_ids` say where a sample ends: `packed_attention.packed_inputs` makes of them what the model needs to keep the
    samples apart, and has to see the batch before the model does.

    Args:
        encoded: from `encode_sample`; at least one.

    Returns:
        Per-token tensors of shape (1, sum of lengths); `position_ids`, int64, which start at 0 in every sample; `labels` with
        -100 at the first token of every sample, which the last token of the sample before it would otherwise learn to predict;
        and media tensors as `collate` joins them, Idefics' images in one row as well.
    """
    batch: dict[str, torch.Tensor] = {}
    for key in _keys(encoded):
        if key in PER_TOKEN:
            batch[key] = torch.cat([_per_token(sample, key) for sample in encoded], dim=1)
        else:
            in_row = _images_by_sample(encoded) and key in ("pixel_values", "pixel_attention_mask")
            batch[key] = _join([sample[key] for sample in encoded if key in sample], dim=1 if in_row else 0)
    lengths = [sample["input_ids"].shape[1] for sample in encoded]
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if "labels" in batch:
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    return batch


def _size(encoded: dict[str, torch.Tensor]) -> RowSize:
    pixels = encoded["pixel_values"].numel() if "pixel_values" in encoded else 0
    return RowSize(encoded["input_ids"].shape[1], int((encoded["labels"][:, 1:] != IGNORE_INDEX).sum()), pixels)


def _keys(encoded: list[dict[str, torch.Tensor]]) -> list[str]:
    return list(dict.fromkeys(key for sample in encoded for key in sample))


def _per_token(sample: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Some processors leave out the types of a text's tokens where no medium is: all of them are 0."""
    return sample[key] if key in sample else torch.zeros_like(sample["input_ids"])


def _images_by_sample(encoded: list[dict[str, torch.Tensor]]) -> bool:
    """Whether the first dimension of the pixels is the sample, as in Idefics and SmolVLM, and not the image."""
    return any("pixel_attention_mask" in sample and sample["pixel_values"].ndim == 5 for sample in encoded)


def _join(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate along `dim`, every other dimension filled up at its end to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [0 if axis == dim else largest[axis] - tensor.shape[axis] for axis in range(tensor.ndim)]
        filled.append(pad(tensor, [size for axis in reversed(missing) for size in (0, axis)]) if any(missing) else tensor)
    return torch.cat(filled, dim)
