"""Token counts from image sizes equal those of the real processors, from one pixel to photographs, with the same errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_processors import FAMILIES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaProcessor, SiglipImageProcessor

from mmtune.data.encoding.encode import encode_sample
from mmtune.data.encoding.token_counts import Counts, Size, count_tokens, counts_by_arithmetic, image_replacements
from mmtune.data.message import RowError, Sample
from mmtune.utils.errors import UserError

torch.set_num_threads(1)


def _changed(family: str, **values: Any) -> Any:
    """A family's processor with other settings of the image processor."""
    processor = copy.deepcopy(FAMILIES[family]())
    for name, value in values.items():
        setattr(processor.image_processor, name, value)
    return processor


def _llava_siglip() -> Any:
    images = SiglipImageProcessor(size={"height": 42, "width": 56})
    tokenizer = FAMILIES["llava"]().tokenizer
    return LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full")


def _pan_and_scan() -> Any:
    processor = copy.deepcopy(FAMILIES["gemma3"]())
    limits = {"pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": True, **limits}
    return processor


def _mistral3() -> Any:
    processor = copy.deepcopy(FAMILIES["mistral3"]())
    processor.spatial_merge_size, processor.patch_size = 1, 12
    return processor


VARIANTS: dict[str, Callable[[], Any]] = {
    **FAMILIES,
    "llava_siglip": _llava_siglip,
    "idefics3_whole": lambda: _changed("idefics3", do_image_splitting=False),
    "idefics3_four_tiles": lambda: _changed("idefics3", max_image_size={"longest_edge": 56}),
    "smolvlm_not_resized": lambda: _changed("smolvlm", do_resize=False),
    "internvl_one_tile": lambda: _changed("internvl", max_patches=1),
    "internvl_many_tiles": lambda: _changed("internvl", min_patches=2, max_patches=12),
    "llava_next_not_cropped": lambda: _changed("llava_next", do_center_crop=False),
    "gemma3_pan_and_scan": _pan_and_scan,
    "pixtral_patches": _mistral3,
}
NASTY = [
    (1, 1),
    (1, 2),
    (3, 1),
    (3, 3),
    (27, 29),
    (28, 28),
    (56, 56),
    (57, 56),
    (112, 57),
    (113, 56),
    (200, 1),
    (1, 201),
    (640, 480),
]
NASTY += [(2, 500), (500, 3), (1, 4000), (4000, 1), (336, 672), (799, 13), (255, 256)]


def _real(processor: Any, sizes: list[Size]) -> list[str] | str:
    """What transformers' processor puts in place of images of these sizes, or what it says against them."""
    images = [Image.new("RGB", size, "teal") for size in sizes]
    text = processor.image_token * len(sizes)
    try:
        encoded = processor(text=[text], images=[images], return_text_replacement_offsets=True)
    except ValueError as error:
        return str(error)
    return [each["replacement"] for each in encoded["text_replacement_offsets"][0]]


def _counted(processor: Any, sizes: list[Size]) -> list[str] | str:
    try:
        return image_replacements(processor, sizes)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def variants() -> Callable[[str], Any]:
    processors: dict[str, Any] = {}
    return lambda name: processors.setdefault(name, VARIANTS[name]())


@pytest.mark.parametrize("name", VARIANTS)
def test_extreme_sizes_are_counted_and_rejected_as_by_the_processor(variants: Callable[[str], Any], name: str) -> None:
    processor = variants(name)
    assert counts_by_arithmetic(processor)
    for size in NASTY:
        assert _counted(processor, [size]) == _real(processor, [size]), size


EDGE = st.integers(1, 90) | st.integers(1, 700)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(EDGE, EDGE), min_size=1, max_size=3))
@example(sizes=[(56, 56), (56, 56)])
def test_random_sizes_are_counted_as_by_the_processor(variants: Callable[[str], Any], name: str, sizes: list[Size]) -> None:
    processor = variants(name)
    assert _counted(processor, sizes) == _real(processor, sizes)


@pytest.mark.parametrize("name", FAMILIES)
def test_photographs_are_counted_as_by_the_processor(variants: Callable[[str], Any], name: str) -> None:
    processor = variants(name)
    assert _counted(processor, [(4000, 3000)]) == _real(processor, [(4000, 3000)])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 3000)), min_size=1, max_size=2))
def test_sizes_up_to_photographs_are_counted_as_by_the_processor(
    variants: Callable[[str], Any], name: str, sizes: list[Size]
) -> None:
    processor = variants(name)
    if name == "smolvlm_not_resized":  # every pixel of them would go through it
        sizes = [(height // 4 + 1, width // 4 + 1) for height, width in sizes]
    assert _counted(processor, sizes) == _real(processor, sizes)


HEAVY = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("llava_onevision", "idefics3", "smolvlm", "internvl", "mistral3")
]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "qwen3_vl", *HEAVY])
def test_published_settings_are_counted_as_by_the_processor(family: str) -> None:
    published: dict[str, dict[str, Any]] = {
        "llava_next": {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
        "llava_onevision": {"image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]},
        "qwen2_vl": {"size": {"shortest_edge": 3136, "longest_edge": 1003520}},
        "qwen3_vl": {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        "idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
        "smolvlm": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        "internvl": {"size": {"height": 448, "width": 448}, "min_patches": 1, "max_patches": 12},
        "mistral3": {"size": {"longest_edge": 1540}},
    }
    values = published[family]
    if family == "llava_next":
        values |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if family == "llava_onevision":
        values |= {"size": {"height": 384, "width": 384}}
    settled = {key: _size(value) if key in ("size", "crop_size") else value for key, value in values.items()}
    processor = _changed(family, **settled)
    assert counts_by_arithmetic(processor)
    for sizes in [[(640, 480)], [(333, 1000)], [(1500, 800), (97, 31)]]:
        assert _counted(processor, sizes) == _real(processor, sizes)


def _size(value: dict[str, int]) -> Any:
    from transformers.image_utils import SizeDict

    return SizeDict(**value)


def test_settings_without_a_formula_are_counted_with_blank_images() -> None:
    processor = _changed("llava", do_center_crop=False)  # every image keeps its shape
    assert _counted(processor, [(100, 60)]) == _real(processor, [(100, 60)])
    assert _counted(processor, [(100, 70)]) == _real(processor, [(100, 70)]) != _real(processor, [(100, 60)])


def test_an_unknown_family_is_counted_with_blank_images() -> None:
    class OtherImages(type(FAMILIES["qwen2_vl"]().image_processor)):  # type: ignore[misc]
        def resize(self, images: Any, *arguments: Any, **settings: Any) -> Any:
            return super().resize(images[..., :28, :], *arguments, **settings)

    processor = copy.deepcopy(FAMILIES["qwen2_vl"]())
    processor.image_processor = OtherImages(**processor.image_processor.to_dict())
    assert not counts_by_arithmetic(processor)
    for size in [(300, 40), (301, 400), (1, 4000)]:
        assert _counted(processor, [size]) == _real(processor, [size])


def test_arithmetic_that_disagrees_with_the_processor_is_not_used() -> None:
    processor = copy.deepcopy(FAMILIES["qwen2_vl"]())
    honest = type(processor.image_processor).resize

    def otherwise(images: Any, *arguments: Any, **settings: Any) -> Any:  # as another release of transformers might
        return honest(processor.image_processor, images[..., : max(1, images.shape[-2] // 2), :], *arguments, **settings)

    processor.image_processor.resize = otherwise
    assert not counts_by_arithmetic(processor)
    assert _counted(processor, [(300, 301)]) == _real(processor, [(300, 301)])


def test_a_processor_without_replacement_text_is_rejected_by_name() -> None:
    from transformers import ProcessorMixin

    class Silent(type(FAMILIES["llava"]())):  # type: ignore[misc]
        replace_image_token = ProcessorMixin.replace_image_token

    processor = copy.deepcopy(FAMILIES["llava"]())
    processor.__class__ = Silent
    with pytest.raises(
        UserError, match="Silent has no `replace_image_token`, and its token ids do not show the text of an image"
    ):
        image_replacements(processor, [(8, 8)])


def _sample(pictures: list[Path], *turns: str) -> Sample:
    images = [{"type": "image", "image": path} for path in pictures]
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": [*([] if number else images), {"type": "text", "text": text}]}
        for number, text in enumerate(turns)
    ]
    return Sample("rows.json[3]", messages)


@pytest.mark.parametrize("supervise", ["all", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_as_long_as_it_is_encoded(media: Path, name: str, supervise: Any) -> None:
    processor = FAMILIES[name]()
    turns = ("what is it?\n\n", "a cat") if name == "paligemma" else ("what is it?\n\n", "a cat", "sure?", "yes, two dogs")
    for pictures in ([media / "a.png"], [media / "b.png", media / "a.png"]):
        sample = _sample(pictures, *turns)
        counts, encoded = count_tokens(sample, processor, supervise), encode_sample(sample, processor, supervise=supervise)
        assert counts.tokens == encoded["input_ids"].shape[1]
        assert counts.supervised == int((encoded["labels"] != -100).sum())
        assert counts.images == len(pictures)
        assert 0 < counts.media_tokens < counts.tokens - counts.supervised


def test_a_sample_without_images_has_no_media_tokens(media: Path) -> None:
    sample = _sample([], "what?", "yes")
    encoded = encode_sample(sample, FAMILIES["qwen2_vl"]())
    counts = count_tokens(sample, FAMILIES["qwen2_vl"]())
    assert counts == Counts(encoded["input_ids"].shape[1], 0, int((encoded["labels"] != -100).sum()), 0)


def test_an_image_that_the_processor_rejects_is_the_same_row_error_in_counting_and_encoding(media: Path) -> None:
    Image.new("RGB", (900, 2)).save(media / "line.png")
    sample = _sample([media / "line.png"], "what?", "a line")
    errors = []
    for does in (count_tokens, encode_sample):
        with pytest.raises(RowError) as refused:
            does(sample, FAMILIES["qwen2_vl"]())
        errors.append((refused.value.row, refused.value.field, refused.value.detail))
    refusal = "Qwen2VLProcessor rejects the sample's images: absolute aspect ratio must be smaller than 200, got 450.0"
    assert errors[0] == errors[1] == ("rows.json[3]", "image", refusal)


def test_an_image_without_a_header_is_rejected_by_row(media: Path) -> None:
    (media / "a.png").write_bytes(b"no image")
    with pytest.raises(RowError, match=r"rows\.json\[3\]: image: "):
        count_tokens(_sample([media / "a.png"], "what?", "yes"), FAMILIES["llava"]())
