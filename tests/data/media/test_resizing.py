"""Long and narrow images: the resized size is limited before any pixel is decoded, and the error names the row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from family_processors import FAMILIES
from PIL import Image

from mmtune.data.encoding.encode import encode_prompt, encode_sample
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.media.media import EmbeddedMedia
from mmtune.data.media.resizing import MAX_RESIZED, check_resized
from mmtune.data.message import RowError, Sample


def _sample(size: tuple[int, int]) -> Sample:
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    image = {"type": "image", "image": EmbeddedMedia(Path("rows"), "long.png", data=file.getvalue())}
    ask = {"role": "user", "content": [image, {"type": "text", "text": "What?"}]}
    return Sample("rows.jsonl:7", [ask, {"role": "assistant", "content": [{"type": "text", "text": "A line."}]}])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_and_narrow_image_is_counted_and_encoded_within_limits_or_rejected(family: str, size: tuple[int, int]) -> None:
    processor = FAMILIES[family]()
    outcomes: list[Any] = []
    for outcome in (lambda s: count_tokens(s, processor).tokens, lambda s: encode_sample(s, processor)["input_ids"].shape[1]):
        try:
            outcomes.append(outcome(_sample(size)))
        except RowError as error:
            assert error.row == "rows.jsonl:7" and error.issue == "image_refused"
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_the_error_has_the_size_after_resizing() -> None:
    """The 5,000,000 x 1 of a file of 685 bytes would be 1.6 billion pixels at the tiny base's 56."""
    processor = FAMILIES["llava"]()
    edge = processor.image_processor.size["shortest_edge"]
    message = rf"^expected at most .* after resizing, got {100_000 * edge} x {edge} for an image of 100000 x 1"
    with pytest.raises(ValueError, match=message):
        check_resized(processor, [(10, 10), (100_000, 1)])
    with pytest.raises(RowError, match=r"^rows\.jsonl:7: image: LlavaProcessor rejects .* for an image of 1 x 100000"):
        encode_prompt("rows.jsonl:7", _sample((1, 100_000)).messages[:1], processor)


def test_the_bound_is_on_the_size_after_resizing() -> None:
    """At the largest aspect ratio that passes, the real processor's resized image has no more pixels than the bound."""
    images = tf.CLIPImageProcessor(size={"shortest_edge": 336}, do_center_crop=False)
    processor = FAMILIES["llava"]()
    own = tf.LlavaProcessor(images, processor.tokenizer, patch_size=14, vision_feature_select_strategy="default")
    most = MAX_RESIZED // 336**2
    check_resized(own, [(most, 1), (1, most), (3000 * most, 3000)])
    for size in ((most + 1, 1), (1, most + 1), (3000 * (most + 1), 3000)):
        with pytest.raises(ValueError, match="expected at most 16777216 pixels after resizing"):
            check_resized(own, [size])
    small = tf.CLIPImageProcessor(size={"shortest_edge": 8}, do_center_crop=False)(Image.new("RGB", (most, 1)))["pixel_values"][0]
    assert small.shape[-2:] == (8, 8 * most) and 336**2 * most <= MAX_RESIZED
