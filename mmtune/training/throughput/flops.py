"""How many floating-point operations a model needs for its rows, and how many the device could do."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from mmtune.data.batching.collate import RowSize
from mmtune.models.components import Components, component_of, find_components


@dataclass(frozen=True)
class Peak:
    """Dense matrix multiplication summed in fp32, in 10^12 operations a second; None where the device lacks the format."""

    half: float
    tf32: float | None
    fp32: float

    def at(self, dtype: torch.dtype, tf32: bool) -> float:
        """Operations a second in a dtype; fp32 is TF32 where that is switched on and there."""
        best = self.fp32 if not tf32 or self.tf32 is None else self.tf32
        return 1e12 * (best if dtype == torch.float32 else self.half)


PEAKS = {
    r"Tesla V100-SXM[23]-(16|32)GB": Peak(125, None, 15.7),
    r"Tesla V100-PCIE-(16|32)GB": Peak(112, None, 14),
    r"Tesla T4": Peak(65, None, 8.1),
    r"NVIDIA A100(-SXM4|-PCIE)?[- ](40|80)GB( PCIe)?": Peak(312, 156, 19.5),
    r"NVIDIA A10": Peak(125, 62.5, 31.2),
    r"NVIDIA A30": Peak(165, 82, 10.3),
    r"NVIDIA A40": Peak(149.7, 74.8, 37.4),
    r"NVIDIA RTX A6000": Peak(154.8, 77.4, 38.7),
    r"NVIDIA GeForce RTX 3090": Peak(71, 35.6, 35.6),
    r"NVIDIA L4": Peak(121, 60, 30.3),
    r"NVIDIA L40S": Peak(362, 183, 91.6),
    r"NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
    r"NVIDIA H100 80GB HBM3": Peak(989.4, 494.7, 67),
    r"NVIDIA H100 PCIe": Peak(756, 378, 51),
    r"NVIDIA H100 NVL": Peak(835.5, 417.5, 60),
    r"NVIDIA H200": Peak(989.4, 494.7, 67),
    r"NVIDIA H200 NVL": Peak(835.5, 417.5, 60),
    r"NVIDIA GeForce RTX 5090": Peak(209.5, 104.8, 104.8),
    r"NVIDIA B200": Peak(2250, 1125, 75),
    r"AMD Instinct MI250X": Peak(191.5, None, 47.9),
    r"AMD Instinct MI300X": Peak(1307.4, 653.7, 163.4),
}
"""By the whole name that the driver gives: a slice of a GPU, or a laptop's, has another name and another peak.

From NVIDIA's datasheets (V100, T4, A10, A30, A40, RTX A6000, A100, L4, L40S, H100, H200, HGX B200; half of what they give with
sparsity), its architecture whitepapers (GA102, Ada and RTX Blackwell, for the GeForce cards), and AMD's datasheets (MI300X; half
an MI250X, whose two dies are two devices).
"""


def peak_of(device: torch.device) -> Peak | None:
    """What a device can do; None for one that is not in the table, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


@dataclass(frozen=True)
class _Rates:
    """Operations of a forward and backward pass, by what they grow with."""

    token: float
    square: float  # of a row's tokens
    supervised: float
    pixel: float


class ModelFlops:
    """The operations that a model needs for its rows: those of "model FLOPs utilization" (PaLM, arXiv 2204.02311, appendix B).

    A matrix multiplication of n tokens with a weight of N elements takes 2nN operations in the forward pass, 2nN more where its
    input needs a gradient, and 2nN more where the weight trains. Attention over a row of n tokens takes 4n² times the width of
    all heads in a layer, and twice that again where gradients flow. Padding does not count, nor what checkpointing computes
    again, nor what is no matrix multiplication.

    Which weights a pass multiplies with, how often, and where gradients flow, is seen in one forward pass of each kind of batch,
    with images and without. From there on the count grows with the rows: tokens for the language model, supervised tokens for its
    head, pixels for the vision tower and the projector, whose attention is counted as torch's own kernels do it in that pass.

    Args:
        model: as it trains, without the wrappers of a distributed run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._components = find_components(model)
        self._rates: dict[bool, _Rates] = {}
        self._rows: dict[bool, list[RowSize]] = {True: [], False: []}
        self.dtype = torch.float32
        """What the language model multiplies in."""

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether every weight takes part for every token: of experts, stacked in one parameter, only some do."""
        weights = _base(model).get_decoder().parameters()
        return not any(len(getattr(weight, "ds_shape", weight.shape)) == 3 for weight in weights)  # ZeRO-3 divides them

    def add(self, rows: Iterable[RowSize], images: bool) -> None:
        """Count rows of a batch.

        Args:
            images: whether the batch has any, those of dummy samples included.
        """
        self._rows[images] += rows

    def take(self) -> float | None:
        """The operations for all rows since the last time; None where there were no tokens to learn their cost from."""
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
    def learning(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, a forward pass of a kind of batch that is new shows what its rows cost.

        Args:
            inputs: the model's, with `shift_labels` of shape (supervised,).
        """
        images = "pixel_values" in inputs
        if images in self._rates or not inputs["shift_labels"].numel():
            yield
            return
        seen = _Seen(self._model, self._components)
        with seen.watching():
            yield
        config: Any = _base(self._model).config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        vision = seen.flops["vision"] + seen.flops["projector"] + seen.attention.flops * (1 + 2 * seen.share("vision"))
        self.dtype = seen.dtype
        self._rates[images] = _Rates(
            token=seen.flops["language"] / inputs["input_ids"].numel(),
            square=4 * width * config.num_attention_heads * config.num_hidden_layers * (1 + 2 * seen.share("language")),
            supervised=seen.flops["lm_head"] / inputs["shift_labels"].numel(),
            pixel=vision / inputs["pixel_values"].numel() if images else 0.0,
        )


class _Attention(TorchDispatchMode):
    """Counts the forward operations of attention, fused or as batched products."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:  # query and key of shape (batch, heads, length, width)
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
        elif name == "bmm":
            self.flops += 2 * args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))


class _Seen:
    """What one forward pass multiplies with, by component, with what the backward pass will add."""

    def __init__(self, model: nn.Module, components: Components) -> None:
        self._model = model
        self._components = components
        self.flops: dict[str, float] = dict.fromkeys(("vision", "projector", "language", "lm_head"), 0.0)
        self._forward, self._flowing = dict(self.flops), dict(self.flops)
        self.attention = _Attention()
        self.dtype = torch.float32

    def share(self, component: str) -> float:
        """The part of a component's products whose results need a gradient."""
        return self._flowing[component] / max(self._forward[component], 1.0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                    hook = module.register_forward_hook(partial(self._product, component_of(name, self._components)))
                    stack.callback(hook.remove)
            if self._components.vision_tower is not None:
                tower = self._model.get_submodule(self._components.vision_tower)
                inside = stack.enter_context(contextlib.ExitStack())
                for hook in (
                    tower.register_forward_pre_hook(lambda *_: inside.enter_context(self.attention) and None),
                    tower.register_forward_hook(lambda *_: inside.close()),
                ):
                    stack.callback(hook.remove)
            yield

    def _product(self, component: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # from the layer's own sizes: a weight may be quantized or sharded
        if isinstance(module, nn.Linear):
            forward = 2 * output.numel() * module.in_features
        else:
            forward = 2 * output.numel() * module.in_channels // module.groups * torch.Size(module.kernel_size).numel()
        self._forward[component] += forward
        self._flowing[component] += forward * output.requires_grad
        self.flops[component] += forward * (1 + inputs[0].requires_grad + module.weight.requires_grad)
        if component == "language":
            self.dtype = output.dtype


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
