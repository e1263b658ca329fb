"""Tensors without data whose storages are counted: what a computation would allocate, found by running it on nothing."""

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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging as transformers_logging

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

BLOCK_4BIT, BLOCK_NESTED = 64, 256  # weights under one scale, and scales under one scale of scales: bitsandbytes' own
BLOCK_STATE, SMALLEST_8BIT_STATE, SMALLEST_PAGED_STATE = 256, 4096, 100_000  # of its optimizers
REAL = 65_536  # what a model makes of nothing is real up to this size, so that it can steer the computation

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


@contextlib.contextmanager
def suppress_fake_tensor_warnings() -> Iterator[None]:
    """Without the libraries' remarks on tensors that have no data."""
    verbosity, torchs = transformers_logging.get_verbosity(), logging.getLogger(fake_tensor.__name__)
    transformers_logging.set_verbosity_error()
    torchs.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        torchs.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


class MemoryTracker(TorchDispatchMode):
    """Runs what happens inside it on fake tensors, and counts the bytes of live storages by kind.

    Integers and masks stay real, as do small tensors that a model makes itself, because token ids and image grids decide what is
    computed. Everything that comes from a weight or from pixels is fake. A storage counts from the operation that makes it
    until its last tensor is gone, so what autograd saves counts as long as it is saved.

    Args:
        vocabulary: tensors whose last dimension has this size count as logits.

    Attributes:
        allocating: the kind of what is made next.
        moment: a name for what is going on.
        live: bytes by kind now.
        fullest: bytes by kind at the moment when most was live.
        peak_phase: `moment` then.
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
        """Begin again with what is live now."""
        self._most, self.peak, self.peak_phase = 0, dict(self.live), self.phase
        self._note()

    def add(self, kind: MemoryKind, size: int) -> None:
        """Count `size` bytes for good."""
        self.live[kind] += size
        self._note()

    def track(self, tensor: torch.Tensor, kind: MemoryKind, size: int | None = None) -> None:
        """Count a tensor's storage, unless it is known, until it is gone.

        Args:
            size: bytes, where they are not the storage's own.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if size is None else size
        self._storages[key] = kind, size
        self.live[kind] += size
        weakref.finalize(storage, self._gone, key)
        self._note()

    def move(self, tensor: torch.Tensor, kind: MemoryKind) -> None:
        """Count a tensor's storage as another kind from now on."""
        key = tensor.untyped_storage()._cdata
        was, size = self._storages[key]
        self.live[was] -= size
        self.live[kind] += size
        self._storages[key] = kind, size

    def fake(self, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """A fake CPU tensor of this dtype and shape, not counted yet."""
        with self._fake:
            return torch.empty(shape or tensor.shape, dtype=tensor.dtype, device="cpu")

    def track_model(self, model: nn.Module, frozen: MemoryKind = "weights") -> None:
        """Make every parameter and buffer of a model fake, shared ones once, and count them.

        Args:
            frozen: the kind that what does not train counts as.
        """
        made: dict[int, torch.Tensor] = {}
        for module in list(model.modules()):
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = self._held(tensor, frozen)
                        owned[name] = made[id(tensor)]  # type: ignore[assignment]
            if isinstance(module, QuantizedLinear):
                self.add("quantization_constants", module.constants)

    def _held(self, tensor: torch.Tensor, frozen: MemoryKind) -> torch.Tensor:
        fake = self.fake(tensor)
        size = getattr(tensor, "stored_bytes", None)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        self.track(fake, "trainable" if tensor.requires_grad else frozen, size)
        return fake

    def _gone(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def _note(self) -> None:
        now = sum(self.live.values())
        if now > self._most:
            self._most, self.peak, self.peak_phase = now, dict(self.live), self.phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.eq.Scalar and isinstance(args[0], FakeTensor) and args[0].is_floating_point():
            # Idefics3 asks which images are padding, all zero; none is here. Shapes follow from the answer, so it has values.
            return torch.zeros((), dtype=torch.bool).expand(args[0].shape)
        if func in _INDEXING:
            args = (args[0], [part for index in args[1] for part in _places(index)], *args[2:])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            out = func(*args, **kwargs)
        else:
            with self._fake:
                out = func(*args, **kwargs)
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            if not given and all(not tensor.is_floating_point() or tensor.numel() <= REAL for tensor in made):
                out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                scores = tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary and self.allocating == "activations"
                self.track(tensor, "logits" if scores else self.allocating)
        return out


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """An index; a real mask as the positions that it picks, since fake tensors cannot say how many there are."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    return list(index.nonzero().unbind(1))


class QuantizedLinear(nn.Linear):
    """Takes and gives what bitsandbytes' `Linear8bitLt` or `Linear4bit` would, in memory.

    Its weight has the layer's shape, and `stored_bytes` as bitsandbytes stores it. Where a real layer dequantizes the whole
    weight, in the forward and again in the backward pass, so does this; int8 saves its input for the backward pass.

    Args:
        layer: the layer that it replaces.
        precision: int8 (LLM.int8, arXiv 2208.07339) or nf4 with double quantization (QLoRA, arXiv 2305.14314).

    Attributes:
        constants: bytes of what dequantizes the weight.
    """

    def __init__(self, layer: nn.Linear, precision: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.precision = precision
        self.bias = layer.bias
        self.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.uint8), requires_grad=False)
        stored, self.constants = quantized_bytes(layer.out_features, layer.in_features, precision)
        self.weight.stored_bytes = stored  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of shape (..., in) to (..., out), in the input's dtype."""
        if self.precision == "int8":
            int8: torch.Tensor = _Dequantize.apply(input, self.weight, self.bias, True)
            return int8
        nf4: torch.Tensor = _Dequantize.apply(input.to(torch.bfloat16), self.weight, self.bias, False)
        return nf4.to(input.dtype)


class _Dequantize(torch.autograd.Function):
    """A linear layer whose weight exists in the input's dtype only while it is multiplied with."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, keeps_input: bool) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.kept = weight.shape, x.dtype, x if keeps_input else None
        return nn.functional.linear(x, _like(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


def _like(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(weight, dtype=dtype)


def quantized_bytes(out_features: int, in_features: int, precision: str) -> tuple[int, int]:
    """Bytes of a quantized weight, and of the constants that dequantize it, as bitsandbytes keeps them.

    int8: a byte for a weight, an fp32 scale for every row. nf4: half a byte for a weight; a one-byte scale for every 64 weights,
    an fp32 scale and for every 256 of those; the 16 and 256 fp32 values of the two codes, and one fp32 offset.
    """
    weights = out_features * in_features
    if precision == "int8":
        return weights, 4 * out_features
    scales = math.ceil(weights / BLOCK_4BIT)
    return math.ceil(weights / 2), scales + 4 * math.ceil(scales / BLOCK_NESTED) + 4 * (16 + 256 + 1)


def bnb_state_bytes(parameters: int, states: int, in_8bit: bool, paged: bool = False) -> int:
    """Bytes that a bitsandbytes optimizer keeps on the device for one tensor.

    Args:
        parameters: the tensor's elements.
        states: tensors of state, 2 for Adam (arXiv 2110.02861).
        in_8bit: a byte for an element and an fp32 scale for every 256; tensors under 4096 elements keep fp32 states.
        paged: states of 100,000 elements and more can leave for the host's memory.
    """
    if paged and parameters >= SMALLEST_PAGED_STATE:
        return 0
    if in_8bit and parameters >= SMALLEST_8BIT_STATE:
        return states * (parameters + 4 * math.ceil(parameters / BLOCK_STATE))
    return states * 4 * parameters


def make_prompt_tokens_real(model: Any) -> None:
    """Give a PEFT model's virtual tokens, numbers that it looks up by and no weights, values again after it was made on meta."""
    for name, tokens in getattr(model, "prompt_tokens", {}).items():
        model.prompt_tokens[name] = torch.arange(tokens.shape[0])
