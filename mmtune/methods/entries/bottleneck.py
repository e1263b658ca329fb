"""Bottleneck adapters (arXiv 1902.00751, 2005.00052, 2110.04366), which PEFT lacks: `tuners/bottleneck_tuner.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.methods.method import MANAGED, Method
from mmtune.methods.setting_types import COUNT, DROPOUT

if TYPE_CHECKING:
    from torch import nn


class Bottleneck(Method):
    """Adapters around the sublayers of transformer blocks."""

    def find_targets(self, model: nn.Module, roots: Mapping[str, str], settings: Mapping[str, Any]) -> list[str] | None:
        """The sublayers that the placement wraps."""
        from mmtune.methods.tuners.bottleneck_tuner import BottleneckConfig, bottleneck_targets

        placement = settings.get("placement", BottleneckConfig.placement)
        return [path for root in roots.values() for path in bottleneck_targets(model, root, placement)]


BOTTLENECK = Bottleneck(
    "bottleneck",
    "a small network after attention and feed-forward (arXiv 1902.00751), after the latter (2005.00052) or beside it "
    "(2110.04366)",
    "mmtune.methods.tuners.bottleneck_tuner:BottleneckConfig",
    1e-3,
    targets=None,
    components=("vision", "language"),
    any_layer=True,
    selectors={},
    managed=MANAGED | {"target_modules": "the placement names them"},
    setting_types={"bottleneck_size": COUNT, "bottleneck_dropout": DROPOUT},
    other_names={
        **dict.fromkeys(("adapter", "adapters"), "its name here is bottleneck"),
        "houlsby": "it is method: bottleneck with placement: houlsby",
        "pfeiffer": "it is method: bottleneck with placement: pfeiffer",
    },
    mergeable=False,
)
