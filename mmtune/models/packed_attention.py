"""Attention over packed sequences: model support, inputs, and verification that packed samples do not attend to each other.

transformers masks attention between packed samples if `position_ids` restart at 0 in every sample and neither `attention_mask`
nor a cache is passed (`find_packed_sequence_indices` in its masking_utils).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from mmtune.families.family_table import family_of
from mmtune.methods.method import Method
from mmtune.methods.method_table import method_of
from mmtune.models.compute import in_eval_mode, move_batch, training_autocast
from mmtune.utils.errors import UserError
from mmtune.utils.transformers_private import attention_of

MASKED_LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layer types that use an attention mask. Convolutions and recurrent states continue from one sample into the next."""

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations for which transformers builds masks or sequence boundaries."""

FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest allowed relative difference between the logits of packed and single samples, in fp32 and in half precision.

Measured on small models: rounding 1e-6 and 5e-3, a leak between samples 0.06 to 1.
"""


def check_packable(model: nn.Module) -> None:
    """Check that a model is not known to mix packed samples; `verify_packing` checks the logits.

    Raises:
        UserError: a family, prompt method or layer type that does not support packing, with the reason.
    """
    check_packable_method(method_of(model))
    check_packable_family(_base(model).config)


def check_packable_method(method: Method | None) -> None:
    """Check that an adapter's method supports packing; None is a model without an adapter.

    Raises:
        UserError: a prompt method.
    """
    if method is not None and not method.packable:
        raise _unsupported(f"{method.name} adds its virtual tokens only before the first sample of a row")


def check_packable_family(config: PreTrainedConfig) -> None:
    """Check from the base's config alone that its family supports packing; see `check_packable`.

    Raises:
        UserError: a family or layer type that does not support packing, with the reason.
    """
    family = config.model_type
    if (reason := family_of(family).unpackable) is not None:
        raise _unsupported(f"{family}: {reason}")
    text = config.get_text_config()
    unmasked = sorted(set(getattr(text, "layer_types", None) or ()) - set(MASKED_LAYER_TYPES))
    if unmasked:
        raise _unsupported(f"{family} has {', '.join(unmasked)} layers, whose state continues from one sample into the next")
    attention = attention_of(text)  # None until a model is built
    if attention is not None and attention not in ATTENTION_IMPLEMENTATIONS:
        raise _unsupported(
            f"{family}: attention {attention!r} has no mask between samples; supported: {', '.join(ATTENTION_IMPLEMENTATIONS)}"
        )


def packed_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Model inputs with which tokens of a packed row attend to their own sample only.

    Args:
        model: the model, plain or with an adapter, without wrappers of a distributed run.
        inputs: a batch. It is packed if it has `position_ids`, int64 of shape (1, length), which restart at 0 in every sample.

    Returns:
        A batch that is not packed is returned unchanged. A packed batch has no `attention_mask` and no cache; for families with
        three positions per token, `position_ids` have shape (4, 1, length): text position in the sample, time, height, width.
    """
    if "position_ids" not in inputs:
        return inputs
    packed = {key: value for key, value in inputs.items() if key != "attention_mask"}
    base = _base(model)
    if hasattr(base.model, "get_rope_index"):
        packed["position_ids"] = _mrope_positions(base, inputs)
    return {**packed, "use_cache": False}


def verify_packing(model: nn.Module, packed: dict[str, Any], singles: list[dict[str, Any]]) -> None:
    """Compare the logits of samples packed into one row with those of the single samples.

    The model computes in its own precision. Because of rounding, the tolerance in half precision is 5 %.

    Args:
        model: the model, as it will be trained.
        packed: a batch of `pack`, with labels, of at least two samples.
        singles: a batch of `collate` for each of these samples.

    Raises:
        UserError: the relative difference is larger than the tolerance.
    """
    with in_eval_mode(model), torch.no_grad(), training_autocast(model):
        packed_logits = _supervised_logits(model, packed)
        single_logits = torch.cat([_supervised_logits(model, single) for single in singles])
    tolerance = FP32_TOLERANCE if packed_logits.dtype == torch.float32 else HALF_TOLERANCE
    difference = float((packed_logits.double() - single_logits.double()).norm() / single_logits.double().norm())
    if not difference <= tolerance:
        raise _unsupported(
            f"{_base(model).config.model_type}: the logits of packed samples differ from those of single samples by a relative "
            f"{difference:.1e}, limit {tolerance:g}"
        )


def _supervised_logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of shape (supervised tokens, vocabulary), in the order of the samples."""
    inputs = packed_inputs(model, move_batch(model, batch))
    supervised = nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:] != -100
    logits: torch.Tensor = model(**inputs, logits_to_keep=supervised).logits
    return logits


def _mrope_positions(base: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """mRoPE positions of every sample: the row is split into a padded batch for `get_rope_index`, then joined again."""
    text_positions = inputs["position_ids"]
    starts = (text_positions[0] == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], text_positions.shape[1]], strict=True)]

    def unpack(row: torch.Tensor) -> torch.Tensor:
        return pad_sequence(list(row[0].split(lengths)), batch_first=True)

    types = inputs.get("mm_token_type_ids", torch.zeros_like(text_positions))
    mask = unpack(torch.ones_like(text_positions))
    arguments = {
        "input_ids": unpack(inputs["input_ids"]),
        "mm_token_type_ids": unpack(types),
        "image_grid_thw": inputs.get("image_grid_thw"),
        "video_grid_thw": inputs.get("video_grid_thw"),
        "attention_mask": mask,
    }
    taken = inspect.signature(base.model.get_rope_index).parameters  # Qwen Omni takes no types, HunYuan no videos
    positions, _ = base.model.get_rope_index(**{name: value for name, value in arguments.items() if name in taken})
    return torch.cat([text_positions[None], positions[:, mask.bool()][:, None]])


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _unsupported(reason: str) -> UserError:
    return UserError(f"packing is not supported: {reason}; set data.packing: false")
