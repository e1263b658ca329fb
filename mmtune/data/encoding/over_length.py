"""Samples that are too long: dropped, or made to fit with fewer or smaller images. Text is never cut.

A smaller image is written into its block as `size`, (width, height): the encoder resizes the picture to that before the processor
sees it, and counting takes that size for the header's.
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
"""Of an image: the number of its message, and of its block in there."""

SMALLEST_EDGE = 32
"""No image is made smaller than this many pixels along its shorter edge."""
STEPS = 20
"""Halvings of the range of image areas: the area found is within a millionth of the range of the best."""
AREA_RATIO = 0.75
"""Ratio of the areas that are tried one by one where halving finds nothing."""


@dataclass(frozen=True)
class FittedSample:
    """A sample that is within the limit, and what was done for it.

    Attributes:
        sample: what to encode.
        counts: how long it is now.
        dropped: how many images went, each with its pixels and its placeholder.
        resized: how many images are smaller now.
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
        return _with_fewer_images(sample, processor, max_tokens, counts, supervise)
    if policy == "shrink_media":
        return _with_smaller_images(sample, processor, max_tokens, counts, supervise)
    raise over_length_error(sample.id, counts.tokens, max_tokens)


# ---- fewer images


def drop_image(messages: list[Message], place: ImagePosition) -> list[Message]:
    """The messages without one image: its pixels and its placeholder. Words that it kept apart stay apart, by a line break."""
    number, index = place
    content = list(messages[number]["content"])
    del content[index]
    if 0 < index < len(content) and content[index - 1]["type"] == content[index]["type"] == "text":
        before, after = content[index - 1]["text"], content[index]["text"]
        gap = "" if before[-1:].isspace() or after[:1].isspace() else "\n"
        content[index - 1 : index + 1] = [{"type": "text", "text": f"{before}{gap}{after}"}]
    return [*messages[:number], {**messages[number], "content": content}, *messages[number + 1 :]]


def _with_fewer_images(
    sample: Sample, processor: ProcessorMixin, max_tokens: int, counts: Counts, supervise: Supervise
) -> FittedSample:
    """The largest image goes first, so that the fewest go. Of equally large ones those of earlier turns go first, and in a turn
    the last. An image that is all that its turn says stays."""
    fitted = FittedSample(sample, counts)
    while fitted.counts.tokens > max_tokens:
        place = _next_to_drop(fitted.sample, processor)
        if place is None:
            tried = f", and {fitted.counts.tokens} without the images that could be dropped" * bool(fitted.dropped)
            raise over_length_error(sample.id, counts.tokens, max_tokens, tried)
        fewer = replace(fitted.sample, messages=drop_image(fitted.sample.messages, place))
        fitted = FittedSample(fewer, count_tokens(fewer, processor, supervise), fitted.dropped + 1)
    return fitted


def _next_to_drop(sample: Sample, processor: ProcessorMixin) -> ImagePosition | None:
    places = _image_positions(sample.messages)
    lengths = [_tokens(processor, text) for text in sample_replacements(sample, processor)]
    spare = [i for i, (number, _) in enumerate(places) if _has_other_content(sample.messages[number])]
    if not spare:
        return None
    return places[min(spare, key=lambda i: (-lengths[i], places[i][0], -places[i][1]))]


def _image_positions(messages: list[Message]) -> list[ImagePosition]:
    blocks = [(number, index) for number, message in enumerate(messages) for index in range(len(message["content"]))]
    return [(number, index) for number, index in blocks if messages[number]["content"][index]["type"] == "image"]


def _has_other_content(message: Message) -> bool:
    """Whether a turn still has something in it without one of its images."""
    images = sum(block["type"] == "image" for block in message["content"])
    return images > 1 or any(block["type"] == "text" and block["text"].strip() for block in message["content"])


def _tokens(processor: Any, text: str) -> int:
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- smaller images


def _with_smaller_images(
    sample: Sample, processor: ProcessorMixin, max_tokens: int, counts: Counts, supervise: Supervise
) -> FittedSample:
    budget = counts.media_tokens - (counts.tokens - max_tokens)
    sizes = _sizes(sample)
    while True:
        smaller = resize_images(sizes, processor, budget)
        if smaller is None:
            raise over_length_error(sample.id, counts.tokens, max_tokens, ", and no smaller images make it fit")
        fitted = replace(sample, messages=set_image_sizes(sample.messages, smaller))
        now = count_tokens(fitted, processor, supervise)
        if now.tokens <= max_tokens:
            return FittedSample(fitted, now, resized=sum(old != new for old, new in zip(sizes, smaller, strict=True)))
        budget -= now.tokens - max_tokens  # tokens at an image's edge may join with the text around it


def _sizes(sample: Sample) -> list[Size]:
    try:
        return image_sizes(sample.messages)
    except ValueError as error:
        raise RowError(sample.id, "image", str(error), issue_type_of(error, "image_refused")) from error


def set_image_sizes(messages: list[Message], sizes: list[Size]) -> list[Message]:
    """The messages with a `size` in the block of every image, in order."""
    given: Iterator[Size] = iter(sizes)
    return [{**m, "content": [{**b, "size": next(given)} if b["type"] == "image" else b for b in m["content"]]} for m in messages]


def resize_images(sizes: list[Size], processor: ProcessorMixin, budget: int) -> list[Size] | None:
    """Sizes of a sample's images with which they take no more than `budget` tokens.

    All images larger than some area are brought down to it, with their aspect ratios, and the smaller ones are left alone: the
    largest shrink first. The area is the largest that serves, found by halving. Where fewer pixels do not always mean fewer
    tokens, as with tiles, areas are tried one by one as well.

    Args:
        sizes: (width, height) of the images.
        processor: the model's processor.
        budget: tokens for all images together.

    Returns:
        A size for every image; None when no size serves, as in families where the number of tokens does not depend on it.
    """
    lengths: dict[str, int] = {}

    def within(area: float) -> bool:
        try:
            texts = image_replacements(processor, [_at_most(size, area) for size in sizes])
        except ValueError:  # the rounded shape is one that the processor refuses
            return False
        for text in texts:
            if text not in lengths:
                lengths[text] = _tokens(processor, text)
        return sum(lengths[text] for text in texts) <= budget

    most = float(max((width * height for width, height in sizes), default=0))
    least = float(SMALLEST_EDGE**2)
    if not sizes or budget < 1:
        return None
    if within(most):
        return list(sizes)
    serves, too_much = least, most
    if not within(least):
        rungs = (
            [most * AREA_RATIO**step for step in range(1, max(1, math.ceil(math.log(least / most, AREA_RATIO))))]
            if most > least
            else []
        )
        found = next((area for area in rungs if within(area)), None)
        if found is None:
            return None
        serves, too_much = found, min(found / AREA_RATIO, most)
    for _ in range(STEPS):
        middle = (serves + too_much) / 2
        serves, too_much = (middle, too_much) if within(middle) else (serves, middle)
    return [_at_most(size, serves) for size in sizes]


def _at_most(size: Size, area: float) -> Size:
    """The size brought down to an area, its shorter edge no shorter than `SMALLEST_EDGE` or than it was."""
    width, height = size
    scale = max(math.sqrt(area / (width * height)), SMALLEST_EDGE / min(width, height))
    if scale >= 1:
        return size
    return max(1, round(width * scale)), max(1, round(height * scale))
