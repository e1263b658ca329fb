"""The built-in model's architecture."""

from __future__ import annotations

from transformers import AutoConfig

from mmtune.builtin import TINY_LLAVA
from mmtune.builtin.tiny_checkpoint import build_untrained
from mmtune.models.checkpoints.config_keys import without_keys

ADDED = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Keys of a config that saving and loading add."""


def test_the_untrained_model_has_the_architecture_of_the_shipped_one() -> None:
    model, _ = build_untrained(seed=0)
    shipped = AutoConfig.from_pretrained(str(TINY_LLAVA))
    assert without_keys(model.config.to_dict(), ADDED) == without_keys(shipped.to_dict(), ADDED)
