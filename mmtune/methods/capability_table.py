"""Compatibility of methods with precisions, gradient checkpointing, ZeRO stages and families: rules and measurements.

`tests/methods/measure_capabilities.py` measures the cells of `capabilities.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mmtune.methods.method import DEFAULT_METHOD, Method
from mmtune.methods.method_table import METHODS

CAPABILITIES = Path(__file__).parent / "capabilities.json"
PRECISIONS = ("fp32", "bf16", "int8", "nf4")
ZERO_STAGES = (1, 2, 3)


def incompatibility(
    method: str,
    settings: Mapping[str, Any],
    *,
    precision: str = "fp32",
    checkpointing: bool = False,
    model_type: str | None = None,
    zero_stage: int | None = None,
) -> str | None:
    """Why a combination does not work, with the nearest that does; None when it works.

    Args:
        settings: the method's, by PEFT's names.
        precision: of the base while training.
        checkpointing: gradient checkpointing.
        model_type: of the base's config, once it is known.
        zero_stage: DeepSpeed's, once the launcher is known; None without DeepSpeed.
    """
    entry = METHODS[method]
    if (reason := entry.incompatibility(settings, precision, model_type)) is not None:
        return reason
    measured = entry.measured_as(settings)
    cell = capabilities().get(measured, {}).get(precision, {})
    if cell.get("train", True) is not True:
        return f"{measured} does not train with model.precision: {precision}; {nearest_that_works(measured, 'train')}"
    if checkpointing and cell.get("checkpointing", True) is not True:
        nearest = nearest_that_works(measured, "checkpointing")
        return f"{measured} does not train with train.activation_checkpointing; {nearest}"
    if zero_stage and cell.get(f"zero{zero_stage}", True) is not True:
        nearest = nearest_that_works(measured, f"zero{zero_stage}", precision)
        return f"{measured} does not train with model.precision: {precision} at ZeRO-{zero_stage}; {nearest}"
    return None


def nearest_that_works(measured: str, what: str, precision: str = "fp32") -> str:
    """What to do where a method does not `train`, take `checkpointing`, `merge`, or train at `zero1` to `zero3`.

    Args:
        measured: a method or a variant, as `capabilities` names it.
    """
    cells = capabilities().get(measured, {})
    if what.startswith("zero"):
        lower = [stage for stage in ZERO_STAGES if cells.get(precision, {}).get(f"zero{stage}") is True]
        return f"use ZeRO-{lower[-1]}, or {DEFAULT_METHOD}" if lower else f"launch with DDP, or use {DEFAULT_METHOD}"
    if what == "merge":
        return "mmtune merge --keep-adapter releases it beside its base"
    if what == "checkpointing":
        return f"switch it off, or use {measured_method(measured).alternatives[0]}"
    precisions = [name for name in ("bf16", "fp32") if cells.get(name, {}).get("train") is True]
    return f"use {precisions[0]}, or {DEFAULT_METHOD}" if precisions else f"use {DEFAULT_METHOD}"


def measured_method(measured: str) -> Method:
    """The method of a name in `capabilities`, which may be a variant's."""
    return next(method for name, method in METHODS.items() if measured == name or measured in method.variants)


@cache
def capabilities() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured: by method or variant and precision `train`, `checkpointing`, `merge` and `zero1` to `zero3`, each true
    or the reason why not."""
    measured: dict[str, dict[str, dict[str, Any]]] = json.loads(CAPABILITIES.read_text(encoding="utf-8"))["methods"]
    return measured
