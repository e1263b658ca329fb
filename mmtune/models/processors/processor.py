"""A checkpoint's processor, loaded; a missing optional library is named with what to install."""

from __future__ import annotations

from transformers import AutoProcessor, ProcessorMixin

from mmtune.utils.errors import RecipeValueError, missing_library
from mmtune.utils.torchvision_support import prepare_torchvision

VISION_EXTRA = "pip install 'mmtune[vision]' installs torchvision and num2words"


def read_processor(name: str, trust_remote_code: bool) -> ProcessorMixin:
    """
    Args:
        name: a directory or hub id.

    Raises:
        UserError: the processor needs a library that is missing.
        OSError, ValueError: what transformers raises for files that are missing or wrong.
    """
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if (reason := missing_library(error)) is None:
            raise
        torchvision = prepare_torchvision()
        found = "" if torchvision.usable else f"; torchvision is {torchvision.detail}"
        raise RecipeValueError(
            "model", f"the processor of {name} needs a library that is missing{found}; {VISION_EXTRA} ({reason})"
        ) from error
    return processor
