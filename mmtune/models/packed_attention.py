"""Attention over packed sequences: model support, inputs, and verification that packed samples do not attend to each other.

transformers keeps packed samples apart if `position_ids` restart at 0 in every sample and neither `attention_mask` nor a cache is
passed (`find_packed_sequence_indices` in its masking_utils):

- flash attention reads the boundaries of the samples from the positions,
- flex attention has a mask of blocks, and skips those between samples,
- sdpa and eager have a dense mask, whose cost grows with the square of the row. `attention_by_sample` replaces it for sdpa.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from mmtune.families.family_table import family_of
from mmtune.methods.method import Method
from mmtune.methods.method_table import method_of
from mmtune.models.compute import in_eval_mode, move_batch, training_autocast
from mmtune.utils.errors import UserError
from mmtune.utils.transformers_private import attention_of

MASKED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
"""Layer types that use an attention mask. Convolutions and recurrent states continue from one sample into the next."""

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
    if attention is not None and attention not in ALL_MASK_ATTENTION_FUNCTIONS:  # kernels of the hub are there once loaded
        supported = ", ".join(sorted(ALL_MASK_ATTENTION_FUNCTIONS))
        raise _unsupported(f"{family}: attention {attention!r} has no mask between samples; supported: {supported}")


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
    if hasattr(getattr(base, "model", None), "get_rope_index"):
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
    with in_eval_mode(model), torch.no_grad(), training_autocast(model), attention_by_sample():
        packed_logits = _supervised_logits(model, packed)
        single_logits = torch.cat([_supervised_logits(model, single) for single in singles])
    tolerance = FP32_TOLERANCE if packed_logits.dtype == torch.float32 else HALF_TOLERANCE
    difference = float((packed_logits.double() - single_logits.double()).norm() / single_logits.double().norm())
    if not difference <= tolerance:
        raise _unsupported(
            f"{_base(model).config.model_type}: the logits of packed samples differ from those of single samples by a relative "
            f"{difference:.1e}, limit {tolerance:g}"
        )


@contextlib.contextmanager
def attention_by_sample() -> Iterator[None]:
    """Inside, sdpa computes every sample of a packed row alone, without a mask of the row; the result differs by rounding only.

    Other attention does not change. Layers whose samples do not attend causally to all of themselves, as with a sliding window
    that is shorter than a sample, have their dense mask.
    """
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = _mask_by_sample
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


class SampleMask(torch.Tensor):
    """The mask of a packed row, bool of shape (1, 1, length, length), that has no values until they are read.

    `scaled_dot_product_attention` with this mask computes each sample alone. Every other function gets the dense mask.
    """

    lengths: list[int]
    boundaries: torch.Tensor
    _make_dense: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, lengths: list[int], make_dense: Callable[[], torch.Tensor], device: torch.device) -> SampleMask:
        """
        Args:
            lengths: of the row's samples.
            make_dense: returns the dense mask.
        """
        size = sum(lengths)
        mask = torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, size, size).as_subclass(cls)
        mask.lengths, mask._make_dense = lengths, cache(make_dense)
        mask.boundaries = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        return mask

    def dense(self) -> torch.Tensor:
        """The mask with its values, which are made once."""
        return self._make_dense()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return _masked_attention(*args, **(kwargs or {}))
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        return func(*_with_values(args), **{name: _with_values(value) for name, value in (kwargs or {}).items()})


def _with_values(argument: Any) -> Any:
    """An argument of a function, a list or a tuple of them, with dense masks."""
    if isinstance(argument, SampleMask):
        return argument.dense()
    return type(argument)(map(_with_values, argument)) if type(argument) in (list, tuple) else argument


_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda")),
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.get_device, torch.Tensor.is_floating_point),
}
"""Functions of a tensor that read no values."""


def _masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: SampleMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with a `SampleMask`: tensors of shape (1, heads, length, width)."""
    lengths = attn_mask.lengths
    attend = partial(scaled_dot_product_attention, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa)
    if is_causal or any(tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[2] != sum(lengths) for tensor in (query, key)):
        return attend(query, key, value, attn_mask=attn_mask.dense(), is_causal=is_causal)
    if (dtype := _varlen_dtype(query, value)) is not None and not dropout_p and not enable_gqa:
        ends, longest = attn_mask.boundaries, max(lengths)
        query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        by_token: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
        attended: torch.Tensor = by_token.transpose(0, 1)[None]
        return attended
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*sample, is_causal=True) for sample in samples], dim=2)


def _varlen_dtype(query: torch.Tensor, value: torch.Tensor) -> torch.dtype | None:
    """The dtype in which torch's variable-length kernel computes this attention; None if it does not support it."""
    if not query.is_cuda or not torch.backends.cuda.is_flash_attention_available():
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    width = query.shape[-1]
    supported = dtype in (torch.bfloat16, torch.float16) and width == value.shape[-1] and width <= 256 and width % 8 == 0
    return dtype if supported and torch.cuda.get_device_capability(query.device) >= (8, 0) else None


def _mask_by_sample(**arguments: Any) -> torch.Tensor | None:
    """transformers' mask for sdpa, as a `SampleMask` if the row has packed samples of causal attention."""
    is_packed = (
        arguments["batch_size"] == 1
        and arguments["q_length"] == arguments["kv_length"]
        and arguments.get("attention_mask") is None
        and not (arguments.get("allow_is_causal_skip", True) or arguments.get("use_vmap") or torch.compiler.is_compiling())
    )
    lengths = _causal_samples(arguments["mask_function"], arguments["q_length"], arguments["device"]) if is_packed else None
    if lengths is None:
        mask: torch.Tensor | None = sdpa_mask(**arguments)
        return mask
    return SampleMask.of(lengths, partial(sdpa_mask, **arguments), arguments["device"])


def _causal_samples(mask_function: Callable[..., torch.Tensor], length: int, device: torch.device) -> list[int] | None:
    """Lengths of the samples of a row, if each token attends to all tokens of its sample up to itself and to no other.

    Args:
        mask_function: transformers' function of the indices of batch, head, query and key. Whether a query sees a key does not
            increase with their distance, except where tokens of an image attend to each other.

    Returns:
        None for any other attention.
    """
    tokens = torch.arange(length, device=device)

    def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return mask_function(tokens[0], tokens[0], queries, keys).expand(len(queries))

    is_start = torch.cat([tokens[:1] == 0, ~sees(tokens[1:], tokens[:-1])])
    starts = tokens[is_start]
    first = starts[is_start.cumsum(0) - 1]  # of the token's sample
    others = tokens[first > 0]
    if not bool(sees(tokens, first).all() & ~sees(tokens[:-1], tokens[1:]).any() & ~sees(others, first[others] - 1).any()):
        return None
    ends = [*starts.tolist()[1:], length]
    return [end - start for start, end in zip(starts.tolist(), ends, strict=True)]


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
