"""The built-in model's architecture."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from mmtune.builtin import TINY_LLAVA
from mmtune.builtin.tiny_checkpoint import build_untrained


def _architecture(config: Any) -> Any:
    """The values of a config without those that saving and loading add."""
    if isinstance(config, dict):
        added = ("_name_or_path", "architectures", "dtype", "transformers_version")
        return {key: _architecture(value) for key, value in config.items() if key not in added}
    return config


def test_the_untrained_model_has_the_architecture_of_the_shipped_one() -> None:
    model, _ = build_untrained(seed=0)
    shipped = AutoConfig.from_pretrained(str(TINY_LLAVA))
    assert _architecture(model.config.to_dict()) == _architecture(shipped.to_dict())
