"""Several samples in one row of a batch: which models keep them apart, what they need for it, and the proof that they do.

transformers masks attention between samples by itself when a row's `position_ids` start again from 0 in each, as long as
it gets no `attention_mask` and no cache (`find_packed_sequence_indices` in its masking_utils).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from mmtune.families.family_table import UNPACKABLE
from mmtune.methods.method_table import method_of
from mmtune.models.compute import in_eval_mode, move_batch, training_autocast
from mmtune.utils.errors import UserError

MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Families whose tokens have three positions: time, height and width. Masks are made from a fourth, the place in the text."""

SEPARATE = ("full_attention", "sliding_attention")
"""Kinds of layers that look through a mask. Convolutions and recurrent states run on from one sample into the next."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations that transformers makes masks, or sequence borders, for."""

FULL_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""How far the logits of packed samples may be from their own, relative to their size, by the precision that they come in.

Rounding alone made 1e-6 and 5e-3 on small models, a leak 0.06 to 1.
"""


def check_packable(model: nn.Module) -> None:
    """Refuse what is known not to keep samples apart. What is not refused here is still to be proved: `verify_packing`.

    Raises:
        UserError: naming the family, the prompt method or the layers, with the reason.
    """
    method = method_of(model)
    if method is not None and not method.packable:
        raise _refusal(f"{method.name} puts its prompt before the first sample of a row and before no other")
    check_packable_family(_base(model).config)


def check_packable_family(config: PreTrainedConfig) -> None:
    """As `check_packable`, from the base's config alone, before there are weights.

    Raises:
        UserError: naming the family or the layers, with the reason.
    """
    family = config.model_type
    if family in UNPACKABLE:
        raise _refusal(f"{family}: {UNPACKABLE[family]}")
    text = config.get_text_config()
    others = sorted(set(getattr(text, "layer_types", None) or ()) - set(SEPARATE))
    if others:
        raise _refusal(f"{family} has {', '.join(others)} layers, which run on from one sample into the next")
    attention = text._attn_implementation  # None until a model is built
    if attention is not None and attention not in ATTENTION:
        raise _refusal(f"{family}: no mask between samples is made for attention {attention!r}")


def packed_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a model must be given so that no token of a packed row sees another sample.

    Args:
        model: without the wrappers of a distributed run; an adapter may stand around it.
        inputs: a batch. It is packed if it has `position_ids`, int64 of shape (1, length), which start at 0 in every sample.

    Returns:
        The batch as it is, if it is not packed. A packed one without `attention_mask` and with no cache; in families with
        three positions a token, `position_ids` of shape (4, 1, length): the place in the sample's text, then time, height, width.
    """
    if "position_ids" not in inputs:
        return inputs
    kept = {key: value for key, value in inputs.items() if key != "attention_mask"}
    base = _base(model)
    if base.config.model_type in MROPE:
        kept["position_ids"] = _with_three_positions(base, inputs)
    return {**kept, "use_cache": False}


def verify_packing(model: nn.Module, packed: dict[str, Any], singles: list[dict[str, Any]]) -> None:
    """Compare the logits of samples packed into one row with those of the same samples, each alone.

    The model computes in its own precision. In half precision rounding alone makes differences, so that only a leak that changes
    the logits by a twentieth is seen there.

    Args:
        model: as it will train.
        packed: a batch of `pack`, with labels; at least two samples, with an image and a prompt in each where the data have them.
        singles: a batch of `collate` for each of these samples.

    Raises:
        UserError: when they differ by more than the tolerance, relative to the size of the logits.
    """
    with in_eval_mode(model), torch.no_grad(), training_autocast(model):
        together = _supervised_logits(model, packed)
        alone = torch.cat([_supervised_logits(model, single) for single in singles])
    tolerance = FULL_TOLERANCE if together.dtype == torch.float32 else HALF_TOLERANCE
    difference = float((together.double() - alone.double()).norm() / alone.double().norm())
    if not difference <= tolerance:
        raise _refusal(
            f"{_base(model).config.model_type}: the logits of samples in one row differ from those of the same samples alone "
            f"by {difference:.1e} of their size, more than {tolerance:g}"
        )


def _supervised_logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Shape (supervised tokens, vocabulary), in the order of the samples."""
    inputs = packed_inputs(model, move_batch(model, batch))
    supervised = nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:] != -100
    logits: torch.Tensor = model(**inputs, logits_to_keep=supervised).logits
    return logits


def _with_three_positions(base: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's own positions for every sample alone: the row is taken apart into a padded batch, and put together again."""
    place = inputs["position_ids"]
    starts = (place[0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], place.shape[1]], strict=True)]

    def apart(row: torch.Tensor) -> torch.Tensor:
        return pad_sequence(list(row[0].split(lengths)), batch_first=True)

    types = inputs.get("mm_token_type_ids", torch.zeros_like(place))
    mask = apart(torch.ones_like(place))
    three, _ = base.model.get_rope_index(
        apart(inputs["input_ids"]),
        mm_token_type_ids=apart(types),
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=mask,
    )
    return torch.cat([place[None], three[:, mask.bool()][:, None]])


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _refusal(reason: str) -> UserError:
    return UserError(f"packed batches cannot be exact here: {reason}; use padded batches")
