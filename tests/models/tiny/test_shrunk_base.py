"""Shrunk configs of rehearsals, for every family."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from mmtune.models.tiny.shrunk_base import shrunk_config
from mmtune.models.tiny.tiny_bases import BASES


@pytest.mark.parametrize("model_type", [name for name in BASES if name in CONFIG_MAPPING])
def test_a_shrunk_config_gives_a_small_model(model_type: str) -> None:
    config = shrunk_config(CONFIG_MAPPING[model_type]())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 30_000_000
