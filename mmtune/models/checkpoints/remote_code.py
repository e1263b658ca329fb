"""Code that a checkpoint brings along, as Python files or in a pickle: who may run it, and how it is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.serialization import pickle as torch_pickle
from transformers.processing_utils import PROCESSOR_NAME
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object

CODE_NOT_ALLOWED = (
    "it brings Python code of its own, which nobody has allowed to run: read it, then give --trust-remote-code to a command that "
    "loads a run or a model, or set model.trust_remote_code: true in a recipe that you train"
)
FILES_WITH_CODE = (CONFIG_NAME, PROCESSOR_NAME, FEATURE_EXTRACTOR_NAME, TOKENIZER_CONFIG_FILE)
"""Where `auto_map` names classes of such code."""


def has_remote_code(folder: Path) -> bool:
    """Whether the files of a checkpoint name classes of its own code."""
    return any("auto_map" in _read(folder / name) for name in FILES_WITH_CODE if (folder / name).is_file())


def _read(file: Path) -> dict[str, object]:
    try:
        return read_json_object(file)
    except UserError:  # loading the file reports what is wrong with it
        return {}


def first_line(error: BaseException) -> str:
    """What an error of transformers says, in one line; `CODE_NOT_ALLOWED` where it asks for `trust_remote_code`."""
    text = str(error).strip()
    if "trust_remote_code=True" in text:
        return CODE_NOT_ALLOWED
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def reject_unsafe_pickles(subject: str) -> Iterator[None]:
    """Inside, torch reads files that may be pickles, such as a `.bin` of weights or an `optimizer.pt`, and of them tensors alone.

    Args:
        subject: what is read, for the message.

    Raises:
        UserError: such a file is damaged, or would have run code.
    """
    try:
        yield
    except torch_pickle.UnpicklingError as error:
        found = re.search(r"Trying to load unsupported GLOBAL \S+", str(error))
        why = f"it calls {found[0].split()[-1]}" if found else "it is not what torch writes"
        raise UserError(
            f"{subject}: a file that is a pickle is refused, because it holds more than tensors and numbers or is damaged: {why}"
        ) from error
