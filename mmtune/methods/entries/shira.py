"""SHiRA, sparse high-rank adapters (arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.methods.method import MANAGED, Method
from mmtune.methods.setting_types import COUNT
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn


class Shira(Method):
    """SHiRA, which trains as many of a layer's weights as LoRA of the same rank has."""

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """PEFT would stop with a traceback at a layer that has fewer weights."""
        super().check_model(model, targets, settings)
        r = settings.get("r", self.config_class().r)
        for path, module in targets.items():
            layer: Any = module
            weights, width = layer.in_features * layer.out_features, layer.in_features + layer.out_features
            if r * width > weights:
                raise UserError(
                    f"r: {r} trains {r * width} weights of {path}, which has {weights}; use at most {weights // width}"
                )


SHIRA = Shira(
    "shira",
    "a sparse update of weights chosen at random (arXiv 2406.13175)",
    "peft:ShiraConfig",
    3e-4,
    managed=MANAGED | {"mask_type": "PEFT has a random mask only"},
    setting_types={"r": COUNT},
)
