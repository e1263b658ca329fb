"""FSDP2: how a model is sharded."""

from __future__ import annotations

from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from mmtune.utils.transformers_private import layer_class_names


def configure_fsdp(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """Have FSDP2 shard a model by its layers, in the dtypes that it is stored in."""
    plugin = accelerator.state.fsdp_plugin
    # The class names of a family include classes that this model lacks, which accelerate refuses.
    classes = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(classes & layer_class_names(model))
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
