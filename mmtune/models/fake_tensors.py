"""Memory tracking on fake tensors: the bytes that a computation would allocate, by category, without any data."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from transformers.utils import logging as transformers_logging

__all__ = [  # torch's own, for other modules
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "TorchDispatchMode",
    "TreeSpec",
    "tree_flatten",
    "tree_unflatten",
]

MemoryKind = Literal[
    "weights", "frozen_models", "quantization_constants", "trainable", "gradients", "optimizer", "activations", "logits"
]
MEMORY_KINDS: tuple[MemoryKind, ...] = (
    "weights",
    "frozen_models",
    "quantization_constants",
    "trainable",
    "gradients",
    "optimizer",
    "activations",
    "logits",
)

BLOCK_4BIT, BLOCK_NESTED = 64, 256  # bitsandbytes: weights per scale, and scales per scale of double quantization
BLOCK_STATE, MIN_8BIT_STATE, MIN_PAGED_STATE = 256, 4096, 100_000  # bitsandbytes optimizers, in elements
MAX_REAL = 65_536  # tensors that a model creates (such as position ids) have data up to this number of elements

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


@contextlib.contextmanager
def suppress_fake_tensor_warnings() -> Iterator[None]:
    """Suppress the warnings of torch and transformers about tensors without data."""
    verbosity, torch_logger = transformers_logging.get_verbosity(), logging.getLogger(fake_tensor.__name__)
    transformers_logging.set_verbosity_error()
    torch_logger.addFilter(_drop_record)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        torch_logger.removeFilter(_drop_record)


def _drop_record(record: logging.LogRecord) -> bool:
    return False


class MemoryTracker(TorchDispatchMode):
    """Dispatch mode that runs operations on fake tensors and counts the bytes of live storages by kind.

    Integers, masks and small tensors that a model creates keep their data, because token ids and image grids control the
    computation. Tensors computed from weights or pixels are fake. A storage counts from its allocation until its last tensor is
    freed, so tensors saved by autograd count while they are saved.

    Args:
        vocabulary: tensors whose last dimension has this size count as logits.

    Attributes:
        allocating: the kind of new allocations.
        phase: the name of the current phase, set by the caller.
        live: bytes by kind now.
        peak: bytes by kind at the peak.
        peak_phase: the phase of the peak.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.allocating: MemoryKind = "activations"
        self.phase = ""
        self._vocabulary = vocabulary
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live: dict[MemoryKind, int] = dict.fromkeys(MEMORY_KINDS, 0)
        self._storages: dict[int, tuple[MemoryKind, int]] = {}
        self.reset_peak()

    def reset_peak(self) -> None:
        """Reset the peak to the bytes that are live now."""
        self._peak_total, self.peak, self.peak_phase = 0, dict(self.live), self.phase
        self._update_peak()

    def add(self, kind: MemoryKind, size: int) -> None:
        """Count `size` bytes permanently."""
        self.live[kind] += size
        self._update_peak()

    def track(self, tensor: torch.Tensor, kind: MemoryKind, size: int | None = None) -> None:
        """Count a tensor's storage until it is freed; a storage counts once.

        Args:
            tensor: the tensor.
            kind: the kind it counts as.
            size: bytes, if other than those of the storage.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if size is None else size
        self._storages[key] = kind, size
        self.live[kind] += size
        weakref.finalize(storage, self._release, key)
        self._update_peak()

    def move(self, tensor: torch.Tensor, kind: MemoryKind) -> None:
        """Count a tensor's storage as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        previous, size = self._storages[key]
        self.live[previous] -= size
        self.live[kind] += size
        self._storages[key] = kind, size

    def fake(self, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A fake CPU tensor with the dtype of `tensor` and its shape, or `shape`; not counted yet."""
        with self._fake:
            return torch.empty(shape or tensor.shape, dtype=tensor.dtype, device="cpu")

    def track_model(self, model: nn.Module, frozen: MemoryKind = "weights") -> None:
        """Replace every parameter and buffer of a model by a fake tensor and count them; shared tensors count once.

        Args:
            model: the model; changed in place.
            frozen: the kind of tensors that do not require gradients.
        """
        fakes: dict[int, torch.Tensor] = {}
        for module in list(model.modules()):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in fakes:
                            fakes[id(tensor)] = self._fake_and_track(tensor, frozen)
                        tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]
            if isinstance(module, QuantizedLinear):
                self.add("quantization_constants", module.constants)

    def _fake_and_track(self, tensor: torch.Tensor, frozen: MemoryKind) -> torch.Tensor:
        fake = self.fake(tensor)
        size = getattr(tensor, "stored_bytes", None)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        self.track(fake, "trainable" if tensor.requires_grad else frozen, size)
        return fake

    def _release(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def _update_peak(self) -> None:
        total = sum(self.live.values())
        if total > self._peak_total:
            self._peak_total, self.peak, self.peak_phase = total, dict(self.live), self.phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.eq.Scalar and isinstance(args[0], FakeTensor) and args[0].is_floating_point():
            # Idefics3 looks for padding images (all zero). There are none here; the result has data, as shapes depend on it.
            return torch.zeros((), dtype=torch.bool).expand(args[0].shape)
        if func in _INDEXING:
            args = (args[0], [positions for index in args[1] for positions in _index_positions(index)], *args[2:])
        if func is _aten._grouped_mm.default:
            func = _grouped_product
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            out = func(*args, **kwargs)
        else:
            with self._fake:
                out = func(*args, **kwargs)
            outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            if not inputs and all(not tensor.is_floating_point() or tensor.numel() <= MAX_REAL for tensor in outputs):
                out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                is_logits = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary and self.allocating == "activations"
                self.track(tensor, "logits" if is_logits else self.allocating)
        return out


def _grouped_product(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, *_: Any) -> torch.Tensor:
    """A tensor like the product of experts: of tokens with a matrix for each group, or of the tokens of each group.

    torch's own rule for fake tensors takes bf16 of certain sizes only, as its kernel for GPUs does.
    """
    shape = left.shape[-2], right.shape[-1]
    return left.new_empty(shape if left.ndim + right.ndim == 5 else (len(offsets), *shape))


def _index_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The index; a mask with data as its positions, because the result's shape depends on their number."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero().unbind(1))


class QuantizedLinear(nn.Linear):
    """A linear layer that uses as much memory as bitsandbytes' `Linear8bitLt` or `Linear4bit`.

    The weight has the shape of the layer, and its `stored_bytes` are those of bitsandbytes. As in bitsandbytes, the weight is
    dequantized in the forward pass and again in the backward pass, and int8 saves its input for the backward pass.

    Args:
        layer: the layer to replace.
        precision: int8 (LLM.int8, arXiv 2208.07339) or nf4 with double quantization (QLoRA, arXiv 2305.14314).

    Attributes:
        constants: bytes of the quantization constants.
    """

    def __init__(self, layer: nn.Linear, precision: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.precision = precision
        self.bias = layer.bias
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.uint8), requires_grad=False)
        stored, self.constants = quantized_bytes(layer.out_features, layer.in_features, precision)
        self.weight.stored_bytes = stored  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps shape (..., in) to (..., out), in the input's dtype."""
        if self.precision == "int8":
            int8: torch.Tensor = _Dequantize.apply(input, self.weight, self.bias, True)
            return int8
        nf4: torch.Tensor = _Dequantize.apply(input.to(torch.bfloat16), self.weight, self.bias, False)
        return nf4.to(input.dtype)


class _Dequantize(torch.autograd.Function):
    """Linear function whose weight exists in the input's dtype only during the matrix multiplication."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, saves_input: bool) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.saved_input = weight.shape, x.dtype, x if saves_input else None
        return nn.functional.linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


def quantized_bytes(out_features: int, in_features: int, precision: str) -> tuple[int, int]:
    """Bytes of a quantized weight matrix and of its quantization constants in bitsandbytes.

    int8: one byte per weight and an fp32 scale per row. nf4: half a byte per weight, a one-byte scale per 64 weights, an fp32
    scale per 256 of these scales, the 16 and 256 fp32 values of the two codebooks, and one fp32 offset.
    """
    weights = out_features * in_features
    if precision == "int8":
        return weights, 4 * out_features
    scales = math.ceil(weights / BLOCK_4BIT)
    return math.ceil(weights / 2), scales + 4 * math.ceil(scales / BLOCK_NESTED) + 4 * (16 + 256 + 1)


def bnb_state_bytes(parameters: int, states: int, in_8bit: bool, paged: bool = False) -> int:
    """Bytes on the device of a bitsandbytes optimizer's states for one parameter tensor.

    Args:
        parameters: the number of elements of the tensor.
        states: state tensors per parameter, 2 for Adam (arXiv 2110.02861).
        in_8bit: one byte per element and an fp32 scale per 256 elements; tensors under 4096 elements have fp32 states.
        paged: states of at least 100,000 elements can be paged out to host memory and do not count.
    """
    if paged and parameters >= MIN_PAGED_STATE:
        return 0
    if in_8bit and parameters >= MIN_8BIT_STATE:
        return states * (parameters + 4 * math.ceil(parameters / BLOCK_STATE))
    return states * 4 * parameters


def make_prompt_tokens_real(model: Any) -> None:
    """Give the `prompt_tokens` of a PEFT model that was created on the meta device their values (indices of virtual tokens)."""
    for name, tokens in getattr(model, "prompt_tokens", {}).items():
        model.prompt_tokens[name] = torch.arange(tokens.shape[0])
