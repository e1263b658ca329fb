"""Encoded samples to batches: padded, never truncated, with the rows' ids and the rows that failed beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtune.data.encode import IGNORE_INDEX
from mmtune.data.message import RowError

PER_TOKEN = ("input_ids", "labels", "attention_mask", "token_type_ids", "mm_token_type_ids", "source_ids")
"""What the processors give with one value a token, shape (1, length); everything else stacks by image or patch."""


class Collator:
    """Batches encoded samples. Beside the batch travel the rows' ids under `rows`, and under `faults` those that failed or whose
    media were changed.

    Args:
        pad_token_id: what fills shorter rows up.
        stand_in: a row with an image and nothing supervised (`mmtune.data.dataset.stand_in`), put into batches that have no image,
            so that the vision tower takes part in every step.
    """

    def __init__(self, pad_token_id: int, stand_in: dict[str, torch.Tensor] | None = None) -> None:
        self._pad_token_id = pad_token_id
        self._stand_in = stand_in

    def __call__(self, items: Sequence[dict[str, Any] | RowError]) -> dict[str, Any]:
        given = [item for item in items if not isinstance(item, RowError)]
        faults = [item for item in items if isinstance(item, RowError)] + [item["note"] for item in given if "note" in item]
        rows = [item["row"] for item in given if "row" in item]
        encoded = [{key: value for key, value in item.items() if key not in ("row", "note")} for item in given]
        if encoded and self._stand_in is not None and not any("pixel_values" in item for item in encoded):
            encoded.append(self._stand_in)
        batch: dict[str, Any] = collate(encoded, self._pad_token_id) if encoded else {}
        return {**batch, "rows": rows, "faults": faults}


def collate(encoded: list[dict[str, torch.Tensor]], pad_token_id: int, side: str = "right") -> dict[str, Any]:
    """Pad samples of different lengths into one batch.

    Args:
        encoded: from `encode_sample` or `encode_prompt`; at least one.
        pad_token_id: fills `input_ids`.
        side: "right" to train, "left" to generate.

    Returns:
        Per-token tensors of shape (batch, longest) and media tensors joined along their first dimension.
    """
    longest = max(sample["input_ids"].shape[1] for sample in encoded)
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for sample in encoded for key in sample):
        present = [sample[key] for sample in encoded if key in sample]
        if key in PER_TOKEN:
            rows = [_pad(tensor, longest, fill.get(key, 0), side) for tensor in present]
            batch[key] = torch.cat(rows)
        else:
            batch[key] = torch.cat(present)
    return batch


def _pad(tensor: torch.Tensor, length: int, value: int, side: str) -> torch.Tensor:
    missing = length - tensor.shape[1]
    return torch.nn.functional.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=value)
