"""Terminal output of the libraries: progress bars, logging levels, warnings."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

from mmtune.console.library_warnings import print_warnings_once
from mmtune.utils.threads import prepare_threads
from mmtune.utils.torchvision_support import prepare_torchvision


def rank_prefix() -> str:
    """The prefix of messages in processes other than the first, such as `[rank 1] `; empty in the first."""
    rank = int(os.environ.get("RANK", "0"))  # set by launchers, known before torch is imported
    return f"[rank {rank}] " if rank else ""


def shows_progress() -> bool:
    """Whether to show progress: in the main process, if standard error is a terminal."""
    return sys.stderr.isatty() and not rank_prefix()


def configure_console() -> None:
    """Configure the output of the libraries: no progress bars without a terminal, and known warnings left out.

    Processes other than the first print errors only. torchvision is prepared here too, because every command calls this before it
    imports transformers.
    """
    print_warnings_once()  # before the imports, which may print warnings
    if rank_prefix():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    prepare_threads()  # before torch is imported
    prepare_torchvision()
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    # Without trust_remote_code, for example in PEFT, a checkpoint's own code is an error; transformers would ask for an answer on
    # standard input and accept one from a pipe.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

    if rank_prefix():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (open as long as the process lives)
        transformers_logging.set_verbosity_error()
    if not shows_progress():
        transformers_logging.disable_progress_bar()
