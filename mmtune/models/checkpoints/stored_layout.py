"""The layout of stacked experts in the files of a checkpoint, and in what is saved from its model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose
from transformers.utils import CONFIG_NAME, cached_file

from mmtune.distributed.deepspeed_private import full_shape
from mmtune.models.checkpoints.checkpoint_files import safetensors_files
from mmtune.utils.transformers_private import set_weight_conversions, weight_conversions


def keep_stored_layout(model: PreTrainedModel, source: str) -> None:
    """Have a loaded model saved with its experts as the files of its checkpoint store them.

    The hub's files of Qwen3-VL-MoE have (experts, in, out), and the class has (experts, out, in). transformers reads both and
    writes the class's, which vLLM and llama.cpp do not expect.

    Args:
        source: the directory or hub id that the model was loaded from.
    """
    conversions: list[Any] = list(weight_conversions(model) or ())
    optional = [number for number, conversion in enumerate(conversions) if _transposes_by_shape(conversion)]
    if not optional:
        return
    stored: dict[str, tuple[int, ...]] = {}
    for file in safetensors_files(Path(cached_file(source, CONFIG_NAME)).parent):
        with safe_open(file, framework="pt") as opened:
            stored |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys() if "experts" in key}  # noqa: SIM118
    own = {name: tuple(full_shape(parameter)) for name, parameter in model.named_parameters() if "experts" in name}
    for number in optional:
        (ending,) = conversions[number].source_patterns
        shapes = [next((shape for name, shape in shapes.items() if name.endswith(ending)), None) for shapes in (stored, own)]
        if None not in shapes and shapes[0] != shapes[1]:
            conversions[number] = copy.copy(conversions[number])
            conversions[number].operations = [Transpose(1, 2)]
    set_weight_conversions(model, conversions)


def _transposes_by_shape(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, Transpose) and operation.check_dims for operation in operations)
