"""Native regions: boxes, points and quadrilaterals of messages in the convention of the processor's family."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from transformers import ProcessorMixin

from mmtune.data.media.resizing import image_kwargs
from mmtune.data.message import Message, RowError, Sample
from mmtune.families.box_convention import BoxConvention, RegionKind, unknown_convention
from mmtune.families.family import Size
from mmtune.families.family_table import family_of_processor
from mmtune.utils.errors import RecipeValueError


def with_native_regions(sample: Sample, processor: ProcessorMixin) -> Sample:
    """The sample whose messages have been written by `write_native_regions`, with the `extent` of its answer. Raises as that."""
    extents = {
        _convention(processor, block["native"].region.kind).extent(_resized_size(sample.id, block, sample.messages, processor))
        for block in sample.messages[-1]["content"]
        if "native" in block
    }
    extent = next(iter(extents)) if len(extents) == 1 else sample.extent
    return replace(sample, messages=write_native_regions(sample.id, sample.messages, processor), extent=extent)


def write_native_regions(sample_id: str, messages: list[Message], processor: ProcessorMixin) -> list[Message]:
    """The messages with their native regions as text. Pixels are those of the image as the processor resizes it.

    Args:
        sample_id: the row's id, for errors.
        messages: with all images that their regions are in; an image may have a `size`, to which it is resized before.
        processor: the model's processor.

    Raises:
        RecipeValueError: the convention of the processor's family is unknown.
        RowError: the processor rejects the size of an image.
    """
    written = []
    for message in messages:
        if not any("native" in block for block in message["content"]):
            written.append(message)
            continue
        content: list[dict[str, Any]] = []
        for is_text, group in groupby(message["content"], key=lambda block: block["type"] == "text"):
            if is_text:
                texts = [_text(sample_id, block, messages, processor) for block in group]
                content.append({"type": "text", "text": "".join(texts)})
            else:
                content += group
        written.append({**message, "content": content})
    return written


def text_extent(processor: ProcessorMixin, kind: RegionKind, size: Size) -> Size | None:
    """The coordinates of an image's lower right corner in texts of the processor's family; None if its convention is unknown.

    Args:
        processor: the model's processor.
        kind: what is written.
        size: (width, height) of the upright image.

    Raises:
        ValueError: an image that the processor rejects.
    """
    convention = _known_convention(processor, kind)
    if convention is None:
        return None
    return convention.extent(family_of_processor(processor).resized_size(image_kwargs(processor), size))


def _text(sample_id: str, block: dict[str, Any], messages: list[Message], processor: ProcessorMixin) -> str:
    if "native" not in block:
        return str(block["text"])
    region, label = block["native"].region, block["native"].label
    size = _resized_size(sample_id, block, messages, processor)
    return _convention(processor, region.kind).write(region.kind, region.shares, size, label)


def _convention(processor: ProcessorMixin, kind: RegionKind) -> BoxConvention:
    convention = _known_convention(processor, kind)
    if convention is None:
        raise RecipeValueError("model", f"{type(processor).__name__}: {unknown_convention(kind)}")
    return convention


@lru_cache(maxsize=8)
def _known_convention(processor: ProcessorMixin, kind: RegionKind) -> BoxConvention | None:
    conventions = family_of_processor(processor).box_conventions
    names = [each.__name__ for each in type(processor).__mro__]
    convention = next((conventions[name] for name in names if name in conventions), None)
    return convention if convention is not None and kind in convention.forms else None


def _resized_size(sample_id: str, block: dict[str, Any], messages: list[Message], processor: ProcessorMixin) -> Size:
    """The size of a region's image after the image processor. The region is of the image before `data.over_length` resizes it."""
    region = block["native"].region
    images = (other for message in messages for other in message["content"] if other["type"] == "image")
    image: dict[str, Any] = next((other for other in images if other["image"] == block["region_image"]), {})
    size = image.get("size", (region.width, region.height))
    try:
        return family_of_processor(processor).resized_size(image_kwargs(processor), size)
    except ValueError as error:
        detail = f"{type(processor).__name__} rejects the image of a {region.kind}: {error}"
        raise RowError(sample_id, "image", detail, "image_refused") from error
