"""Mixtures of experts whose weights are stacked: one parameter of shape (experts, rows, columns) for all experts of a layer.

transformers stores Mixtral's, Qwen's, Llama 4's, GLM's and most other mixtures of experts so. No such weight is a linear layer,
so `all-linear` does not select it, and bitsandbytes does not quantize it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmtune.distributed.deepspeed_private import full_shape

BASE_LAYER = ".base_layer"
"""What PEFT inserts into the path of a module that it has wrapped."""


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one layer.

    Attributes:
        module: full path of the module that holds them, as in the model without an adapter.
        parameters: names of its stacked parameters.
        experts: how many there are.
        used: how many of them one token uses; None where the router does not say.
        size: weights of one expert.
    """

    module: str
    parameters: tuple[str, ...]
    experts: int
    used: int | None
    size: int

    @property
    def paths(self) -> list[str]:
        """Full paths of the stacked parameters."""
        return [f"{self.module}.{name}" for name in self.parameters]

    @property
    def stored(self) -> int:
        """Weights of all experts."""
        return self.experts * self.size


def find_experts(model: nn.Module) -> dict[str, ExpertStack]:
    """The stacked experts of a model, plain or wrapped by PEFT, by the path that each has in this model."""
    return {name: stack for name, module in model.named_modules() if (stack := _stack_of(model, name, module)) is not None}


def _stack_of(model: nn.Module, name: str, module: nn.Module) -> ExpertStack | None:
    if "Experts" not in type(module).__name__:
        return None
    shapes = {key: full_shape(parameter) for key, parameter in module.named_parameters(recurse=False)}
    stacked = {key: shape for key, shape in shapes.items() if len(shape) == 3}
    if not stacked:
        return None
    experts = min(shape[0] for shape in stacked.values())
    is_shared = "Shared" in type(module).__name__  # every token uses every shared expert
    return ExpertStack(
        module=name.replace(BASE_LAYER, ""),
        parameters=tuple(stacked),
        experts=experts,
        used=experts if is_shared else _experts_per_token(model, name),
        size=sum(math.prod(shape[1:]) for shape in stacked.values()),
    )


def _experts_per_token(model: nn.Module, name: str) -> int | None:
    """`top_k` of the router: of the module around the experts, or of one beside them."""
    while name.endswith(BASE_LAYER):
        name = name.removesuffix(BASE_LAYER)
    around = model.get_submodule(name.rpartition(".")[0])
    for module in (around, *around.children()):
        top_k: Any = getattr(module, "top_k", None)
        if isinstance(top_k, int):
            return top_k
    return None


def without_layer_numbers(paths: Iterable[str]) -> list[str]:
    """Paths with `*` for the number of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))
