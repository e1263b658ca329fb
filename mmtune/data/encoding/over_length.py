"""Over-length policies: drop a sample that is too long, or fit it with fewer or smaller images. Text is never truncated.

A resized image has `size`, (width, height), in its block: the encoder resizes the image before the processor, and counting uses
that size instead of the header's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import ProcessorMixin

from mmtune.data.encoding.encode import Supervise, over_length_error
from mmtune.data.encoding.token_counts import Counts, Size, count_tokens, image_replacements, image_sizes, sample_replacements
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.validation.issues import issue_type_of

Policy = Literal["error", "drop_sample", "drop_media", "shrink_media"]
ImagePosition = tuple[int, int]
"""Index of the message of an image, and of its block in that message."""

SMALLEST_EDGE = 32
"""Minimum length in pixels of the shorter edge of a resized image."""
STEPS = 20
"""Steps of the bisection over the image area: the result is within a millionth of the range."""
AREA_RATIO = 0.75
"""Ratio between successive areas of the linear search, which is used if bisection cannot start."""


@dataclass(frozen=True)
class FittedSample:
    """A sample within the limit, and the changes made to its images.

    Attributes:
        sample: the sample to encode.
        counts: its token counts.
        dropped: number of dropped images (pixels and placeholder).
        resized: number of resized images.
    """

    sample: Sample
    counts: Counts
    dropped: int = 0
    resized: int = 0


def fit_to_budget(
    sample: Sample, processor: ProcessorMixin, max_tokens: int | None, policy: Policy, supervise: Supervise = "all"
) -> FittedSample:
    """A sample within `max_tokens`, by the recipe's `data.over_length`.

    Args:
        sample: the conversation.
        processor: the model's processor.
        max_tokens: the longest sample, in tokens with its images; None is no limit.
        policy: `error` and `drop_sample` refuse a longer sample, `drop_image` takes whole images out of it, `shrink_media` makes
            its images smaller.
        supervise: as the recipe's `data.supervise`.

    Raises:
        RowError: as `count_tokens`; `OverLength` when it is too long and nothing that the policy allows makes it fit.
    """
    counts = count_tokens(sample, processor, supervise)
    if max_tokens is None or counts.tokens <= max_tokens:
        return FittedSample(sample, counts)
    if policy == "drop_media":
        return _drop_images(sample, processor, max_tokens, counts, supervise)
    if policy == "shrink_media":
        return _fit_by_resizing(sample, processor, max_tokens, counts, supervise)
    raise over_length_error(sample.id, counts.tokens, max_tokens)


# ---- fewer images


def drop_image(messages: list[Message], position: ImagePosition) -> list[Message]:
    """The messages without one image (pixels and placeholder). Text before and after it stays separated, by a line break."""
    number, index = position
    content = list(messages[number]["content"])
    del content[index]
    if 0 < index < len(content) and content[index - 1]["type"] == content[index]["type"] == "text":
        before, after = content[index - 1]["text"], content[index]["text"]
        separator = "" if before[-1:].isspace() or after[:1].isspace() else "\n"
        if "native" in content[index - 1] or "native" in content[index]:
            content.insert(index, {"type": "text", "text": separator})
        else:
            content[index - 1 : index + 1] = [{"type": "text", "text": f"{before}{separator}{after}"}]
    return [*messages[:number], {**messages[number], "content": content}, *messages[number + 1 :]]


def _drop_images(
    sample: Sample, processor: ProcessorMixin, max_tokens: int, counts: Counts, supervise: Supervise
) -> FittedSample:
    """Drop images, the largest first, so that as few as possible are dropped.

    Of equal ones, those of earlier turns are dropped first, and within a turn the last. An image that is the only content of
    its turn is not dropped.
    """
    fitted = FittedSample(sample, counts)
    while fitted.counts.tokens > max_tokens:
        position = _next_image_to_drop(fitted.sample, processor)
        if position is None:
            tried = f", and {fitted.counts.tokens} without the images that could be dropped" * bool(fitted.dropped)
            raise over_length_error(sample.id, counts.tokens, max_tokens, tried)
        fewer = replace(fitted.sample, messages=drop_image(fitted.sample.messages, position))
        fitted = FittedSample(fewer, count_tokens(fewer, processor, supervise), fitted.dropped + 1)
    return fitted


def _next_image_to_drop(sample: Sample, processor: ProcessorMixin) -> ImagePosition | None:
    positions = _image_positions(sample.messages)
    lengths = [_count_text_tokens(processor, text) for text in sample_replacements(sample, processor)]
    droppable = [i for i, (number, _) in enumerate(positions) if _has_other_content(sample.messages[number])]
    if not droppable:
        return None
    return positions[min(droppable, key=lambda i: (-lengths[i], positions[i][0], -positions[i][1]))]


def _image_positions(messages: list[Message]) -> list[ImagePosition]:
    blocks = [(number, index) for number, message in enumerate(messages) for index in range(len(message["content"]))]
    return [(number, index) for number, index in blocks if messages[number]["content"][index]["type"] == "image"]


def _has_other_content(message: Message) -> bool:
    """Whether a message has content besides one image."""
    images = sum(block["type"] == "image" for block in message["content"])
    return images > 1 or any(block["type"] == "text" and block["text"].strip() for block in message["content"])


def _count_text_tokens(processor: Any, text: str) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- smaller images


def _fit_by_resizing(
    sample: Sample, processor: ProcessorMixin, max_tokens: int, counts: Counts, supervise: Supervise
) -> FittedSample:
    budget = counts.media_tokens - (counts.tokens - max_tokens)
    sizes = _sample_image_sizes(sample)
    while True:
        new_sizes = resize_images(sizes, processor, budget)
        if new_sizes is None:
            raise over_length_error(sample.id, counts.tokens, max_tokens, ", and resizing its images does not make it fit")
        fitted = replace(sample, messages=set_image_sizes(sample.messages, new_sizes))
        fitted_counts = count_tokens(fitted, processor, supervise)
        if fitted_counts.tokens <= max_tokens:
            resized = sum(old != new for old, new in zip(sizes, new_sizes, strict=True))
            return FittedSample(fitted, fitted_counts, resized=resized)
        budget -= fitted_counts.tokens - max_tokens  # tokens at an image's edge can merge with the text around it


def _sample_image_sizes(sample: Sample) -> list[Size]:
    try:
        return image_sizes(sample.messages)
    except ValueError as error:
        raise RowError(sample.id, "image", str(error), issue_type_of(error, "image_refused")) from error


def set_image_sizes(messages: list[Message], sizes: list[Size]) -> list[Message]:
    """The messages with `size` set in every image block, in order."""
    remaining: Iterator[Size] = iter(sizes)
    resized = []
    for message in messages:
        content = [{**block, "size": next(remaining)} if block["type"] == "image" else block for block in message["content"]]
        resized.append({**message, "content": content})
    return resized


def resize_images(sizes: list[Size], processor: ProcessorMixin, budget: int) -> list[Size] | None:
    """Sizes for a sample's images with which they have at most `budget` tokens.

    All images larger than some area are resized to it, with their aspect ratios; smaller ones keep their size. The largest such
    area is found by bisection. If fewer pixels do not always mean fewer tokens, as with tiles, a linear search follows.

    Args:
        sizes: (width, height) of the images.
        processor: the model's processor.
        budget: tokens for all images together.

    Returns:
        A size for every image; None if no size is small enough, as in families with a fixed number of tokens per image.
    """
    lengths: dict[str, int] = {}

    def fits(area: float) -> bool:
        try:
            texts = image_replacements(processor, [_limit_area(size, area) for size in sizes])
        except ValueError:  # the processor rejects the rounded size
            return False
        for text in texts:
            if text not in lengths:
                lengths[text] = _count_text_tokens(processor, text)
        return sum(lengths[text] for text in texts) <= budget

    largest = float(max((width * height for width, height in sizes), default=0))
    smallest = float(SMALLEST_EDGE**2)
    if not sizes or budget < 1:
        return None
    if fits(largest):
        return list(sizes)
    good, too_large = smallest, largest
    if not fits(smallest):
        if largest <= smallest:
            return None
        steps = max(1, math.ceil(math.log(smallest / largest, AREA_RATIO)))
        areas = (largest * AREA_RATIO**step for step in range(1, steps))
        area = next((area for area in areas if fits(area)), None)
        if area is None:
            return None
        good, too_large = area, min(area / AREA_RATIO, largest)
    for _ in range(STEPS):
        middle = (good + too_large) / 2
        good, too_large = (middle, too_large) if fits(middle) else (good, middle)
    return [_limit_area(size, good) for size in sizes]


def _limit_area(size: Size, area: float) -> Size:
    """The size reduced to an area, with a shorter edge of at least `SMALLEST_EDGE` pixels (or its present length)."""
    width, height = size
    scale = max(math.sqrt(area / (width * height)), SMALLEST_EDGE / min(width, height))
    if scale >= 1:
        return size
    return max(1, round(width * scale)), max(1, round(height * scale))
