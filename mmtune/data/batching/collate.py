"""Collation of encoded samples to batches, padded or packed, never truncated, with row ids and the errors of failed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from mmtune.data.encoding.encode import IGNORE_INDEX
from mmtune.utils.errors import UserError

PER_TOKEN = (
    "input_ids",
    "labels",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "image_embeds_position_mask",
    "source_ids",
    "decoder_input_ids",
)
"""Tensors with one value per token, shape (1, length); all others are concatenated by image, tile or patch."""

CROSS_ATTENTION_MASKS = ("cross_attention_mask", "image_attention_mask")
"""Tensors that say which images a token attends to, shape (1, length, images, ...)."""
BY_SAMPLE = ("pixel_values", "pixel_attention_mask", "aspect_ratio_ids", "aspect_ratio_mask")
"""Media tensors whose first dimension is the sample and not the image, in models with such a mask and in Idefics: shape
(1, images, ...)."""

METADATA_KEYS = ("row", "note", "vision_features")
"""Keys of an encoded row that are not tensors: its id, a note about changes to its media, and the features of its images."""


class RowSize(NamedTuple):
    """Size of a row: number of tokens, of supervised tokens, and of values in `pixel_values`."""

    tokens: int
    supervised: int
    pixels: int


class Collator:
    """Collates encoded samples to a batch, with the row ids under `rows`, their sizes (without padding and dummy samples)
    under `sizes`, and the errors of failed rows and the notes about changed media under `faults`. With a feature store,
    `vision_features` are those of the samples with images, in their order.

    Args:
        pad_token_id: the token for padding.
        dummy_sample: a sample with an image and no supervised token (`dummy_sample`), added to batches without
            images, so that the vision tower takes part in every step.
        packed: concatenate the samples of a batch to one sequence, instead of padding them.
    """

    def __init__(self, pad_token_id: int, dummy_sample: dict[str, torch.Tensor] | None = None, packed: bool = False) -> None:
        self._pad_token_id = pad_token_id
        self._dummy_sample = dummy_sample
        self._packed = packed

    def __call__(self, items: Sequence[dict[str, Any] | UserError]) -> dict[str, Any]:
        samples = [item for item in items if not isinstance(item, UserError)]
        faults = [item for item in items if isinstance(item, UserError)] + [item["note"] for item in samples if "note" in item]
        rows = [item["row"] for item in samples if "row" in item]
        encoded = [{key: value for key, value in item.items() if key not in METADATA_KEYS} for item in samples]
        sizes = [_size(item) for item in encoded]
        if encoded and self._dummy_sample is not None and not any("pixel_values" in item for item in encoded):
            encoded.append(self._dummy_sample)
        batch: dict[str, Any] = {}
        if encoded:
            batch = pack(encoded) if self._packed else collate(encoded, self._pad_token_id)
        if features := [item["vision_features"] for item in samples if "vision_features" in item]:
            batch["vision_features"] = features
        return {**batch, "rows": rows, "sizes": sizes, "faults": faults}


def collate(encoded: list[dict[str, torch.Tensor]], pad_token_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad samples to one batch, in the same way as the processor would.

    Args:
        encoded: at least one result of `encode_sample` or `encode_prompt`.
        pad_token_id: the padding token of `input_ids`.
        side: "right" for training, "left" for generation.

    Returns:
        Per-token tensors of shape (batch, longest), and media tensors concatenated along their first dimension. Their other
        dimensions are padded with zeros at the end (missing tiles, and pixels at the bottom and right). Tensors of shape
        (batch, images, ...) are zeros for the images that a sample lacks.
    """
    longest = max(sample["input_ids"].shape[1] for sample in encoded)
    by_sample = BY_SAMPLE if _images_by_sample(encoded) else ()
    fill = {"input_ids": pad_token_id, "decoder_input_ids": pad_token_id, "labels": IGNORE_INDEX}
    batch: dict[str, torch.Tensor] = {}
    for key in _keys(encoded):
        if key in PER_TOKEN:
            rows = []
            present = [_per_token(sample, key) for sample in encoded]
            width = max(row.shape[1] for row in present)  # the decoder of an encoder-decoder model has a length of its own
            for row in present:
                missing = width - row.shape[1]
                rows.append(pad(row, (missing, 0) if side == "left" else (0, missing), value=fill.get(key, 0)))
            batch[key] = torch.cat(rows)
        else:
            present = [sample[key] for sample in encoded if key in sample]
            if key in CROSS_ATTENTION_MASKS:
                present = [_cross_attention_mask(sample, key, present[0], longest, side) for sample in encoded]
            elif key in by_sample:
                present = [sample.get(key, present[0][:, :0]) for sample in encoded]
            batch[key] = concat_padded(present, dim=_media_axis(key, encoded))
    return batch


def pack(encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pack samples: concatenate them to one sequence.

    Only `position_ids` mark the sample boundaries. `packed_attention.packed_inputs` computes from them the inputs with which the
    model keeps the samples apart, and must process the batch before the model.

    Args:
        encoded: at least one result of `encode_sample`.

    Returns:
        Per-token tensors of shape (1, sum of lengths); `position_ids` (int64), which start at 0 in every sample; `labels` with
        -100 at the first token of every sample, because the last token of the previous sample would predict it; and media
        tensors concatenated as in `collate`, with Idefics' images in one row.
    """
    batch: dict[str, torch.Tensor] = {}
    for key in _keys(encoded):
        if key in PER_TOKEN:
            batch[key] = torch.cat([_per_token(sample, key) for sample in encoded], dim=1)
        else:
            in_row = _images_by_sample(encoded) and key in BY_SAMPLE
            present = [sample[key] for sample in encoded if key in sample]
            batch[key] = concat_padded(present, dim=1 if in_row else _media_axis(key, encoded))
    lengths = [sample["input_ids"].shape[1] for sample in encoded]
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if "labels" in batch:
        batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
    return batch


def _size(encoded: dict[str, torch.Tensor]) -> RowSize:
    pixels = encoded["pixel_values"].numel() if "pixel_values" in encoded else 0
    tokens = sum(encoded[key].shape[1] for key in ("input_ids", "decoder_input_ids") if key in encoded)
    return RowSize(tokens, int((encoded["labels"][:, 1:] != IGNORE_INDEX).sum()), pixels)


def _keys(encoded: list[dict[str, torch.Tensor]]) -> list[str]:
    return list(dict.fromkeys(key for sample in encoded for key in sample))


def _per_token(sample: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The sample's tensor, or zeros: some processors omit token types for samples without media, and a dummy has no source."""
    return sample[key] if key in sample else torch.zeros_like(sample["labels" if key == "source_ids" else "input_ids"])


def _images_by_sample(encoded: list[dict[str, torch.Tensor]]) -> bool:
    """Whether the first dimension of the pixels is the sample and not the image."""
    masked_images = any("pixel_attention_mask" in sample and sample["pixel_values"].ndim == 5 for sample in encoded)
    return masked_images or any(key in sample for sample in encoded for key in CROSS_ATTENTION_MASKS)


def _cross_attention_mask(
    sample: dict[str, torch.Tensor], key: str, example: torch.Tensor, longest: int, side: str
) -> torch.Tensor:
    """The sample's mask with its tokens padded to `longest`, or a mask for no image like that of another sample."""
    length = sample["input_ids"].shape[1]
    mask = sample[key] if key in sample else example.new_zeros((1, length, 0, *example.shape[3:]))
    padding = (longest - length, 0) if side == "left" else (0, longest - length)
    return pad(mask, [*[0] * 2 * (mask.ndim - 2), *padding])


def _media_axis(key: str, encoded: list[dict[str, torch.Tensor]]) -> int:
    """The dimension along which a media tensor is concatenated.

    It is the first, except for the pixels of MiniCPM-V, of shape (1, channels, patch size, width of all patches), whose grids of
    patches are in `target_sizes`.
    """
    return 3 if key == "pixel_values" and any("target_sizes" in sample for sample in encoded) else 0


def concat_padded(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate along `dim`, with every other dimension padded with zeros at its end to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [0 if axis == dim else largest[axis] - tensor.shape[axis] for axis in range(tensor.ndim)]
        padded.append(pad(tensor, [size for axis in reversed(missing) for size in (0, axis)]) if any(missing) else tensor)
    return torch.cat(padded, dim)
