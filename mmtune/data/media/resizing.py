"""Limit for the size to which an image processor resizes an image, checked before any pixel is decoded.

A processor that resizes by the shorter edge keeps the aspect ratio: an image of 5,000,000 x 1 pixels, a file of a few hundred
bytes, becomes 160,000,000 x 32. Processors that tile images, or limit the longer edge or the pixels, need no check.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import ProcessorMixin

from mmtune.data.validation.issues import DataIssueError
from mmtune.utils.transformers_private import processor_call_kwargs

MAX_RESIZED = 2**24
"""Maximum number of pixels after resizing: for a shorter edge of 336, an aspect ratio of 148."""


def image_kwargs(processor: Any) -> dict[str, Any]:
    """The arguments of the image processor: its own settings, overridden by the defaults of the processor class."""
    image_processor = processor.image_processor
    settings = {name: getattr(image_processor, name, None) for name in image_processor.valid_kwargs.__annotations__}
    return settings | processor_call_kwargs(processor)["images_kwargs"]


def check_resized(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> None:
    """Check that the processor does not resize images to more than `MAX_RESIZED` pixels.

    Args:
        processor: the model's processor. Its settings are cached at the first call.
        sizes: (width, height) of the upright images.

    Raises:
        DataIssueError: an image would be too large; gives both sizes.
    """
    shorter = _shorter_edge(processor)
    for width, height in sizes:
        if shorter is not None and shorter**2 * max(width, height) > MAX_RESIZED * min(width, height):
            longer = round(shorter * max(width, height) / min(width, height))
            detail = (
                f"expected at most {MAX_RESIZED} pixels after resizing, got {longer} x {shorter} for an image of "
                f"{width} x {height}, whose shorter edge is resized to {shorter}; crop it, or pad its shorter edge"
            )
            raise DataIssueError("image_refused", detail)


@lru_cache(maxsize=8)
def _shorter_edge(processor: ProcessorMixin) -> int | None:
    """The length to which the processor resizes the shorter edge, without limiting the longer one; None for other processors."""
    settings = image_kwargs(processor)
    size = settings.get("size") or {}
    if not settings.get("do_resize") or settings.get("image_grid_pinpoints") or size.get("longest_edge"):
        return None
    edge = size.get("shortest_edge")
    return None if edge is None else int(edge)
