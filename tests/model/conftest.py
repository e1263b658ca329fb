"""Tiny parts that every test of models builds on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmtune.model.assemble import assemble
from mmtune.model.tiny import LANGUAGE_FAMILIES, VISION_FAMILIES, tiny_language, tiny_vision


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny part, written once."""
    root = tmp_path_factory.mktemp("shelf")
    for seed, family in enumerate(VISION_FAMILIES):
        tiny_vision(family, root / family, seed)
    for seed, family in enumerate(LANGUAGE_FAMILIES):
        tiny_language(family, root / family, seed)
    return root


@pytest.fixture(scope="session")
def llava(shelf: Path) -> tuple[Any, Any]:
    return assemble(str(shelf / "clip"), str(shelf / "llama"))
