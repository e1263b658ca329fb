"""Private members of DeepSpeed, and of transformers' integration of it, that mmtune uses: one function for each.

ZeRO-3 marks a parameter whose values are sharded with attributes of its own: `ds_id`, `ds_numel` (its full size), `ds_shape` and
`ds_tensor` (this rank's shard). A test compares each with the installed version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_sharded_parameter(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has sharded a parameter, so that this rank holds a part of it."""
    return hasattr(parameter, "ds_id")


def full_size(parameter: torch.Tensor) -> int:
    """How many numbers a parameter holds over all ranks."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of a parameter over all ranks; a sharded one's own shape is empty."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def shard_to_float32(parameter: nn.Parameter) -> None:
    """Convert this rank's shard of a parameter to fp32; a parameter that is not sharded stays as it is."""
    if is_sharded_parameter(parameter):
        shard: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        shard.data = shard.data.to(torch.float32)


def enable_sharded_construction(config: Mapping[str, Any]) -> Any:
    """Have transformers build models sharded at ZeRO-3, as long as the returned object is alive."""
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(dict(config))


def disable_sharded_construction() -> None:
    """Have transformers build models in full, until the Trainer enables sharded construction again."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def resume_sharded_construction(construction: Any) -> None:
    """Enable sharded construction again, with what `enable_sharded_construction` returned."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config

    set_hf_deepspeed_config(construction)
