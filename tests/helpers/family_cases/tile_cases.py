"""Families that split an image into tiles."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, VISION, TinyBase, text_sizes, tiny_tokenizer, token_id

TILE = 28
"""Pixels of a tile's edge; the towers see patches of 7 pixels, and merge two by two of them to one token."""
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    **VISION,
    "num_hidden_layers": 2,
    "image_size": TILE,
    "patch_size": 7,
    "vision_use_head": False,
}
CHATML = {"pad": "<|endoftext|>", "eos": "<|im_end|>"}


def parts(image: str) -> str:
    """Jinja that writes the blocks of a message `m`, an image as the given text."""
    return "{% for b in m.content %}{{ b.text if b.type == 'text' else '" + image + "' }}{% endfor %}"


def turns(image: str, start: str, end: str, ask: str, head: str = "") -> str:
    """A chat template with the same text around every turn; `start` is a Jinja expression."""
    return (
        head
        + "{% for m in messages %}{{ "
        + start
        + " }}"
        + parts(image)
        + "{{ '"
        + end
        + "' }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + ask
        + "' }}{% endif %}"
    )


def chatml(image: str, head: str = "", ask: str = "<|im_start|>assistant\\n") -> str:
    return turns(image, "'<|im_start|>' + m.role + '\\n'", "<|im_end|>\\n", ask, head)


# ---- Cohere


_COHERE_TOKENS = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
_COHERE_TOKENS += ("<|CHATBOT_TOKEN|>", "<PAD>", "<UNK>")
_COHERE_NAMES = {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>", "unk": "<UNK>"}


def _cohere_template(image: str, opens: str, closes: str) -> str:
    return (
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}{% if m.role == 'assistant' %}"
        "{{ '<|CHATBOT_TOKEN|>" + opens + "' + m.content[0].text + '" + closes + "' }}{% else %}"
        "{{ '<|USER_TOKEN|>' if m.role == 'user' else '<|SYSTEM_TOKEN|>' }}" + parts(image) + "{% endif %}"
        "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" + opens + "' }}{% endif %}"
    )


def _cohere2_vision() -> ProcessorMixin:
    import transformers as tf

    named = {"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>"}
    named |= {"img_line_break_token": "<|IMG_LINE_BREAK|>"}
    tokenizer = tiny_tokenizer((*_COHERE_TOKENS, "<|START_RESPONSE|>", "<|END_RESPONSE|>"), named, **_COHERE_NAMES)
    images = tf.Cohere2VisionImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4, patch_size=2)
    return tf.Cohere2VisionProcessor(images, tokenizer)


def _cohere_text(processor: Any) -> dict[str, Any]:
    layers = ["sliding_attention", "full_attention"]
    sizes = text_sizes(processor.tokenizer)
    return {"model_type": "cohere2", **sizes, "layer_types": layers, "sliding_window": 64, "tie_word_embeddings": True}


def _cohere2_vision_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "cohere2_vision",
        vision_config=SIGLIP,
        text_config=_cohere_text(processor),
        image_token_id=token_id(processor, "<|IMG_PATCH|>"),
        alignment_intermediate_size=128,
    )


def _aya_vision() -> ProcessorMixin:
    import transformers as tf

    specials = (*_COHERE_TOKENS, "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>")
    tokenizer = tiny_tokenizer((*specials, "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"), **_COHERE_NAMES)
    images = tf.GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4)
    return tf.AyaVisionProcessor(images, tokenizer, patch_size=7, img_size=TILE, downsample_factor=2)


def _aya_vision_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "aya_vision",
        vision_config=SIGLIP,
        text_config=_cohere_text(processor),
        image_token_index=token_id(processor, "<|IMG_PATCH|>"),
    )


# ---- LFM2-VL


def _lfm2_vl() -> ProcessorMixin:
    import transformers as tf

    grid = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))
    named = {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
    named |= {"image_thumbnail_token": "<|img_thumbnail|>"}
    specials = ("<|pad|>", "<|startoftext|>", *CHATML_TOKENS, *grid)
    tokenizer = tiny_tokenizer(specials, named, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>")
    images = tf.Lfm2VlImageProcessor(encoder_patch_size=7, tile_size=TILE, min_image_tokens=2, max_image_tokens=4, max_tiles=4)
    return tf.Lfm2VlProcessor(images, tokenizer)


def _lfm2_vl_config(processor: Any) -> PreTrainedConfig:
    vision = {"model_type": "siglip2_vision_model", **VISION, "num_hidden_layers": 2, "patch_size": 7, "num_patches": 16}
    text = {"model_type": "lfm2", **text_sizes(processor.tokenizer), "layer_types": ["conv", "full_attention"]}
    return AutoConfig.for_model(
        "lfm2_vl",
        vision_config={**vision, "vision_use_head": False},
        text_config={**text, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
        image_token_id=token_id(processor, "<image>"),
        projector_hidden_size=64,
    )


# ---- Ovis 2


_OVIS = ("<image>", "<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def _ovis2() -> ProcessorMixin:
    import transformers as tf

    images = tf.Ovis2ImageProcessor(size={"height": TILE, "width": TILE}, crop_to_patches=True, max_patches=4)
    return tf.Ovis2Processor(images, tiny_tokenizer((*CHATML_TOKENS, *_OVIS), **CHATML), image_seq_length=4)


def _ovis2_config(processor: Any) -> PreTrainedConfig:
    vision = {**VISION, "num_hidden_layers": 2, "image_size": TILE, "patch_size": 7, "hidden_stride": 2, "vocab_size": 96}
    return AutoConfig.for_model(
        "ovis2",
        vision_config=vision,
        text_config={"model_type": "qwen2", **text_sizes(processor.tokenizer)},
        image_token_id=token_id(processor, "<IMG_ATOM>"),
        visual_indicator_token_ids=[token_id(processor, token) for token in _OVIS[2:]],
        vocab_size=text_sizes(processor.tokenizer)["vocab_size"],
        hidden_size=64,
        tie_word_embeddings=False,
    )


_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"

TILE_CASES: dict[str, FamilyCase] = {
    "cohere2_vision": FamilyCase(
        TinyBase(
            _cohere2_vision,
            _cohere2_vision_config,
            template=_cohere_template("<|IMG_PATCH|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        "<|END_RESPONSE|>",
    ),
    "aya_vision": FamilyCase(
        TinyBase(_aya_vision, _aya_vision_config, template=_cohere_template("<image>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")),
        "<|END_RESPONSE|>",
    ),
    "lfm2_vl": FamilyCase(TinyBase(_lfm2_vl, _lfm2_vl_config, template=chatml("<image>", "{{ bos_token }}"))),
    "ovis2": FamilyCase(TinyBase(_ovis2, _ovis2_config, template=chatml("<image>\\n", _SYSTEM))),
}
