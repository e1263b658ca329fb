"""Python code that a checkpoint brings along: who may run it, and how it is refused."""

from __future__ import annotations

import json
from pathlib import Path

from transformers.processing_utils import PROCESSOR_NAME
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

NOT_ALLOWED = (
    "it brings Python code of its own, which nobody has allowed to run: read it, then give --trust-remote-code to a command that "
    "loads a run or a model, or set model.trust_remote_code: true in a recipe that you train"
)
FILES_WITH_CODE = (CONFIG_NAME, PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, TOKENIZER_CONFIG_FILE)
"""Where `auto_map` names classes of such code."""


def brings_code(folder: Path) -> bool:
    """Whether the files of a checkpoint name classes of its own code."""
    return any("auto_map" in _read(folder / name) for name in FILES_WITH_CODE if (folder / name).is_file())


def _read(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # who loads the file says what is wrong with it
        return {}
    return content if isinstance(content, dict) else {}


def first_line(error: BaseException) -> str:
    """What an error of transformers says, in one line; `NOT_ALLOWED` where it asks for `trust_remote_code`."""
    text = str(error).strip()
    if "trust_remote_code=True" in text:
        return NOT_ALLOWED
    return text.splitlines()[0] if text else type(error).__name__
