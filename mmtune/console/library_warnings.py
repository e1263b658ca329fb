"""Warnings of the libraries: known ones are left out, each with a reason; any other is one line, printed once per run."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class KnownWarning:
    """A warning that is irrelevant for the user of a run.

    Attributes:
        module: the logger, or the module that warns.
        kind: the level of a log record, or the category of a Python warning.
        text: a part of the message, as the library writes it.
        reason: why it is left out.
    """

    module: str
    kind: str
    text: str
    reason: str


KNOWN = (
    KnownWarning(
        "transformers",
        "WARNING",
        "requires torchvision (not installed); falling back to",
        "repeated for every image processor class; environment.json of a run records the backend",
    ),
    KnownWarning(
        "transformers.modeling_utils",
        "FutureWarning",
        "`is_gradient_checkpointing` is deprecated",
        "PEFT reads it, and both names have the same value",
    ),
    KnownWarning(
        "bitsandbytes.backends.cpu.ops",
        "WARNING",
        "Failed to load CPU gemm_4bit_forward",
        "printed whenever PEFT imports it, in fp32 too; its own code runs instead of the kernel",
    ),
    KnownWarning(
        "accelerate.accelerator",
        "WARNING",
        "Gradient accumulation steps mismatch",
        "accelerate's count is always 1: the Trainer accumulates by itself",
    ),
    KnownWarning(
        "transformers",
        "WARNING",
        "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.",
        "intended: training steps do not use a cache",
    ),
    KnownWarning(
        "peft.peft_model",
        "UserWarning",
        "Position ids are not supported for parameter efficient tuning. Ignoring position ids.",
        "answers of prompt methods: the model counts positions from its attention mask, virtual tokens included",
    ),
    KnownWarning(
        "peft.tuners",
        "UserWarning",
        "Sparse invariant checks are implicitly disabled",
        "the indices of a sparse update are those that PEFT chose when it made the adapter",
    ),
    KnownWarning(
        "bitsandbytes.optim.optimizer",
        "UserWarning",
        "Paged optimizers are not supported on CPU. Falling back to non-paged optimizer behavior.",
        "paging moves memory between a GPU and the host; without a GPU there is nothing to move",
    ),
    KnownWarning(
        "bitsandbytes.autograd._functions",
        "WARNING",
        "MatMul8bitLt: inputs will be cast from",
        "the normal way to multiply int8 weights; a merge measures the effect on the logits",
    ),
    KnownWarning(
        "PIL.Image",
        "DecompressionBombWarning",
        "could be decompression bomb DOS attack",
        "an image with too many pixels is an error of its row",
    ),
    KnownWarning(
        "PIL.TiffImagePlugin",
        "UserWarning",
        "Corrupt EXIF data",
        "the pixels are read all the same; `data check` names the row where the damage may hide the orientation",
    ),
    KnownWarning(
        "PIL.TiffImagePlugin",
        "UserWarning",
        "Truncated File Read",
        "as above: a tag of the EXIF data ends early; truncated pixels are an error of their row",
    ),
    KnownWarning(
        "torch.distributed.c10d_logger",
        "FutureWarning",
        "`torch.distributed.all_gather_into_tensor` is deprecated",
        "accelerate and DeepSpeed call it by that name",
    ),
    KnownWarning(
        "torch.distributed.c10d_logger",
        "FutureWarning",
        "`torch.distributed.reduce_scatter_tensor` is deprecated",
        "DeepSpeed calls it by that name",
    ),
    KnownWarning("DeepSpeed", "WARNING", "Setting accelerator to CPU", "the run's first line names its device"),
)
"""All warnings that are left out."""


class WarningPrinter(logging.Handler):
    """Prints log records and Python warnings of libraries in one line each.

    A warning is printed once in this process and all processes forked from it, such as data-loader workers. Texts that
    differ only in numbers are the same warning. An error is printed every time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._printed = os.memfd_create("printed-warnings")  # digests of printed lines, in memory shared with forked processes

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record."""
        if record.levelno < logging.WARNING and not _is_in(record.name, "transformers"):
            return  # train.log_level is the only level that a recipe sets; it is for transformers
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # the library gave arguments that do not match the message
            text = f"{record.msg} {record.args}"
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        self._print(record.name, record.levelname, text, is_warning=record.levelno == logging.WARNING)

    def show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Print a Python warning. Replaces `warnings.showwarning`."""
        self.acquire()
        try:
            self._print(_module_of(filename), category.__name__, str(message), is_warning=True)
        finally:
            self.release()

    def _print(self, module: str, kind: str, text: str, is_warning: bool) -> None:
        if any(each.kind == kind and _is_in(module, each.module) and each.text in text for each in KNOWN):
            return
        library = module.partition(".")[0]
        line = f"{'warning' if is_warning else kind.lower()}: {library}: {' '.join(text.split())}"
        if not is_warning or self._is_new(re.sub(r"\d+", "0", line)):
            print(line, file=sys.stderr, flush=True)

    def _is_new(self, line: str) -> bool:
        digest = hashlib.sha256(line.encode(errors="replace")).digest()
        fcntl.lockf(self._printed, fcntl.LOCK_EX)
        try:
            end = os.fstat(self._printed).st_size
            printed = os.pread(self._printed, end, 0)
            if any(printed[at : at + len(digest)] == digest for at in range(0, end, len(digest))):
                return False
            os.pwrite(self._printed, digest, end)
            return True
        finally:
            fcntl.lockf(self._printed, fcntl.LOCK_UN)


def print_warnings_once() -> None:
    """Print logs and warnings of all libraries through one `WarningPrinter` instead of their own handlers."""
    if any(isinstance(handler, WarningPrinter) for handler in logging.root.handlers):
        return
    printer = WarningPrinter()
    logging.root.addHandler(printer)
    warnings.showwarning = printer.show
    make_record = logging.getLogRecordFactory()

    def record(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        _remove_own_handlers(name)  # at each record, because libraries add handlers when they are imported
        return make_record(name, *args, **kwargs)

    logging.setLogRecordFactory(record)


def _remove_own_handlers(name: str) -> None:
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger is not logging.root:
        for handler in [each for each in logger.handlers if type(each) is logging.StreamHandler]:  # not its subclass FileHandler
            logger.removeHandler(handler)
            logger.propagate = True
        logger = logger.parent


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _module_of(filename: str) -> str:
    """The dotted module name of a file, relative to its entry of `sys.path`."""
    roots = [root for root in sys.path if root and Path(filename).is_relative_to(root)]
    path = Path(filename).relative_to(max(roots, key=len)) if roots else Path(Path(filename).name)
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")
