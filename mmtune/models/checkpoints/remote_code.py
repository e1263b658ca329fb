"""Executable code in checkpoints: Python files for `trust_remote_code`, and pickle files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.serialization import pickle as torch_pickle
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.processing_utils import PROCESSOR_NAME
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object

CODE_NOT_ALLOWED = (
    "it contains Python code, which is not executed without permission: read the code, then add --trust-remote-code to a command "
    "that loads a run or a model, or set model.trust_remote_code: true in a recipe for training"
)
FILES_WITH_CODE = (CONFIG_NAME, PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, TOKENIZER_CONFIG_FILE)
"""Files whose `auto_map` may name classes of such code."""


_OLDER_CLASSES = {each.__name__: each for each in (AutoModelForCausalLM, AutoModel)}


def auto_class(config: PreTrainedConfig) -> Any:
    """`AutoModelForImageTextToText`, or the class under which a checkpoint with code of its own names its model.

    Such code is often older than the image-text mapping and names a class for causal language models.
    """
    names = getattr(config, "auto_map", None) or {}
    if AutoModelForImageTextToText.__name__ in names:
        return AutoModelForImageTextToText
    return next((kind for name, kind in _OLDER_CLASSES.items() if name in names), AutoModelForImageTextToText)


def has_remote_code(folder: Path) -> bool:
    """Whether a file of the checkpoint names a class of its own code in `auto_map`."""
    return any("auto_map" in _read(folder / name) for name in FILES_WITH_CODE if (folder / name).is_file())


def _read(file: Path) -> dict[str, object]:
    try:
        return read_json_object(file)
    except UserError:  # an invalid file is reported when it is loaded
        return {}


def first_line(error: BaseException) -> str:
    """The first line of a transformers error; `CODE_NOT_ALLOWED` if the error asks for `trust_remote_code`."""
    text = str(error).strip()
    if "trust_remote_code=True" in text:
        return CODE_NOT_ALLOWED
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def reject_unsafe_pickles(subject: str) -> Iterator[None]:
    """Report a pickle file that torch rejected as a user error, for code that loads `.bin` weights or an `optimizer.pt`.

    torch loads only tensors and numbers from such files.

    Args:
        subject: what is loaded, for the message.

    Raises:
        UserError: the file is damaged, or loading it would execute code.
    """
    try:
        yield
    except torch_pickle.UnpicklingError as error:
        match = re.search(r"Trying to load unsupported GLOBAL \S+", str(error))
        reason = f"it calls {match[0].split()[-1]}" if match else "its content is not valid"
        raise UserError(
            f"{subject}: expected a pickle file with tensors and numbers only, got other objects or a damaged file: {reason}"
        ) from error
