"""Loading of processors; a missing optional library is an error with the package to install."""

from __future__ import annotations

from transformers import AutoProcessor, ProcessorMixin

from mmtune.utils.errors import RecipeValueError, missing_library
from mmtune.utils.torchvision_support import prepare_torchvision

VISION_EXTRA = "pip install 'mmtune[vision]' installs torchvision and num2words"


def read_processor(name: str, trust_remote_code: bool) -> ProcessorMixin:
    """Load the processor of a checkpoint.

    Args:
        name: a directory or hub id.
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: the processor needs a library that is not installed.
        OSError, ValueError: from transformers, for missing or invalid files.
    """
    try:
        processor: ProcessorMixin = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if (reason := missing_library(error)) is None:
            raise
        torchvision = prepare_torchvision()
        detail = "" if torchvision.usable else f"; torchvision is {torchvision.detail}"
        raise RecipeValueError(
            "model", f"the processor of {name} needs a library that is not installed{detail}; {VISION_EXTRA} ({reason})"
        ) from error
    return processor
