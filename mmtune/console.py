"""What the libraries underneath may say on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from mmtune.threads import prepare_threads
from mmtune.torchvision_support import prepare_torchvision

NO_NEWS = {
    # once for every image processor class; a run's `environment.json` records the backend instead
    "transformers": "requires torchvision (not installed); falling back to",
    # whenever PEFT imports it, in fp32 as well; its own code runs in place of the kernel
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # accelerate's own count is always 1: the Trainer accumulates by itself
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # the run's first line says which device it is
    "DeepSpeed": "Setting accelerator to CPU",
}
"""What libraries say by the name of their logger, of no use to who reads it."""


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in NO_NEWS.values())


def speaker() -> str:
    """What an error begins with in a process that is not the first of several, such as `[rank 1] `."""
    rank = int(os.environ.get("RANK", "0"))  # as launchers say it; known before torch is imported
    return f"[rank {rank}] " if rank else ""


def shows_progress() -> bool:
    """Whether somebody watches this process: it is the first, and at a terminal."""
    return sys.stderr.isatty() and not speaker()


def settle_console() -> None:
    """No progress bars where there is no terminal, and no notes about the libraries' use of each other.

    Of several processes the first speaks; of the others only errors are heard. torchvision is prepared here as well, because
    every command calls this before it imports transformers.
    """
    prepare_threads()  # before torch is imported
    prepare_torchvision()
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    # What is loaded without trust_remote_code, by PEFT for one, is refused its own code, where transformers would ask for an
    # answer on standard input and take one from a pipe.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

    if speaker():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (open as long as the process lives)
        transformers_logging.set_verbosity_error()
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")

    for name in NO_NEWS:
        for speaks in (logger := logging.getLogger(name), *logger.handlers):  # a logger's filter does not hold for its children
            speaks.addFilter(_is_news)
    if not shows_progress():
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
