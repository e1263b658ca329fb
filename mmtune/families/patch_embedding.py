"""Patch embeddings as matrix products.

The vision towers of Qwen2-VL's kind project patches with a 3D convolution whose kernel is as large as its input: one product per
patch. The kernels of convolutions are slow for it, in half precision by orders of magnitude (transformers issue 45750). The
product is the same up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PatchConv3d(nn.Conv3d):
    """A 3D convolution that computes inputs of its kernel's size, shape (patches, channels, *kernel), as a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        return nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def use_patch_products(model: Any) -> None:
    """Make every 3D convolution without padding, dilation and groups a `PatchConv3d`. Weights and their names stay."""
    for module in model.modules():
        if type(module) is nn.Conv3d and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1) and module.groups == 1:
            module.__class__ = PatchConv3d
