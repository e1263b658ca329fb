"""torchvision with any build of torch: it is imported if possible, and otherwise counts as not installed.

transformers imports torchvision if it is installed. If that import fails, it fails with an unrelated name ("Could not
import module 'PreTrainedModel'"). The usual reason is a wheel whose compiled operators belong to another build of torch, such as
the CUDA wheel beside a CPU torch. Image processors use only torchvision's Python part, so declaring the operators is enough.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

OPERATORS = ("nms", "qnms")
"""The compiled operators that torchvision's Python code refers to when it is imported."""
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@dataclass(frozen=True)
class Torchvision:
    """Result of `prepare_torchvision`.

    Attributes:
        usable: whether transformers can import it.
        detail: its version and what does not work, or why it counts as not installed.
        operators: keeps the declared operators alive.
    """

    usable: bool
    detail: str
    operators: Any = None


@functools.cache
def prepare_torchvision() -> Torchvision:
    """Import torchvision. Declare its operators if they do not load, and hide it from transformers if that fails too.

    Call it before transformers is imported, which decides once whether torchvision is installed. Later calls return the first
    result.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Torchvision(False, "not installed")
    try:
        return Torchvision(True, _import_torchvision())
    except (ImportError, OSError, RuntimeError) as error:
        first = _first_line(error)
    if "operator torchvision::" not in first:
        return _hidden(first)
    from torch.library import Library

    operators = Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        operators.define(name + SCHEMA)
    try:
        return Torchvision(True, f"{_import_torchvision()}, compiled operators not loaded ({first})", operators)
    except (ImportError, OSError, RuntimeError) as error:
        return _hidden(_first_line(error))


def _hidden(reason: str) -> Torchvision:
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # find_spec then returns None, as for a missing package
    return Torchvision(False, f"installed, but it cannot be imported: {reason}")


def _import_torchvision() -> str:
    try:
        return str(importlib.import_module("torchvision").__version__)
    except BaseException:
        _forget_torchvision()
        raise


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
