"""Exact token counts from image sizes, without decoding any pixel.

A processor replaces every image placeholder with a text that depends on a few properties of the processed images: grids, rows
and columns, crops. For the families below these are computed from the sizes with the image processor's arithmetic, and the
processor's `replace_image_token` writes the text. In any other family a blank image of the same size goes through the real
processor once.
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

ImageGeometry = dict[str, Any]
CountRule = Callable[[Any, dict[str, Any], list[Size]], ImageGeometry | None]
"""From a processor, its image processor's settings and the image sizes of one sample to the values that `replace_image_token`
reads; None if the real processor is needed."""

PROBES: tuple[tuple[Size, ...], ...] = (((1, 1),), ((61, 17),), ((300, 301),), ((90, 400), (333, 500)), ((801, 200),))
"""Image sizes of samples on which a family's rule is compared with the real processor before it is used."""


@dataclass(frozen=True)
class Counts:
    """Token counts of a sample.

    Attributes:
        tokens: length of `input_ids`.
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
        UserError: the processor has no `replace_image_token`.
    """
    replacements = sample_replacements(sample, processor)
    encoded = encode_text(sample.id, sample.messages, processor, replacements, supervise)
    return Counts(len(encoded.input_ids), sum(encoded.media), sum(encoded.supervised), len(replacements))


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
        UserError: the processor has no `replace_image_token`.
    """
    if not sizes:
        return []
    check_resized(processor, sizes)
    rule = _trusted_rule(processor)
    return list(_by_rule(processor, tuple(sizes), rule) if rule else _blank_replacements(processor, tuple(sizes)))


def counts_by_arithmetic(processor: ProcessorMixin) -> bool:
    """Whether tokens are counted by a family's rule; otherwise a blank image of every new size is processed, which is slower."""
    return _trusted_rule(processor) is not None


@lru_cache(maxsize=8)
def _trusted_rule(processor: ProcessorMixin) -> CountRule | None:
    """The rule of the processor's family, if it agrees with the processor: other releases of transformers may differ."""
    rule = _rule(processor)
    if rule is None:
        return None
    agrees = all(
        _outcome(_by_rule, processor, sizes, rule) == _outcome(_blank_replacements, processor, sizes) for sizes in PROBES
    )
    return rule if agrees else None


def _outcome(count: Callable[..., tuple[str, ...]], processor: ProcessorMixin, sizes: tuple[Size, ...], *rule: CountRule) -> Any:
    """The result of counting: the texts, or the error message."""
    try:
        return count(processor, sizes, *rule)
    except ValueError as error:
        return str(error)


def _by_rule(processor: ProcessorMixin, sizes: tuple[Size, ...], rule: CountRule) -> tuple[str, ...]:
    geometry = rule(processor, image_kwargs(processor), list(sizes))
    if geometry is None:
        return _blank_replacements(processor, sizes)
    return tuple(str(processor.replace_image_token(geometry, image_idx=index)) for index in range(len(sizes)))


@lru_cache(maxsize=4096)
def _blank_replacements(processor: ProcessorMixin, sizes: tuple[Size, ...]) -> tuple[str, ...]:
    """The replacement texts of the real processor for blank images."""
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise RecipeValueError(
            "model",
            f"{type(processor).__name__} has no `replace_image_token`, so its image tokens cannot be counted; use a model "
            "whose processor has it",
        )
    blanks = [Image.new("RGB", size) for size in sizes]
    text = processor.image_token * len(sizes)
    encoded = processor(text=[text], images=[blanks], return_text_replacement_offsets=True)
    return tuple(str(each["replacement"]) for each in encoded["text_replacement_offsets"][0])


# ---- the families


def _llava(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """One crop or one fixed size, whatever the image size."""
    final = settings["crop_size"] if settings["do_center_crop"] else settings["size"] if settings["do_resize"] else None
    if not final or not final.get("height") or not final.get("width"):
        return None
    return {"pixel_values": [_shape_only_image((final["width"], final["height"]))] * len(sizes)}


def _paligemma(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """A fixed number of tokens for every image."""
    return {}


def _llava_next(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """Tiles of the best-fitting resolution, and the whole image; the processor counts them from the sizes."""
    size = settings["size"]
    edge = size.get("shortest_edge")
    tile = (size["width"], size["height"]) if size.get("height") and size.get("width") else (edge, edge)
    if settings["do_center_crop"]:
        tile = (settings["crop_size"]["width"], settings["crop_size"]["height"])
    return {
        "pixel_values": [[_shape_only_image(tile)]],
        "image_sizes": [(height, width) for width, height in sizes],
        "batch_num_images": [len(sizes)],  # LlavaOnevision tiles only the single image of a sample
    }


def _qwen2_vl(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """A grid of patches that keeps the aspect ratio, with a minimum and maximum number of pixels."""
    if not settings["do_resize"]:
        return None
    patch, bounds = settings["patch_size"], settings["size"]
    grids = []
    for width, height in sizes:
        min_pixels, max_pixels = bounds["shortest_edge"], bounds["longest_edge"]
        factor = patch * settings["merge_size"]
        resized = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
        grids.append([1, *(edge // patch for edge in resized)])
    return {"image_grid_thw": np.array(grids)}


def _idefics3(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """Rows and columns of tiles, after resizing the longest edge."""
    tile = settings["max_image_size"]["longest_edge"]
    rows, columns = [], []
    for width, height in sizes:
        if settings["do_resize"] and settings["size"].get("longest_edge"):
            height, width = idefics3_size(
                _shape_only_image((width, height)), resolution_max_side=settings["size"]["longest_edge"]
            )
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


def _internvl(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """The grid of tiles with the nearest aspect ratio, and a thumbnail if there is more than one tile."""
    if not settings["crop_to_patches"] or settings["max_patches"] <= 1:
        return {"num_patches": [1] * len(sizes)}
    tile = (settings["size"]["height"], settings["size"]["width"])
    counts = []
    for width, height in sizes:
        columns, rows = get_optimal_tiled_canvas((height, width), tile, settings["min_patches"], settings["max_patches"])
        counts.append(columns * rows + (columns * rows > 1))
    return {"num_patches": counts}


def _gemma3(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """The whole image; with pan and scan, also crops of a long one."""
    names = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")
    if not settings["do_pan_and_scan"]:
        return {"num_crops": [0] * len(sizes)}
    if processor.image_processor.backend != "pil":
        return None
    limits = {name: settings[name] for name in names}
    return {"num_crops": [len(processor.image_processor.pan_and_scan(_shape_only_image(size), **limits)) for size in sizes]}


def _pixtral(processor: Any, settings: dict[str, Any], sizes: list[Size]) -> ImageGeometry | None:
    """Whole patches, with a maximum edge."""
    longest, size = settings["size"].get("longest_edge"), settings["size"]
    if not settings["do_resize"] or settings["do_center_crop"]:
        return None
    bound = (longest, longest) if longest else (size["height"], size["width"])
    patch = processor.patch_size * processor.spatial_merge_size
    resized = [pixtral_size(_shape_only_image(size), bound, patch, input_data_format="channels_first") for size in sizes]
    if any(min(edges) < 1 for edges in resized):
        return None  # the real processor raises its own error
    return {"image_sizes": resized}


def _shape_only_image(size: Size) -> np.ndarray[Any, Any]:
    """An array of shape (3, height, width) with one byte of memory, for functions that read only the shape."""
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
"""Processor class to its counting rule and the image processors that the rule supports."""


def _rule(processor: Any) -> CountRule | None:
    """The rule for the classes of the processor and its image processor, or of their parent classes; None if there is none."""
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        return None
    for name in (each.__name__ for each in type(processor).__mro__):
        if name in COUNT_RULES:
            rule, image_processors = COUNT_RULES[name]
            image_processor = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
            return rule if image_processor in image_processors else None
    return None


def processor_settings(processor: ProcessorMixin) -> dict[str, str]:
    """All settings that affect image processing, to tell processors apart (a cache key)."""
    classes = {"processor": type(processor).__name__, "image_processor": type(processor.image_processor).__name__}
    return classes | {name: repr(value) for name, value in sorted(image_kwargs(processor).items())}
