"""What an image processor resizes an image to, bounded before a pixel is decoded.

A processor that resizes by the shorter edge keeps the aspect ratio: an image of 5,000,000 x 1 pixels, a file of a few hundred
bytes, becomes one of 160,000,000 x 32. Processors that cut tiles, bound the longer edge or bound the pixels need no check.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import ProcessorMixin

from mmtune.data.validation.issues import DataIssueError
from mmtune.utils.transformers_private import processor_call_kwargs

MAX_RESIZED = 2**24
"""Largest image that a processor makes of another, in pixels: at a shorter edge of 336, an aspect ratio of 148."""


def image_kwargs(processor: Any) -> dict[str, Any]:
    """What the image processor will be called with: its own settings, and over them what the processor sets for its class."""
    own = processor.image_processor
    settings = {name: getattr(own, name, None) for name in own.valid_kwargs.__annotations__}
    return settings | processor_call_kwargs(processor)["images_kwargs"]


def check_resized(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse images that the processor would make too large.

    Args:
        processor: the model's processor. Its settings are read when it is first met.
        sizes: (width, height) of the images, upright.

    Raises:
        DataIssueError: naming the size that an image has and the one that it would have.
    """
    shorter = _shorter_edge(processor)
    for width, height in sizes:
        if shorter is not None and shorter**2 * max(width, height) > MAX_RESIZED * min(width, height):
            longer = round(shorter * max(width, height) / min(width, height))
            detail = (
                f"an image of {width} x {height} pixels becomes one of {longer} x {shorter} when its shorter edge is "
                f"resized to {shorter}, and at most {MAX_RESIZED} pixels are processed; crop it, or pad its shorter edge"
            )
            raise DataIssueError("image_refused", detail)


@lru_cache(maxsize=8)
def _shorter_edge(processor: ProcessorMixin) -> int | None:
    """The length that the processor gives an image's shorter edge, whatever becomes of the longer one; None if it does not."""
    settings = image_kwargs(processor)
    size = settings.get("size") or {}
    if not settings.get("do_resize") or settings.get("image_grid_pinpoints") or size.get("longest_edge"):
        return None
    edge = size.get("shortest_edge")
    return None if edge is None else int(edge)
