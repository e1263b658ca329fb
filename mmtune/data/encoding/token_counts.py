"""Exact token counts from the sizes of images: no pixel is decoded.

A processor puts a text in place of every image, and writes it from a few figures about the processed images: grids, rows and
columns, crops. For the families below these figures are computed from sizes, with the image processor's own arithmetic, and the
processor's own `replace_image_token` writes the text. Any other family is counted with a blank image of the same size, which goes
through the real processor once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size as idefics3_size
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size as pixtral_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmtune.data.encoding.encode import Supervise, encode_text
from mmtune.data.media.media import image_size
from mmtune.data.media.resizing import check_resized, image_kwargs
from mmtune.data.message import Message, RowError, Sample
from mmtune.data.validation.issues import issue_type_of
from mmtune.utils.errors import RecipeValueError

Size = tuple[int, int]
"""(width, height) in pixels, upright."""

ImageFigures = dict[str, Any]
CountRule = Callable[[Any, dict[str, Any], list[Size]], ImageFigures | None]
"""From a processor, its image processor's settings and the images of one sample to what `replace_image_token` reads; None: ask
the processor itself."""

PROBES: tuple[tuple[Size, ...], ...] = (((1, 1),), ((61, 17),), ((300, 301),), ((90, 400), (333, 500)), ((801, 200),))
"""Samples on which a family's arithmetic is compared with the real processor before it is relied on."""


@dataclass(frozen=True)
class Counts:
    """How long a sample is, in tokens.

    Attributes:
        tokens: all of them, the length of `input_ids`.
        media_tokens: those that stand in place of images, with the row marks and the like that the processor writes around them.
        supervised: those that the loss falls on.
        images: how many images there are.
    """

    tokens: int
    media_tokens: int
    supervised: int
    images: int


def count_tokens(sample: Sample, processor: ProcessorMixin, supervise: Supervise = "all") -> Counts:
    """How long `encode_sample` would make a sample, from the headers of its images.

    Args:
        sample: the conversation.
        processor: the model's processor.
        supervise: as the recipe's `data.supervise`.

    Raises:
        RowError: naming the row, for an image without a readable header or one that the processor refuses, and for every text
            that `encode_sample` refuses.
        UserError: a processor that does not say what it puts in place of an image.
    """
    replacements = sample_replacements(sample, processor)
    encoded = encode_text(sample.id, sample.messages, processor, replacements, supervise)
    return Counts(len(encoded.input_ids), sum(encoded.media), sum(encoded.supervised), len(replacements))


def sample_replacements(sample: Sample, processor: ProcessorMixin) -> list[str]:
    """What stands in place of each of a sample's images, as `image_replacements`.

    Raises:
        RowError: naming the row, for an image without a readable header or one that the processor refuses.
        UserError: as `image_replacements`.
    """
    try:
        sizes = image_sizes(sample.messages)
    except ValueError as error:
        raise RowError(sample.id, "image", str(error), issue_type_of(error)) from error
    try:
        return image_replacements(processor, sizes)
    except ValueError as error:  # in the words of `encode_sample`
        told = f"{type(processor).__name__} refuses the sample's images: {error}"
        raise RowError(sample.id, "image", told, "image_refused") from error


def image_sizes(messages: list[Message]) -> list[Size]:
    """(width, height) of every image as the processor will see it: of its header, or the `size` that its block asks for.

    Raises:
        ValueError: an image without a readable header.
    """
    blocks = [block for message in messages for block in message["content"] if block["type"] == "image"]
    return [block["size"] if "size" in block else image_size(block["image"]) for block in blocks]


def image_replacements(processor: ProcessorMixin, sizes: list[Size]) -> list[str]:
    """What a processor puts in place of the images of one sample.

    The processor's settings are read when it is first met; they may not change after.

    Args:
        processor: the model's processor.
        sizes: (width, height) of the sample's images, in order. All of them: in some families the number of images matters.

    Returns:
        For every image the string that `processor.replace_image_token` gives after real image processing.

    Raises:
        ValueError: an image that the processor refuses, in its own words, or would make too large.
        UserError: a processor that does not say what it puts in place of an image.
    """
    if not sizes:
        return []
    check_resized(processor, sizes)
    rule = _trusted_rule(processor)
    return list(_by_rule(processor, tuple(sizes), rule) if rule else _blank_replacements(processor, tuple(sizes)))


def counts_by_arithmetic(processor: ProcessorMixin) -> bool:
    """Whether images are counted by arithmetic; otherwise a blank image of every new size is processed, which takes longer."""
    return _trusted_rule(processor) is not None


@lru_cache(maxsize=8)
def _trusted_rule(processor: ProcessorMixin) -> CountRule | None:
    """The rule of the processor's family, if it agrees with the processor: another release of transformers might differ."""
    rule = _rule(processor)
    if rule is None:
        return None
    agrees = all(
        _outcome(_by_rule, processor, sizes, rule) == _outcome(_blank_replacements, processor, sizes) for sizes in PROBES
    )
    return rule if agrees else None


def _outcome(count: Callable[..., tuple[str, ...]], processor: ProcessorMixin, sizes: tuple[Size, ...], *rule: CountRule) -> Any:
    """What comes of counting: texts, or the words of a refusal."""
    try:
        return count(processor, sizes, *rule)
    except ValueError as error:
        return str(error)


def _by_rule(processor: ProcessorMixin, sizes: tuple[Size, ...], rule: CountRule) -> tuple[str, ...]:
    figures = rule(processor, image_kwargs(processor), list(sizes))
    if figures is None:
        return _blank_replacements(processor, sizes)
    return tuple(str(processor.replace_image_token(figures, image_idx=index)) for index in range(len(sizes)))


@lru_cache(maxsize=4096)
def _blank_replacements(processor: ProcessorMixin, sizes: tuple[Size, ...]) -> tuple[str, ...]:
    """By the real processor, from images of one colour."""
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise RecipeValueError(
            "model",
            f"{type(processor).__name__} does not say what it puts in place of an image (it has no replace_image_token), "
            "so its tokens cannot be counted beforehand; use a model whose processor does",
        )
    blanks = [Image.new("RGB", size) for size in sizes]
    text = processor.image_token * len(sizes)
    encoded = processor(text=[text], images=[blanks], return_text_replacement_offsets=True)
    return tuple(str(each["replacement"]) for each in encoded["text_replacement_offsets"][0])


# ---- the families


def _llava(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """One crop or one fixed size, whatever comes in."""
    final = settings["crop_size"] if settings["do_center_crop"] else settings["size"] if settings["do_resize"] else None
    if not final or not final.get("height") or not final.get("width"):
        return None
    return {"pixel_values": [_hollow((final["width"], final["height"]))] * len(sizes)}


def _paligemma(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """A number of its own for every image."""
    return {}


def _llava_next(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """Tiles of the resolution that fits the image best, and the image as a whole; the processor counts them from the sizes."""
    size = settings["size"]
    edge = size.get("shortest_edge")
    tile = (size["width"], size["height"]) if size.get("height") and size.get("width") else (edge, edge)
    if settings["do_center_crop"]:
        tile = (settings["crop_size"]["width"], settings["crop_size"]["height"])
    return {
        "pixel_values": [[_hollow(tile)]],
        "image_sizes": [(height, width) for width, height in sizes],
        "batch_num_images": [len(sizes)],  # LlavaOnevision tiles an image that is alone in its sample
    }


def _qwen2_vl(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """A grid of patches that keeps the aspect ratio, between a least and a largest number of pixels."""
    if not settings["do_resize"]:
        return None
    patch, bounds = settings["patch_size"], settings["size"]
    grids = []
    for width, height in sizes:
        least, most = bounds["shortest_edge"], bounds["longest_edge"]
        resized = smart_resize(height, width, factor=patch * settings["merge_size"], min_pixels=least, max_pixels=most)
        grids.append([1, *(edge // patch for edge in resized)])
    return {"image_grid_thw": np.array(grids)}


def _idefics3(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """Rows and columns of tiles, after the longest edge was made as long as the settings say."""
    tile = settings["max_image_size"]["longest_edge"]
    rows, columns = [], []
    for width, height in sizes:
        if settings["do_resize"] and settings["size"].get("longest_edge"):
            height, width = idefics3_size(_hollow((width, height)), resolution_max_side=settings["size"]["longest_edge"])
        elif settings["do_resize"]:
            height, width = settings["size"]["height"], settings["size"]["width"]
        if settings["do_image_splitting"]:
            height, width = _whole_tiles(height, width, tile)
        split = settings["do_image_splitting"] and max(height, width) > tile
        rows.append(height // tile if split else 0)
        columns.append(width // tile if split else 0)
        if split and not min(rows[-1], columns[-1]):
            return None
    return {"rows": [rows], "cols": [columns]}


def _whole_tiles(height: int, width: int, tile: int) -> Size:
    """`resize_for_vision_encoder` of Idefics3's image processor: (height, width) in whole tiles, the longer edge first."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return height, width


def _internvl(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """The grid of tiles whose aspect ratio is nearest, and a thumbnail beside more than one tile."""
    if not settings["crop_to_patches"] or settings["max_patches"] <= 1:
        return {"num_patches": [1] * len(sizes)}
    tile = (settings["size"]["height"], settings["size"]["width"])
    counts = []
    for width, height in sizes:
        columns, rows = get_optimal_tiled_canvas((height, width), tile, settings["min_patches"], settings["max_patches"])
        counts.append(columns * rows + (columns * rows > 1))
    return {"num_patches": counts}


def _gemma3(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """Always the whole image; with pan and scan, crops of a long one too."""
    names = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")
    if not settings["do_pan_and_scan"]:
        return {"num_crops": [0] * len(sizes)}
    if processor.image_processor.backend != "pil":
        return None
    limits = {name: settings[name] for name in names}
    return {"num_crops": [len(processor.image_processor.pan_and_scan(_hollow(size), **limits)) for size in sizes]}


def _pixtral(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageFigures | None:
    """Whole patches, no edge longer than the settings say."""
    longest, size = settings["size"].get("longest_edge"), settings["size"]
    if not settings["do_resize"] or settings["do_center_crop"]:
        return None
    bound = (longest, longest) if longest else (size["height"], size["width"])
    patch = processor.patch_size * processor.spatial_merge_size
    resized = [pixtral_size(_hollow(size), bound, patch, input_data_format="channels_first") for size in sizes]
    if any(min(edges) < 1 for edges in resized):
        return None  # the processor refuses it, and has the words
    return {"image_sizes": resized}


def _hollow(size: Size) -> np.ndarray[Any, Any]:
    """An image of that size, (3, height, width) and one byte of memory, for functions that read nothing but a shape."""
    return np.broadcast_to(np.uint8(0), (3, size[1], size[0]))


_SQUARE = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor", "DeiTImageProcessor")
COUNT_RULES: dict[str, tuple[CountRule, tuple[str, ...]]] = {
    "LlavaProcessor": (_llava, (*_SQUARE, "LlavaImageProcessor")),
    "LlavaNextProcessor": (_llava_next, ("LlavaNextImageProcessor",)),
    "LlavaOnevisionProcessor": (_llava_next, ("LlavaOnevisionImageProcessor",)),
    "Qwen2VLProcessor": (_qwen2_vl, ("Qwen2VLImageProcessor",)),
    "Qwen2_5_VLProcessor": (_qwen2_vl, ("Qwen2VLImageProcessor",)),
    "Qwen3VLProcessor": (_qwen2_vl, ("Qwen2VLImageProcessor",)),
    "Idefics3Processor": (_idefics3, ("Idefics3ImageProcessor", "SmolVLMImageProcessor")),
    "SmolVLMProcessor": (_idefics3, ("Idefics3ImageProcessor", "SmolVLMImageProcessor")),
    "InternVLProcessor": (_internvl, ("GotOcr2ImageProcessor",)),
    "Gemma3Processor": (_gemma3, ("Gemma3ImageProcessor",)),
    "PaliGemmaProcessor": (_paligemma, _SQUARE),
    "PixtralProcessor": (_pixtral, ("PixtralImageProcessor",)),
}
"""By a processor's class: its rule, and the image processors that the rule knows."""


def _rule(processor: Any) -> CountRule | None:
    """The rule for this pair of classes, if there is one. A subclass has its parent's, until it is found to disagree."""
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        return None
    for name in (each.__name__ for each in type(processor).__mro__):
        if name in COUNT_RULES:
            rule, image_processors = COUNT_RULES[name]
            used = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
            return rule if used in image_processors else None
    return None


def processor_settings(processor: ProcessorMixin) -> dict[str, str]:
    """Everything that image processing depends on, for telling processors apart."""
    kinds = {"processor": type(processor).__name__, "image_processor": type(processor.image_processor).__name__}
    return kinds | {name: repr(value) for name, value in sorted(image_kwargs(processor).items())}
