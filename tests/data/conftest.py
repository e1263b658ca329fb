"""Pictures on disk, and a processor for each way of talking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from mmtune.model.assemble import assemble
from mmtune.model.tiny import tiny_language, tiny_vision

SPEAKS = {"vicuna_v1": "llama", "chatml": "qwen2", "llama3": "llama3", "mistral": "mistral", "gemma": "gemma", "plain": "llama"}

# Qwen2's; Llama 3's differs in its numbers. Line breaks stay together, also at the end of a prompt.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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
            if family in ("qwen2", "llama3"):
                _split_as_published(root / family)
        made[name] = assemble(str(root / "clip"), str(root / family), chat_template=name)[1]
    return made


def _split_as_published(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.save_pretrained(path)
