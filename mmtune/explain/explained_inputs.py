"""Inputs of an explained answer: the tensors of its conversation, the cells of its images, and the words of its prompt."""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import IGNORE_INDEX, EncodedText, encode_sample, encode_text, process_images
from mmtune.data.media.media import EmbeddedMedia, Media, open_image
from mmtune.data.message import RowError, Sample, with_images
from mmtune.data.validation.issues import issue_type_of
from mmtune.explain.explanation import Box, cell_edges, cell_grid
from mmtune.utils.errors import UserError

DEFAULT_GRID, MAX_GRID = 8, 64
"""Cells along the longer side of an image."""

WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Characters of Japanese and Chinese, which are written without spaces: each is a word."""
WORD = re.compile(f"[{WITHOUT_SPACES}]|[^\\s{WITHOUT_SPACES}]+")


@dataclass(frozen=True)
class Word:
    """A word of the prompt: its text, and the positions of its tokens in `input_ids`."""

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ExplainedInputs:
    """A conversation that ends with the explained answer.

    Attributes:
        sample: with its images in memory.
        images: decoded, in order.
        grids: (rows, columns) of the cells of each image.
        encoded: the tensors of `encode_sample`, with labels on the answer and its end of turn.
        words: of the prompt.
        answer_ids: the tokens of the answer, without its end of turn.
    """

    sample: Sample
    images: tuple[Image.Image, ...]
    grids: tuple[tuple[int, int], ...]
    encoded: dict[str, torch.Tensor]
    words: tuple[Word, ...]
    answer_ids: tuple[int, ...]

    @property
    def cells(self) -> list[tuple[int, Box]]:
        """Every cell in reading order, with the number of its image."""
        return [
            (number, (x1, y1, x2, y2))
            for number, (image, (rows, columns)) in enumerate(zip(self.images, self.grids, strict=True))
            for y1, y2 in _intervals(image.height, rows)
            for x1, x2 in _intervals(image.width, columns)
        ]

    def without_cells(self, processor: ProcessorMixin) -> Iterator[dict[str, torch.Tensor]]:
        """For each cell, the tensors of the conversation with the cell in the mean color of its image.

        The mean keeps the brightness of the whole; black or white can be content. The image goes through the model's own
        processor, so the cell is right for every layout of `pixel_values`.
        """
        colors, media = [mean_color(image) for image in self.images], self.sample.images
        for number, box in self.cells:
            image = self.images[number].copy()
            image.paste(colors[number], box)
            occluded = [*media[:number], _as_media(image), *media[number + 1 :]]
            yield encode_sample(_with_media(self.sample, occluded), processor, supervise="last")


def explained_inputs(sample: Sample, processor: ProcessorMixin, grid: int | None = None) -> ExplainedInputs:
    """Encode a conversation whose last message is the answer to explain.

    Args:
        grid: cells along the longer side of each image; None: `DEFAULT_GRID`, or less for an image with fewer pixels.

    Raises:
        UserError: an empty answer, an image that cannot be opened, or a grid that is finer than the pixels of an image.
        RowError: the conversation cannot be encoded.
    """
    images = _open(sample)
    grids = tuple(_grid_of(image, grid) for image in images)
    sample = _with_media(sample, [_as_media(image) for image in images])
    processed = process_images(sample.id, sample.messages, processor)
    encoded = encode_sample(sample, processor, supervise="last", images=processed)
    answer_ids = encoded["labels"][encoded["labels"] != IGNORE_INDEX].tolist()[:-1]
    if not answer_ids:
        raise UserError("the answer is empty, so there is nothing to explain")
    text = encode_text(sample.id, sample.messages, processor, processed[1], "last", sample.tools)
    return ExplainedInputs(sample, tuple(images), grids, encoded, tuple(_words(text, processor)), tuple(answer_ids))


def mean_color(image: Image.Image) -> tuple[int, int, int]:
    """The mean of the pixels of an RGB image, rounded."""
    red, green, blue = (round(float(value)) for value in np.asarray(image).mean(axis=(0, 1)))
    return red, green, blue


def _open(sample: Sample) -> list[Image.Image]:
    try:
        return [open_image(media) for media in sample.images]
    except ValueError as error:
        raise RowError(sample.id, "image", str(error), issue_type_of(error)) from error


def _grid_of(image: Image.Image, grid: int | None) -> tuple[int, int]:
    longest = max(image.size)
    if grid is None:
        return cell_grid(image.size, min(DEFAULT_GRID, longest))
    if not 1 <= grid <= MAX_GRID:
        raise UserError(f"grid {grid}: expected 1 to {MAX_GRID} cells along the longer side of an image")
    if grid > longest:
        raise UserError(
            f"grid {grid}: the image has {image.width} x {image.height} pixels, fewer than cells; give at most {longest}"
        )
    return cell_grid(image.size, grid)


def _intervals(length: int, cells: int) -> list[tuple[int, int]]:
    return list(pairwise(cell_edges(length, cells)))


def _as_media(image: Image.Image) -> EmbeddedMedia:
    """The image as a file in memory, without compression."""
    file = io.BytesIO()
    image.save(file, "PPM")
    return EmbeddedMedia(Path("explained"), "image.ppm", data=file.getvalue())


def _with_media(sample: Sample, media: Sequence[Media]) -> Sample:
    """The sample with other images, in the order of its own."""
    remaining = iter(media)
    return replace(sample, messages=[with_images(message, lambda _: next(remaining)) for message in sample.messages])


def _words(text: EncodedText, processor: ProcessorMixin) -> Iterator[Word]:
    """The words of the prompt with their tokens, without images and control tokens.

    A token belongs to the word in which it starts, after white space.
    """
    matches = [match.span() for match in WORD.finditer(text.text)]
    starts = [start for start, _ in matches]
    control = {*processor.tokenizer.all_special_ids, *processor.tokenizer.added_tokens_decoder}
    end = text.supervised.index(True) if True in text.supervised else len(text.input_ids)
    groups: list[tuple[int, list[int]]] = []
    for position in range(end):
        first, last = text.offsets[position]
        piece = text.text[first:last]
        if text.media[position] or text.input_ids[position] in control or not piece.strip():
            continue
        word = bisect_right(starts, first + len(piece) - len(piece.lstrip())) - 1
        if groups and groups[-1][0] == word and groups[-1][1][-1] == position - 1:
            groups[-1][1].append(position)
        else:
            groups.append((word, [position]))
    for _, positions in groups:
        first, last = text.offsets[positions[0]][0], max(text.offsets[position][1] for position in positions)
        yield Word(text.text[first:last].strip(), tuple(positions))
