"""Zero-gated prefix, LLaMA-Adapter's method (arXiv 2303.16199), as a tuner of our own: `tuners/gated_prefix_tuner.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmtune.methods.method import MANAGED, Method
from mmtune.methods.setting_types import COUNT
from mmtune.methods.soft_verbalizer import LABELS_SETTING, SOFT_VERBALIZER, label_conflicts

if TYPE_CHECKING:
    from torch import nn


class GatedPrefix(Method):
    """Prompts in the attention of the upper decoder layers."""

    def conflicts(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Labels."""
        yield from label_conflicts(settings)

    def find_targets(self, model: nn.Module, roots: Mapping[str, str], settings: Mapping[str, Any]) -> list[str] | None:
        """The attention modules of the top `adapter_layers` layers."""
        from mmtune.methods.tuners.gated_prefix_tuner import gated_prefix_targets

        return gated_prefix_targets(model, roots["language"], settings.get("adapter_layers"))


GATED_PREFIX = GatedPrefix(
    "gated_prefix",
    "LLaMA-Adapter: learnt prompts in the upper layers behind a gate that starts at zero (arXiv 2303.16199)",
    "mmtune.methods.tuners.gated_prefix_tuner:GatedPrefixConfig",
    1e-2,
    targets=None,
    components=("language",),
    any_layer=True,
    selectors={},
    managed=MANAGED
    | {"target_modules": "adapter_layers counts them from the top", "trainable_token_indices": f"write {SOFT_VERBALIZER}"},
    setting_types={"adapter_len": COUNT},
    extra_settings=LABELS_SETTING,
    other_names=dict.fromkeys(("llama_adapter", "llama-adapter"), "its name here is gated_prefix"),
    mergeable=False,
)
