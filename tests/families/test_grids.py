"""Families with a grid of patches: packing with positions of several parts, and the types of image tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from family_cases.grid_cases import GRID_CASES
from PIL import Image

from mmtune.chat_templates.resolving import resolve_chat_template
from mmtune.data.batching.collate import collate, pack
from mmtune.data.encoding.encode import encode_sample
from mmtune.data.media.media import EmbeddedMedia
from mmtune.data.message import Sample
from mmtune.models.compute import prepare_computation
from mmtune.models.packed_attention import check_packable_family, verify_packing
from mmtune.models.tiny.tiny_bases import write_tiny_base
from mmtune.utils.errors import UserError


def _image(size: tuple[int, int]) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return {"type": "image", "image": EmbeddedMedia(Path("test"), "red", data=file.getvalue())}


def _samples(family: str, processor: Any) -> list[dict[str, torch.Tensor]]:
    """Encoded conversations with two images, one image and none."""
    case = GRID_CASES[family].base
    processor.chat_template = case.template
    if case.required_template is not None:
        processor.chat_template = resolve_chat_template(
            case.required_template, processor.tokenizer, image_token=processor.image_token
        )
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes, it is"}]}
    question = {"type": "text", "text": "Is it?"}
    images = [[_image((90, 70)), _image((40, 120))], [_image((200, 60))], []]
    rows = [[{"role": "user", "content": [*each, question]}, answer] for each in images]
    return [encode_sample(Sample(str(number), row), processor) for number, row in enumerate(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4v", "paddleocr_vl", "qwen2_5_omni_thinker", "ernie4_5_vl_moe", "cosmos3_edge"])
def test_packed_samples_have_the_logits_of_single_samples(family: str, tmp_path: Path) -> None:
    base = write_tiny_base(GRID_CASES[family].base, tmp_path)
    processor = tf.AutoProcessor.from_pretrained(base)
    encoded = _samples(family, processor)
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    prepare_computation(model)
    check_packable_family(model.config)
    singles = [collate([sample], processor.tokenizer.pad_token_id) for sample in encoded]
    verify_packing(model, pack(encoded), singles)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("qwen3_5", "linear_attention"), ("qwen3_5_moe", "linear_attention"), ("inkling2", "hybrid, hybrid_sliding")],
)
def test_recurrent_layers_are_not_packed(family: str, layers: str) -> None:
    case = GRID_CASES[family].base
    with pytest.raises(UserError, match=f"packing is not supported: {family} has {layers} layers, whose state continues"):
        check_packable_family(case.config(case.processor()))


def test_the_experts_for_vision_take_the_tokens_of_images_and_their_marks() -> None:
    processor = GRID_CASES["ernie4_5_vl_moe"].base.processor()
    two, _, none = _samples("ernie4_5_vl_moe", processor)
    tokens = processor.tokenizer.convert_ids_to_tokens(two["input_ids"][0, two["moe_mm_token_type_ids"][0] == 1].tolist())
    assert set(tokens) == {"<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"}
    assert not none["moe_mm_token_type_ids"].any()
