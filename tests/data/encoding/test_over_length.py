"""Samples over the length limit: dropped or resized media, and an encoded length equal to the counted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_processors import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.encoding.encode import OverLength, encode_sample
from mmtune.data.encoding.over_length import SMALLEST_EDGE, FittedSample, drop_image, fit_to_budget, resize_images
from mmtune.data.encoding.token_counts import Size, count_tokens, image_replacements
from mmtune.data.message import RowError, Sample

torch.set_num_threads(1)

SHRINKS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "llava_next", "llava_onevision", "internvl")
"""Families in which a smaller image may take fewer tokens."""
FIXED = ("llava", "gemma3", "paligemma", "idefics3", "smolvlm")
"""Families in which it never does: the image processor has one size, or enlarges every image to one longest edge."""


@pytest.fixture
def pictures(media: Path) -> dict[str, Path]:
    """`large` (300 x 240), `wide` (400 x 60) and the two of the same size, `small` and `twin` (90 x 90)."""
    sizes = {"large": (300, 240), "wide": (400, 60), "small": (90, 90), "twin": (90, 90)}
    for name, size in sizes.items():
        Image.new("RGB", size, "teal").save(media / f"{name}.png")
    return {name: media / f"{name}.png" for name in sizes}


def _sample(*turns: list[Any]) -> Sample:
    """From the user on; paths are images and strings are text."""
    messages = []
    for number, turn in enumerate(turns):
        content = [{"type": "text", "text": b} if isinstance(b, str) else {"type": "image", "image": b} for b in turn]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return Sample("rows.json[3]", messages)


def _length(processor: Any, sample: Sample) -> int:
    """By encoding it, pixels and all."""
    return int(encode_sample(sample, processor)["input_ids"].shape[1])


def _media_tokens(processor: Any, sizes: list[Size]) -> int:
    texts = image_replacements(processor, sizes)
    return sum(len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _names(fitted: FittedSample) -> list[str]:
    return [path.stem for path in map(Path, fitted.sample.images)]


def _answers(sample: Sample) -> list[Any]:
    return [message["content"] for message in sample.messages if message["role"] == "assistant"]


@pytest.mark.parametrize("policy", ["error", "drop_sample", "drop_media", "shrink_media"])
def test_a_sample_that_fits_is_unchanged(pictures: dict[str, Path], policy: Any) -> None:
    processor, sample = FAMILIES["qwen2_vl"](), _sample([pictures["large"], "what?"], ["a wall"])
    counts = count_tokens(sample, processor)
    for limit in (counts.tokens, None):
        assert fit_to_budget(sample, processor, limit, policy) == FittedSample(sample, counts)


@pytest.mark.parametrize("policy", ["error", "drop_sample"])
def test_a_long_sample_is_rejected_with_the_encoders_message(pictures: dict[str, Path], policy: Any) -> None:
    processor, sample = FAMILIES["qwen2_vl"](), _sample([pictures["large"], "what?"], ["a wall"])
    limit = count_tokens(sample, processor).tokens - 1
    with pytest.raises(OverLength) as counted:
        fit_to_budget(sample, processor, limit, policy)
    with pytest.raises(OverLength) as encoded:
        encode_sample(sample, processor, limit)
    assert str(counted.value) == str(encoded.value)


# ---- fewer images


def test_the_largest_image_is_dropped_first_and_only_as_many_as_needed(pictures: dict[str, Path]) -> None:
    processor = FAMILIES["qwen2_vl"]()
    sample = _sample([pictures["small"], pictures["large"], pictures["wide"], "which?"], ["the last"])
    whole = count_tokens(sample, processor).tokens
    fitted = fit_to_budget(sample, processor, whole - 1, "drop_media")
    assert (_names(fitted), fitted.dropped, fitted.resized) == (["small", "wide"], 1, 0)
    assert fitted.counts.tokens == _length(processor, fitted.sample) < whole
    assert _answers(fitted.sample) == _answers(sample)
    assert _names(fit_to_budget(sample, processor, fitted.counts.tokens - 1, "drop_media")) == ["small"]


def test_among_equal_images_the_last_of_the_earliest_turn_is_dropped_first(pictures: dict[str, Path]) -> None:
    processor, small, twin = FAMILIES["llava"](), pictures["small"], pictures["twin"]
    sample = _sample([small, twin, "what?"], ["a"], [small, "and this?"], ["b"])
    limit = count_tokens(sample, processor).tokens - 1
    images = []
    for _ in range(3):
        fitted = fit_to_budget(sample, processor, limit, "drop_media")
        images.append(
            [[Path(b["image"]).stem for b in m["content"] if b["type"] == "image"] for m in fitted.sample.messages[::2]]
        )
        limit = fitted.counts.tokens - 1
    assert images == [[["small"], ["small"]], [[], ["small"]], [[], []]]


def test_words_around_a_dropped_image_remain_separate(pictures: dict[str, Path]) -> None:
    messages = _sample(["look", pictures["small"], "at this"], ["yes"]).messages
    assert drop_image(messages, (0, 1))[0]["content"] == [{"type": "text", "text": "look\nat this"}]
    messages = _sample(["look ", pictures["small"], "at this"], ["yes"]).messages
    assert drop_image(messages, (0, 1))[0]["content"] == [{"type": "text", "text": "look at this"}]
    assert len(messages[0]["content"]) == 3  # the given ones stay whole


def test_a_sample_is_dropped_if_an_image_is_a_whole_turn(pictures: dict[str, Path]) -> None:
    processor, sample = FAMILIES["qwen2_vl"](), _sample([pictures["large"]], ["a wall"])
    limit = count_tokens(sample, processor).tokens - 1
    with pytest.raises(OverLength, match=rf"{limit + 1} tokens, more than data\.max_tokens: {limit}$"):
        fit_to_budget(sample, processor, limit, "drop_media")


def test_a_sample_too_long_without_its_images_is_dropped(pictures: dict[str, Path]) -> None:
    processor, sample = FAMILIES["qwen2_vl"](), _sample([pictures["small"], "what? " * 20], ["a wall"])
    bare = count_tokens(_sample(["what? " * 20], ["a wall"]), processor).tokens
    assert fit_to_budget(sample, processor, bare, "drop_media").counts.tokens == bare
    with pytest.raises(OverLength, match=f"and {bare} without the images that could be dropped"):
        fit_to_budget(sample, processor, bare - 1, "drop_media")


def test_an_image_with_more_tokens_when_alone_is_counted_correctly(pictures: dict[str, Path]) -> None:
    processor = FAMILIES["llava_onevision"]()  # tiles an image that is alone in its sample
    sample = _sample([pictures["small"], pictures["twin"], "what?"], ["a wall"])
    whole = count_tokens(sample, processor).tokens
    fitted = fit_to_budget(sample, processor, whole - 1, "drop_media")
    assert fitted.dropped == 2
    assert fitted.counts.tokens == _length(processor, fitted.sample) < whole


# ---- smaller images


@pytest.mark.parametrize("name", SHRINKS)
def test_images_shrink_until_they_fit_and_are_encoded_to_that_length(pictures: dict[str, Path], name: str) -> None:
    processor = FAMILIES[name]()
    sample = _sample([pictures["large"], pictures["wide"], "which?\n"], ["the last"])
    if name == "llava_onevision":  # of several images each has one tile
        sample = _sample([pictures["large"], "what?\n"], ["a wall"])
    counts = count_tokens(sample, processor)
    fitted = fit_to_budget(sample, processor, counts.tokens - 1, "shrink_media")
    assert fitted.resized and not fitted.dropped
    assert fitted.counts.tokens == _length(processor, fitted.sample) < counts.tokens
    assert _answers(fitted.sample) == _answers(sample)
    assert fitted.sample.images == sample.images


@pytest.mark.parametrize("name", FIXED)
def test_a_sample_is_dropped_if_image_size_has_no_effect(pictures: dict[str, Path], name: str) -> None:
    processor, sample = FAMILIES[name](), _sample([pictures["large"], "what?"], ["a wall"])
    limit = count_tokens(sample, processor).tokens - 1
    with pytest.raises(OverLength, match="resizing its images does not make it fit"):
        fit_to_budget(sample, processor, limit, "shrink_media")
    assert resize_images([(300, 240)], processor, _media_tokens(processor, [(300, 240)]) - 1) is None


def test_the_largest_images_are_resized_first_and_only_as_far_as_needed() -> None:
    processor = FAMILIES["qwen2_vl"]()  # patches of 28 x 28 pixels, at most 64
    sizes = [(90, 90), (224, 224), (168, 168)]  # 9, 64 and 36 tokens
    assert _media_tokens(processor, sizes) == 109
    smaller = resize_images(sizes, processor, 108)
    assert smaller is not None and [smaller[0], smaller[2]] == [sizes[0], sizes[2]]
    assert smaller[1][0] == smaller[1][1] == 209  # 210 would still be rounded up to 8 x 8 patches
    assert _media_tokens(processor, smaller) == 9 + 49 + 36


AREA = st.integers(1, 600)


@pytest.mark.parametrize("name", SHRINKS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(st.tuples(AREA, AREA), min_size=1, max_size=3), share=st.floats(0.2, 0.95))
def test_shrunken_images_keep_their_shape_and_the_budget(name: str, sizes: list[Size], share: float) -> None:
    processor = FAMILIES[name]()
    try:
        budget = int(_media_tokens(processor, sizes) * share)
    except ValueError:  # a shape that the family refuses
        return
    smaller = resize_images(sizes, processor, budget)
    if smaller is None:
        return
    images = [Image.new("RGB", size) for size in smaller]
    text = [processor.image_token * len(images)]
    real = processor(text=text, images=[images], return_text_replacement_offsets=True)["text_replacement_offsets"][0]
    tokens = [len(processor.tokenizer(each["replacement"], add_special_tokens=False)["input_ids"]) for each in real]
    assert sum(tokens) <= budget
    for (width, height), (new_width, new_height) in zip(sizes, smaller, strict=True):
        assert new_width <= width and new_height <= height
        assert min(new_width, new_height) >= min(SMALLEST_EDGE, width, height)
        assert abs(new_width / width - new_height / height) <= 0.5 / width + 0.5 / height + 1e-9  # but for whole pixels


def test_an_unreadable_image_is_an_error_of_its_row(media: Path) -> None:
    (media / "a.png").write_bytes(b"no image")
    with pytest.raises(RowError, match=r"rows\.json\[3\]: image: "):
        fit_to_budget(_sample([media / "a.png", "what?"], ["no"]), FAMILIES["qwen2_vl"](), 10, "shrink_media")
