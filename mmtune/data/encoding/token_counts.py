"""Exact token counts from image sizes, without decoding any pixel.

A processor replaces every image placeholder with a text that depends on a few properties of the processed images: grids, rows
and columns, crops. Where a family's `geometry` computes these from the sizes, the processor's `replace_image_token` writes the
text. In any other family a blank image of the same size goes through the real processor once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import EncodedText, Supervise, encode_prompt_text, encode_text
from mmtune.data.media.media import image_size
from mmtune.data.media.resizing import check_resized, image_kwargs
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.validation.issues import issue_type_of
from mmtune.families.family import Size
from mmtune.families.family_table import family_of_processor

PROBES: tuple[tuple[Size, ...], ...] = (((1, 1),), ((61, 17),), ((300, 301),), ((90, 400), (333, 500)), ((801, 200),))
"""Image sizes of samples on which a family's rule is compared with the real processor before it is used."""


@dataclass(frozen=True)
class Counts:
    """Token counts of a sample.

    Attributes:
        tokens: length of `input_ids`, with that of `decoder_input_ids` for an encoder-decoder model.
        media_tokens: tokens of expanded image placeholders, including separators that the processor writes around them.
        supervised: tokens that the loss includes.
        images: number of images.
    """

    tokens: int
    media_tokens: int
    supervised: int
    images: int


def count_tokens(sample: Sample, processor: ProcessorMixin, supervise: Supervise = "all") -> Counts:
    """Count the tokens that `encode_sample` would produce, reading only the headers of images.

    Args:
        sample: the conversation.
        processor: the model's processor.
        supervise: the recipe's `data.supervise`.

    Raises:
        RowError: an image has no readable header or is rejected by the processor, or `encode_sample` would reject the text.
        UserError: the text that stands for an image is unknown.
    """
    replacements = sample_replacements(sample, processor)
    return _counts(encode_text(sample.id, sample.messages, processor, replacements, supervise, sample.tools), replacements)


def count_prompt_tokens(sample: Sample, processor: ProcessorMixin) -> Counts:
    """Count the tokens that `encode_prompt` would produce for all messages of a sample, reading only the headers of images.

    Raises:
        RowError, UserError: as `count_tokens`.
    """
    replacements = sample_replacements(sample, processor)
    return _counts(encode_prompt_text(sample.id, sample.messages, processor, replacements, sample.tools), replacements)


def _counts(encoded: EncodedText, replacements: list[str]) -> Counts:
    tokens = encoded.tokens()
    return Counts(len(tokens), sum(media for _, media, _ in tokens), sum(scored for _, _, scored in tokens), len(replacements))


def sample_replacements(sample: Sample, processor: ProcessorMixin) -> list[str]:
    """The replacement text of each image of a sample (see `image_replacements`).

    Raises:
        RowError: an image has no readable header or is rejected by the processor; names the row.
        UserError: as in `image_replacements`.
    """
    try:
        sizes = image_sizes(sample.messages)
    except ValueError as error:
        raise RowError(sample.id, "image", str(error), issue_type_of(error)) from error
    try:
        return image_replacements(processor, sizes)
    except ValueError as error:  # the same message as in `encode_sample`
        detail = f"{type(processor).__name__} rejects the sample's images: {error}"
        raise RowError(sample.id, "image", detail, "image_refused") from error


def image_sizes(messages: list[Message]) -> list[Size]:
    """(width, height) of every image at the input of the processor: the `size` of its block, or else that of its header.

    Raises:
        DataIssueError: an image has no readable header.
    """
    blocks = [block for message in messages for block in message["content"] if block["type"] == "image"]
    return [block["size"] if "size" in block else image_size(block["image"]) for block in blocks]


def image_replacements(processor: ProcessorMixin, sizes: list[Size]) -> list[str]:
    """The texts with which a processor replaces the image placeholders of one sample.

    The processor's settings are cached at the first call and must not change afterwards.

    Args:
        processor: the model's processor.
        sizes: (width, height) of all images of the sample, in order; in some families their number matters.

    Returns:
        For every image the text that `processor.replace_image_token` returns after real image processing.

    Raises:
        ValueError: the processor rejects an image, or would resize it to too many pixels.
        UserError: the text that stands for an image is unknown.
    """
    if not sizes:
        return []
    check_resized(processor, sizes)
    count = _by_rule if counts_by_arithmetic(processor) else _blank_replacements
    return list(count(processor, tuple(sizes)))


@lru_cache(maxsize=8)
def counts_by_arithmetic(processor: ProcessorMixin) -> bool:
    """Whether tokens are counted by the family's arithmetic; otherwise a blank image of every new size is processed, more slowly.

    The arithmetic must agree with the processor, because other releases of transformers may differ.
    """
    family = family_of_processor(processor)
    image_processor = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    writes_text = type(processor).replace_image_token is not ProcessorMixin.replace_image_token
    return (
        writes_text
        and image_processor in family.image_processors
        and all(_outcome(_by_rule, processor, sizes) == _outcome(_blank_replacements, processor, sizes) for sizes in PROBES)
    )


def _outcome(count: Callable[..., tuple[str, ...]], processor: ProcessorMixin, sizes: tuple[Size, ...]) -> Any:
    """The result of counting: the texts, or the error message."""
    try:
        return count(processor, sizes)
    except ValueError as error:
        return str(error)


def _by_rule(processor: ProcessorMixin, sizes: tuple[Size, ...]) -> tuple[str, ...]:
    geometry = family_of_processor(processor).geometry(processor, image_kwargs(processor), sizes)
    if geometry is None:
        return _blank_replacements(processor, sizes)
    return tuple(str(processor.replace_image_token(geometry, image_idx=index)) for index in range(len(sizes)))


@lru_cache(maxsize=4096)
def _blank_replacements(processor: ProcessorMixin, sizes: tuple[Size, ...]) -> tuple[str, ...]:
    """The replacement texts of the real processor for blank images."""
    blanks = [Image.new("RGB", size) for size in sizes]
    return tuple(family_of_processor(processor).process_images(processor, blanks)[1])


def processor_settings(processor: ProcessorMixin) -> dict[str, str]:
    """All settings that affect image processing, to tell processors apart (a cache key)."""
    classes = {"processor": type(processor).__name__, "image_processor": type(processor.image_processor).__name__}
    return classes | {name: repr(value) for name, value in sorted(image_kwargs(processor).items())}
