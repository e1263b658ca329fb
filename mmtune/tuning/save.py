"""Saving a tuned model as a directory that PEFT or transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mmtune.distributed.sharded_parameters import full_state_dict
from mmtune.methods.method_table import method_of


def initial_factors(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor] | None:
    """The adapter's tensors before training, where its initialization changed the base's weights; None for any other model."""
    method = method_of(model)
    return None if method is None else method.initial_factors(model)


def save_tuned(
    model: PreTrainedModel | PeftModel, out: Path, initial: dict[str, torch.Tensor] | None, is_main_process: bool = True
) -> None:
    """Write an adapter, or a whole model; all processes call it, and the main process writes.

    Args:
        out: the directory.
        initial: from `initial_factors`; where it is not None, the adapter is written so that it applies to the original base.
    """
    with full_state_dict(model, is_main_process) as state:
        if is_main_process:
            model.save_pretrained(out, state_dict=state)
    method = method_of(model)
    if is_main_process and initial is not None and method is not None:
        method.restore_base(out, initial)
