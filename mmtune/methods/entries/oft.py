"""Orthogonal fine-tuning (arXiv 2306.07280)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.methods.method import BIAS_ALL, Method
from mmtune.methods.setting_types import COUNT, DROPOUT
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn


class Oft(Method):
    """OFT, whose blocks divide a layer's inputs."""

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """PEFT would take another block size, with a warning."""
        super().check_model(model, targets, settings)
        size = settings.get("oft_block_size", self.config_class().oft_block_size)
        for path, module in targets.items():
            layer: Any = module
            if layer.in_features % size:
                raise UserError(f"oft_block_size: {size} does not divide the {layer.in_features} inputs of {path}")


OFT = Oft(
    "oft",
    "an orthogonal rotation of each layer (arXiv 2306.07280)",
    "peft:OFTConfig",
    1e-3,
    unsupported_values=BIAS_ALL,
    # r: 0 means "by block size", and is the value when a recipe gives none.
    setting_types={"r": COUNT, "oft_block_size": COUNT, "module_dropout": DROPOUT},
)
