"""Families that read documents in tiles, most with a tower of SAM's kind."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from family_cases.tile_cases import (
    CHATML,
    GRANITE_NAMES,
    GRANITE_TOKENS,
    TILE,
    chatml,
    granite_template,
    turns,
)
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, VISION, TinyBase, text_sizes, tiny_tokenizer

# ---- GOT-OCR 2: always 256 tokens for an image, which are a grid of 64 x 64 patches after two strides of two

_SAM: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64}
_SAM |= {"output_channels": 32, "window_size": 14, "global_attn_indexes": [1], "initializer_range": 0.02}
_WINDOWED = {**_SAM, "global_attn_indexes": []}  # for 64 x 64 patches: attention between all of them takes most of a test


def _got_ocr2() -> ProcessorMixin:
    import transformers as tf

    tokenizer = tiny_tokenizer((*CHATML_TOKENS, "<img>", "</img>", "<imgpad>"), **CHATML)
    return tf.GotOcr2Processor(tf.GotOcr2ImageProcessor(size={"height": 128, "width": 128}), tokenizer)


def _got_ocr2_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "got_ocr2",
        vision_config={**_WINDOWED, "image_size": 128, "patch_size": 2},
        text_config={"model_type": "qwen2", **text_sizes(processor.tokenizer), "tie_word_embeddings": True},
        image_token_index=processor.image_token_id,
    )


_GOT_SYSTEM = "You should follow the instructions carefully and explain your answers in detail."
_GOT_TEMPLATE = turns(
    "<img><imgpad></img>\\n",
    "'<|im_start|>' + m.role + '\\n'",
    "<|im_end|>",
    "<|im_start|>assistant\\n",
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n" + _GOT_SYSTEM + "<|im_end|>' }}{% endif %}",
)

# ---- Granite Docling


def _granite_docling() -> ProcessorMixin:
    import transformers as tf

    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    specials = (*GRANITE_TOKENS, "<fake_token_around_image>", "<global-img>", *grid)
    images = tf.GraniteDoclingImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4)
    tokenizer = tiny_tokenizer(specials, {"image_token": "<image>"}, **GRANITE_NAMES)
    return tf.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4)


def _granite_docling_config(processor: Any) -> PreTrainedConfig:
    vision = {**VISION, "num_hidden_layers": 2, "image_size": TILE, "patch_size": 7, "out_hidden_size": 64, "scale_factor": 2}
    text = {**text_sizes(processor.tokenizer), "tie_word_embeddings": True, "attention_multiplier": 0.25}
    return AutoConfig.for_model(
        "granite_docling",
        vision_config={**vision, "deepstack_visual_indexes": [0], "use_fine_route": False},
        text_config=text,
        image_token_id=processor.image_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


# ---- Qianfan-OCR: InternVL's tiles, with another placeholder


def _qianfan_ocr() -> ProcessorMixin:
    import transformers as tf

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    images = tf.GotOcr2ImageProcessor(size={"height": TILE, "width": TILE}, min_patches=1, max_patches=4)
    return tf.QianfanOCRProcessor(images, tiny_tokenizer((*CHATML_TOKENS, "<image>"), named, **CHATML), image_seq_length=4)


def _qianfan_ocr_config(processor: Any) -> PreTrainedConfig:
    vision = {**VISION, "num_hidden_layers": 2, "image_size": [TILE, TILE], "patch_size": [7, 7]}
    return AutoConfig.for_model(
        "qianfan_ocr",
        vision_config={**vision, "drop_path_rate": 0.0},  # random numbers would differ between two runs
        text_config={"model_type": "qwen3", **text_sizes(processor.tokenizer)},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )


# ---- DeepSeek-OCR 2: views of 12 x 12 and of 16 x 16 tokens, which are 16 times as many patches


def _ocr_processor(kind: str, images: str, patch: int, **settings: Any) -> ProcessorMixin:
    import transformers as tf

    names = {
        "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "pad": "<\uff5c\u2581pad\u2581\uff5c>",
    }
    tokenizer = tiny_tokenizer((*names.values(), "<image>"), **names)
    processor: ProcessorMixin = getattr(tf, kind)(getattr(tf, images)(**settings), tokenizer, patch_size=patch)
    return processor


def _deepseek_ocr2_config(processor: Any) -> PreTrainedConfig:
    sam = {**_WINDOWED, "image_size": 64, "patch_size": 1, "downsample_channels": [32, 64]}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**text_sizes(processor.tokenizer), "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"]}
    return AutoConfig.for_model(
        "deepseek_ocr2",
        vision_config={"sam_config": sam, "encoder_config": {**sizes, "num_key_value_heads": 2}},
        text_config=text,
        image_token_id=processor.image_token_id,
    )


def _unlimited_ocr_config(processor: Any) -> PreTrainedConfig:
    sam = {**_SAM, "image_size": 64, "patch_size": 4, "downsample_channels": [32, 32]}
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**text_sizes(processor.tokenizer), "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"]}
    return AutoConfig.for_model(
        "unlimited_ocr",
        vision_config={"sam_config": sam, "encoder_config": {**encoder, "image_size": 28, "patch_size": 7}},
        text_config=text,
        image_token_id=processor.image_token_id,
    )


_OCR_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>\\n' }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% elif m.role == 'user' %}{{ '\\n' }}{% endif %}{% endfor %}"
)

DOCUMENT_CASES: dict[str, FamilyCase] = {
    "got_ocr2": FamilyCase(
        TinyBase(_got_ocr2, _got_ocr2_config), needs_image=True, flat_images=True, template_file=_GOT_TEMPLATE
    ),
    "granite_docling": FamilyCase(
        TinyBase(_granite_docling, _granite_docling_config, template=granite_template("<image>")), "<|end_of_text|>"
    ),
    "qianfan_ocr": FamilyCase(TinyBase(_qianfan_ocr, _qianfan_ocr_config, template=chatml("<image>\\n"))),
    "deepseek_ocr2": FamilyCase(
        TinyBase(
            lambda: _ocr_processor(
                "DeepseekOcr2Processor", "DeepseekOcr2ImageProcessor", 1, size={"height": 64, "width": 64}, tile_size=48
            ),
            _deepseek_ocr2_config,
            template=_OCR_TEMPLATE,
        ),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "unlimited_ocr": FamilyCase(
        TinyBase(
            lambda: _ocr_processor(
                "UnlimitedOcrProcessor",
                "UnlimitedOcrImageProcessor",
                4,
                size={"height": 64, "width": 64},
                tile_size=32,
                max_patches=4,
            ),
            _unlimited_ocr_config,
            template=_OCR_TEMPLATE,
        ),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        lists=("num_local_patches", "patches_grid"),
    ),
}
