"""What the libraries underneath may say on the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

TORCHVISION = "requires torchvision (not installed); falling back to"
"""transformers says this once for every image processor class; a run's `environment.json` records the backend instead."""


def _not_the_backend(record: logging.LogRecord) -> bool:
    return TORCHVISION not in record.getMessage()


def settle_console() -> None:
    """No progress bars where there is no terminal, and no notes about the libraries' use of each other."""
    from transformers.utils import logging as transformers_logging

    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_not_the_backend)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
