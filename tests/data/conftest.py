"""Pictures on disk, and a processor for each way of talking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtune.model.assemble import assemble
from mmtune.model.tiny import tiny_language, tiny_vision

SPEAKS = {"vicuna_v1": "llama", "chatml": "qwen2", "llama3": "llama3", "mistral": "mistral", "gemma": "gemma", "plain": "llama"}


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A media root with the two pictures `a.png` and `b.png`, beside a file that lies outside it."""
    root = tmp_path / "media"
    root.mkdir()
    Image.new("RGB", (40, 24), "teal").save(root / "a.png")
    Image.new("RGB", (24, 40), "red").save(root / "b.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "outside.png")
    return root


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory, untrained: tuple[Any, Any]) -> dict[str, Any]:
    """A processor for each shipped chat template; the tokenizers have learnt to join runs of white space, as real ones do."""
    root = tmp_path_factory.mktemp("speakers")
    tiny_vision("clip", root / "clip")
    made = {"tiny": untrained[1]}
    for name, family in SPEAKS.items():
        if not (root / family).exists():
            tiny_language(family, root / family, texts=["\n\n\n    the cat is on the mat\n\n yes no"] * 20, vocab_size=320)
        made[name] = assemble(str(root / "clip"), str(root / family), chat_template=name)[1]
    return made
