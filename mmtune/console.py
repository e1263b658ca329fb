"""What the libraries underneath may say on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

TORCHVISION = "requires torchvision (not installed); falling back to"
"""transformers says this once for every image processor class; a run's `environment.json` records the backend instead."""


def _not_the_backend(record: logging.LogRecord) -> bool:
    return TORCHVISION not in record.getMessage()


def speaker() -> str:
    """What an error begins with in a process that is not the first of several, such as `[rank 1] `."""
    rank = int(os.environ.get("RANK", "0"))  # as launchers say it; known before torch is imported
    return f"[rank {rank}] " if rank else ""


def shows_progress() -> bool:
    """Whether somebody watches this process: it is the first, and at a terminal."""
    return sys.stderr.isatty() and not speaker()


def settle_console() -> None:
    """No progress bars where there is no terminal, and no notes about the libraries' use of each other.

    Of several processes the first speaks; of the others only errors are heard.
    """
    from transformers.utils import logging as transformers_logging

    if speaker():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (open as long as the process lives)
        transformers_logging.set_verbosity_error()

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_not_the_backend)
    if not shows_progress():
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
