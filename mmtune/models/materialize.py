"""Materialization of a base: saving an assembled base for its adapter, quantization, device placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmtune.chat_templates.resolving import use_chat_template
from mmtune.distributed.context import DistributedContext
from mmtune.distributed.sharded_parameters import full_state_dict
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK, resolve_base
from mmtune.models.load import ResolvedBase, load_weights
from mmtune.models.quantize import QUANTIZED


def materialize_base(
    model: Any, processor: Any, base: ResolvedBase, out: Path | None, dist: DistributedContext, device: torch.device
) -> Any:
    """Save an assembled base, quantize it if the recipe says so, and move the base to its device.

    An adapter names the directory or hub id of its base, so a base that was built in memory is saved.

    Args:
        model: the base, from `load_base`.
        processor: its processor.
        base: where the base is, and the recipe's `model` section.
        out: the directory for a base that was built in memory; None if the run saves a full model, which needs no base.
        dist: the distributed context.
        device: the device of this process.

    Returns:
        The model; reloaded from `out` with quantization if it was assembled for int8 or nf4.
    """
    section = base.section
    if base.location is not None:
        model.name_or_path = resolve_base(str(section.base))
    elif out is not None:
        exists = (out / CHECKPOINT_MARK).exists()
        dist.barrier()  # all ranks have checked before the main process writes
        if not exists:
            with full_state_dict(model, dist.is_main_process) as state:
                if dist.is_main_process:
                    save_checkpoint(model, processor, out, state_dict=state)
            dist.barrier()
        if section.precision in QUANTIZED:
            model = load_weights(str(out), section)
            use_chat_template(model, processor, processor.chat_template)
        model.name_or_path = str(out.resolve())
    return model if section.precision in QUANTIZED else model.to(device)  # bitsandbytes has placed quantized weights
