"""The class of transformers through which a model is loaded and built."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

_OTHERS = {each.__name__: each for each in (AutoModelForCausalLM, AutoModel)}


def auto_class(config: PreTrainedConfig) -> Any:
    """`AutoModelForImageTextToText`, or the class under which a checkpoint with code of its own names its model.

    Such code is often older than the image-text mapping and names a class for causal language models.
    """
    names = getattr(config, "auto_map", None) or {}
    if AutoModelForImageTextToText.__name__ in names:
        return AutoModelForImageTextToText
    return next((kind for name, kind in _OTHERS.items() if name in names), AutoModelForImageTextToText)
