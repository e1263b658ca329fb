"""FLOPs of a training step and peak FLOPs of the device, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mmtune.data.batching.collate import RowSize
from mmtune.distributed.deepspeed_private import full_shape, full_size
from mmtune.families.structure import Components, find_components
from mmtune.methods.tuners.peft_private import adapts_stack, stacked_factors
from mmtune.models.components import component_of
from mmtune.models.experts.expert_stacks import ExpertStack, find_experts
from mmtune.models.fake_tensors import TorchDispatchMode


@dataclass(frozen=True)
class PeakFlops:
    """Peak rates of dense matrix multiplication with fp32 accumulation, in TFLOP/s; None if the device lacks the format."""

    half: float
    tf32: float | None
    fp32: float

    def at(self, dtype: torch.dtype, tf32: bool) -> float:
        """FLOP/s for a dtype. For fp32, the rate of TF32 if it is enabled and the device has it."""
        best = self.fp32 if not tf32 or self.tf32 is None else self.tf32
        return 1e12 * (best if dtype == torch.float32 else self.half)


PEAK_FLOPS = {
    r"Tesla V100-SXM[23]-(16|32)GB": PeakFlops(125, None, 15.7),
    r"Tesla V100-PCIE-(16|32)GB": PeakFlops(112, None, 14),
    r"Tesla T4": PeakFlops(65, None, 8.1),
    r"NVIDIA A100(-SXM4|-PCIE)?[- ](40|80)GB( PCIe)?": PeakFlops(312, 156, 19.5),
    r"NVIDIA A10": PeakFlops(125, 62.5, 31.2),
    r"NVIDIA A30": PeakFlops(165, 82, 10.3),
    r"NVIDIA A40": PeakFlops(149.7, 74.8, 37.4),
    r"NVIDIA RTX A6000": PeakFlops(154.8, 77.4, 38.7),
    r"NVIDIA GeForce RTX 3090": PeakFlops(71, 35.6, 35.6),
    r"NVIDIA L4": PeakFlops(121, 60, 30.3),
    r"NVIDIA L40S": PeakFlops(362, 183, 91.6),
    r"NVIDIA GeForce RTX 4090": PeakFlops(165.2, 82.6, 82.6),
    r"NVIDIA H100 80GB HBM3": PeakFlops(989.4, 494.7, 67),
    r"NVIDIA H100 PCIe": PeakFlops(756, 378, 51),
    r"NVIDIA H100 NVL": PeakFlops(835.5, 417.5, 60),
    r"NVIDIA H200": PeakFlops(989.4, 494.7, 67),
    r"NVIDIA H200 NVL": PeakFlops(835.5, 417.5, 60),
    r"NVIDIA GeForce RTX 5090": PeakFlops(209.5, 104.8, 104.8),
    r"NVIDIA B200": PeakFlops(2250, 1125, 75),
    r"AMD Instinct MI250X": PeakFlops(191.5, None, 47.9),
    r"AMD Instinct MI300X": PeakFlops(1307.4, 653.7, 163.4),
}
"""By the full device name: MIG slices and laptop GPUs have other names and other peaks.

From NVIDIA's datasheets (V100, T4, A10, A30, A40, RTX A6000, A100, L4, L40S, H100, H200, HGX B200; half of the values with
sparsity), its architecture whitepapers (GA102, Ada and RTX Blackwell, for the GeForce cards), and AMD's datasheets (MI300X; half
an MI250X, whose two dies are two devices).
"""


def peak_flops(device: torch.device) -> PeakFlops | None:
    """The peak rates of a device; None for a CPU and for devices that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class _FlopsRates:
    """FLOPs of a forward and backward pass per unit of input."""

    token: float
    square: float  # of a row's tokens
    supervised: float
    pixel: float


class ModelFlops:
    """The FLOPs that a model needs for its rows, as in "model FLOPs utilization" (PaLM, arXiv 2204.02311, appendix B).

    A matrix multiplication of n tokens with a weight of N elements takes 2nN operations in the forward pass, 2nN more if its
    input needs a gradient, and 2nN more if the weight is trainable. Of a mixture of experts, N is what a token uses, without the
    router. Attention over a row of n tokens takes 4n² times the width of all heads in a layer, and twice as much again with
    gradients. Padding, recomputation by checkpointing, and operations other than matrix multiplication do not count.

    One forward pass of each kind of batch, with and without images, is recorded: which weights it multiplies with, how often,
    and where gradients flow. After that, the count is proportional to the rows: tokens for the language model, supervised tokens
    for its head, pixels for the vision tower and the projector. The attention of the vision tower is counted in that pass.

    Args:
        model: the model in training, without the wrappers of a distributed run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._components = find_components(model)
        self._rates: dict[bool, _FlopsRates] = {}
        self._rows: dict[bool, list[RowSize]] = {True: [], False: []}
        self.dtype = torch.float32
        """The dtype of the language model's matrix multiplications."""

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether it is known how many weights a token uses: not where a stack of weights has no router that says it."""
        decoder = _base(model).get_decoder()
        stacks = find_experts(decoder)
        stacked = {f"{name}.{parameter}" for name, stack in stacks.items() for parameter in stack.parameters}
        others = (name for name, weight in decoder.named_parameters() if len(full_shape(weight)) == 3 and name not in stacked)
        return next(others, None) is None and all(stack.used is not None for stack in stacks.values())

    def add(self, rows: Iterable[RowSize], images: bool) -> None:
        """Count rows of a batch.

        Args:
            images: whether the batch has images, including those of a dummy sample.
        """
        self._rows[images] += rows

    def take(self) -> float | None:
        """The FLOPs of all rows since the last call; None if no forward pass of their kind was recorded."""
        total = 0.0
        for images, rows in self._rows.items():
            if rows and images not in self._rates:
                total = float("nan")
            elif rows:
                rates = self._rates[images]
                total += rates.token * sum(row.tokens for row in rows) + rates.square * sum(row.tokens**2 for row in rows)
                total += rates.supervised * sum(row.supervised for row in rows) + rates.pixel * sum(row.pixels for row in rows)
            rows.clear()
        return total if total == total else None

    @contextlib.contextmanager
    def record_costs(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Record the forward pass of the block, if no batch of its kind has been recorded.

        Args:
            inputs: of the model, with `shift_labels` of shape (supervised,).
        """
        images = "pixel_values" in inputs
        if images in self._rates or not inputs["shift_labels"].numel():
            yield
            return
        recorder = _FlopsRecorder(self._model, self._components)
        with recorder.recording(inputs["input_ids"].numel()):
            yield
        config: Any = _base(self._model).config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        vision = (
            recorder.flops["vision"] + recorder.flops["projector"] + recorder.attention.flops * (1 + 2 * recorder.share("vision"))
        )
        self.dtype = recorder.dtype
        self._rates[images] = _FlopsRates(
            token=recorder.flops["language"] / inputs["input_ids"].numel(),
            square=4 * width * config.num_attention_heads * config.num_hidden_layers * (1 + 2 * recorder.share("language")),
            supervised=recorder.flops["lm_head"] / inputs["shift_labels"].numel(),
            pixel=vision / inputs["pixel_values"].numel() if images else 0.0,
        )


class _AttentionFlops(TorchDispatchMode):
    """Counts the forward FLOPs of attention, fused or as batched matrix products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:  # query and key of shape (batch, heads, length, width)
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
        elif name == "bmm":
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


class _FlopsRecorder:
    """FLOPs of one forward pass and its backward pass, by component."""

    def __init__(self, model: nn.Module, components: Components) -> None:
        self._model = model
        self._components = components
        self.flops: dict[str, float] = dict.fromkeys(("vision", "projector", "language", "lm_head"), 0.0)
        self._forward, self._with_gradient = dict(self.flops), dict(self.flops)
        self.attention = _AttentionFlops()
        self.dtype = torch.float32

    def share(self, component: str) -> float:
        """The fraction of a component's forward FLOPs whose results need a gradient."""
        return self._with_gradient[component] / max(self._forward[component], 1.0)

    @contextlib.contextmanager
    def recording(self, tokens: int) -> Iterator[None]:
        """
        Args:
            tokens: of the batch.
        """
        experts = find_experts(self._model)
        with contextlib.ExitStack() as stack:
            for name, module in self._model.named_modules():
                record: Any = None
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                    record = partial(self._product, component_of(name, self._components))
                elif name in experts:
                    trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                    record = partial(self._experts, component_of(name, self._components), experts[name], tokens, trained)
                elif adapts_stack(module):
                    record = partial(self._adapted, component_of(name, self._components), module, tokens)
                if record is not None:
                    stack.callback(module.register_forward_hook(record).remove)
            for tower in map(self._model.get_submodule, self._components.towers):
                inside = stack.enter_context(contextlib.ExitStack())
                for hook in (
                    tower.register_forward_pre_hook(partial(self._enter, inside)),
                    tower.register_forward_hook(partial(self._leave, inside)),
                ):
                    stack.callback(hook.remove)
            yield

    def _enter(self, inside: contextlib.ExitStack, *_: Any) -> None:
        inside.enter_context(self.attention)

    def _leave(self, inside: contextlib.ExitStack, *_: Any) -> None:
        inside.close()

    def _product(self, component: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # from the layer's attributes, because a weight may be quantized or sharded
        if isinstance(module, nn.Linear):
            forward = 2 * output.numel() * module.in_features
        else:
            forward = 2 * output.numel() * module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
        # PEFT's update of a parameter is in its place during the forward pass, and no parameter.
        trained = isinstance(module.weight, nn.Parameter) and module.weight.requires_grad
        self._add(component, forward, inputs[0], output, trained)
        if component == "language":
            self.dtype = output.dtype

    def _experts(
        self, component: str, stack: ExpertStack, tokens: int, trained: bool, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> None:
        """A product for every pair of a token and one of its experts."""
        self._add(component, 2 * _pairs(inputs, tokens * (stack.used or 0)) * stack.size, inputs[0], output, trained)

    def _adapted(
        self, component: str, wrapper: nn.Module, tokens: int, module: nn.Module, inputs: Any, output: torch.Tensor
    ) -> None:
        """LoRA of a parameter, as if its factors were layers beside the experts that a token uses; PEFT multiplies them once."""
        factors, experts = stacked_factors(wrapper)
        size = sum(full_size(factor) for factor in factors if factor.requires_grad) // experts
        self._add(component, 2 * _pairs(inputs, tokens) * size, inputs[0], output, True)

    def _add(self, component: str, forward: float, x: torch.Tensor, output: torch.Tensor, trained: bool) -> None:
        self._forward[component] += forward
        self._with_gradient[component] += forward * output.requires_grad
        self.flops[component] += forward * (1 + x.requires_grad + trained)


def _pairs(inputs: tuple[Any, ...], default: int) -> int:
    """Pairs of a token and an expert: the indices of experts that a router gives, if the module takes them."""
    indices = inputs[1] if len(inputs) > 1 else None
    return indices.numel() if isinstance(indices, torch.Tensor) and not indices.is_floating_point() else default


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
