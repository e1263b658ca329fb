"""Families that split an image into tiles."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, SENTENCEPIECE, VISION, TinyBase, text_sizes, tiny_tokenizer, token_id
from mmtune.models.tiny.tiny_templates import TEMPLATES

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


# ---- Molmo 2


def _molmo2() -> ProcessorMixin:
    import transformers as tf

    tokenizer = tiny_tokenizer(CHATML_TOKENS, bos="<|im_end|>", eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False)
    markers = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>", "<frame_start>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers, "<frame_end>", "<|video|>"]})
    images = tf.Molmo2ImageProcessor(size={"height": 42, "width": 42}, max_crops=4, overlap_margins=[1, 1], patch_size=7)
    return tf.Molmo2Processor(images, tf.Molmo2VideoProcessor(size={"height": 42, "width": 42}, patch_size=7), tokenizer)


def _molmo2_config(processor: Any) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    words = token_id(processor, "<im_start>")  # the markers have further rows of embeddings
    text = {**text_sizes(processor.tokenizer), "vocab_size": words, "additional_vocab_size": 16}
    return AutoConfig.for_model(
        "molmo2",
        vision_config={**vision, "num_hidden_layers": 2, "image_size": [42, 42], "patch_size": 7},
        adapter_config={**vision, "vision_feature_layer": [-1, -2], "text_hidden_size": 64},
        text_config=text,
        image_start_token_id=words,
        image_end_token_id=token_id(processor, "<im_end>"),
        image_patch_id=token_id(processor, "<im_patch>"),
        low_res_image_start_token_id=token_id(processor, "<low_res_im_start>"),
        frame_start_token_id=token_id(processor, "<frame_start>"),
        frame_end_token_id=token_id(processor, "<frame_end>"),
    )


# ---- Step 3.7


def _step3p7() -> ProcessorMixin:
    import transformers as tf

    markers = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
    images = tf.Step3p7ImageProcessor(size={"height": 56, "width": 56}, patch_size=TILE, vision_patch_size=7)
    return tf.Step3p7Processor(images, tiny_tokenizer((*CHATML_TOKENS, *markers), **CHATML))


def _step3p7_config(processor: Any) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "mlp_ratio": 2.0, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
    text = {**text_sizes(processor.tokenizer), "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    text |= {"mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    return AutoConfig.for_model(
        "step3p7",
        vision_config={**vision, "patch_size": 7, "max_position_embeddings": 64},
        text_config={
            **text,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
            "eos_token_id": processor.tokenizer.eos_token_id,
        },
        image_token_id=processor.image_token_id,
    )


# ---- Perception LM


def _perception_lm() -> ProcessorMixin:
    import transformers as tf

    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
    names = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>", "adds_bos": False}
    tokenizer = tiny_tokenizer(specials, {"image_token": "<|image|>", "video_token": "<|video|>"}, **names)
    images = tf.PerceptionLMImageProcessor(tile_size=TILE, max_num_tiles=4)
    video = tf.PerceptionLMVideoProcessor(size={"height": TILE, "width": TILE})
    return tf.PerceptionLMProcessor(video, images, tokenizer, patch_size=7, pooling_ratio=2)


def _perception_lm_config(processor: Any) -> PreTrainedConfig:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [TILE, TILE], "patch_size": 7, "global_pool": ""}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_lang_large_patch14_448", "do_pooling": False}
    return AutoConfig.for_model(
        "perception_lm",
        vision_config={**vision, "num_classes": 0, "model_args": {**sizes, "ref_feat_shape": [4, 4]}},
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
    )


_LLAMA3 = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_LLAMA3_ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"


# ---- Aria


def _aria() -> ProcessorMixin:
    import transformers as tf

    specials = ("<unk>", "<s>", "</s>", *CHATML_TOKENS, "<fim_prefix>", "<fim_suffix>")
    tokenizer = tiny_tokenizer(specials, {"image_token": "<|img|>"}, pad="<unk>", eos="<|im_end|>", unk="<unk>")
    return tf.AriaProcessor(tf.AriaImageProcessor(), tokenizer, size_conversion={980: 4})


def _aria_config(processor: Any) -> PreTrainedConfig:
    # The image processor knows sizes of 490 and 980 pixels only.
    vision = {"model_type": "idefics3_vision", **VISION, "num_hidden_layers": 2, "image_size": 980, "patch_size": 140}
    text = {"model_type": "aria_text", **text_sizes(processor.tokenizer), "moe_num_experts": 4, "moe_num_shared_experts": 1}
    return AutoConfig.for_model(
        "aria",
        vision_config=vision,
        text_config={**text, "moe_topk": 2},
        image_token_index=processor.image_token_id,
        projector_patch_to_query_dict={49: 4},
        tie_word_embeddings=False,
    )


# ---- Llama 4


def _llama4() -> ProcessorMixin:
    import transformers as tf

    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>")
    specials += ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
    names = {"bos": "<|begin_of_text|>", "eos": "<|eot|>", "pad": "<|finetune_right_pad|>"}
    images = tf.Llama4ImageProcessor(size={"height": TILE, "width": TILE}, max_patches=4)
    return tf.Llama4Processor(images, tiny_tokenizer((*specials, "<|finetune_right_pad|>"), **names), patch_size=7)


def _llama4_config(processor: Any) -> PreTrainedConfig:
    vision = {**VISION, "num_hidden_layers": 2, "image_size": TILE, "patch_size": 7, "intermediate_size": 256}
    vision |= {"vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48}
    text = {**text_sizes(processor.tokenizer), "intermediate_size_mlp": 128, "num_local_experts": 4}
    # one layer of experts and one dense; one with chunked attention and one without positions
    text |= {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 64}
    return AutoConfig.for_model(
        "llama4",
        vision_config=vision,
        text_config=text,
        image_token_index=token_id(processor, "<|patch|>"),
        boi_token_index=token_id(processor, "<|image_start|>"),
        eoi_token_index=token_id(processor, "<|image_end|>"),
    )


_LLAMA4_TEMPLATE = turns(
    "<|image|>",
    "'<|header_start|>' + m.role + '<|header_end|>\\n\\n'",
    "<|eot|>",
    "<|header_start|>assistant<|header_end|>\\n\\n",
    "{{ bos_token }}",
)


# ---- LLaVA-NeXT-Video and Granite 4 Vision, with LLaVA-NeXT's tiles


_PINPOINTS = [[TILE * h, TILE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
_NEXT_SIZES = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": _PINPOINTS}


def _llava_next_video() -> ProcessorMixin:
    import transformers as tf

    specials = ("<unk>", "<s>", "</s>", "<pad>")
    named = {"image_token": "<image>", "video_token": "<video>"}
    return tf.LlavaNextVideoProcessor(
        tf.LlavaNextVideoVideoProcessor(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}),
        tf.LlavaNextImageProcessor(**_NEXT_SIZES),
        tiny_tokenizer(specials, named, pad="<pad>", **SENTENCEPIECE),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next_video_config(processor: Any) -> PreTrainedConfig:
    vision = {**VISION, "image_size": TILE, "patch_size": 7, "projection_dim": 32}
    return AutoConfig.for_model(
        "llava_next_video",
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        image_token_index=token_id(processor, "<image>"),
        video_token_index=token_id(processor, "<video>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


GRANITE_TOKENS = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>")
GRANITE_NAMES = {"bos": "<|end_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>", "adds_bos": False}


def granite_template(image: str) -> str:
    role = "'<|start_of_role|>' + m.role + '<|end_of_role|>'"
    return turns(image, role, "<|end_of_text|>\\n", "<|start_of_role|>assistant<|end_of_role|>")


def _granite4_vision() -> ProcessorMixin:
    import transformers as tf

    return tf.Granite4VisionProcessor(
        tf.LlavaNextImageProcessor(**_NEXT_SIZES),
        tiny_tokenizer(GRANITE_TOKENS, {"image_token": "<image>"}, **GRANITE_NAMES),
        patch_size=7,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
    )


def _granite4_vision_config(processor: Any) -> PreTrainedConfig:
    text = {**text_sizes(processor.tokenizer), "num_hidden_layers": 6, "attention_multiplier": 0.25}
    qformer = {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64, "cross_attention_frequency": 1}
    qformer |= {"use_qformer_text_input": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.for_model(
        "granite4_vision",
        vision_config=SIGLIP,
        text_config=text,
        qformer_config={**qformer, "vocab_size": 64, "max_position_embeddings": 64},
        image_token_index=token_id(processor, "<image>"),
        vision_feature_select_strategy="full",
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=4,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
        projector_dropout=0.0,  # random numbers would differ between two runs
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
    "step3p7": FamilyCase(TinyBase(_step3p7, _step3p7_config, template=chatml("<im_patch>")), unpredictable=True),
    "molmo2": FamilyCase(TinyBase(_molmo2, _molmo2_config, template=chatml("<|image|>"))),
    "perception_lm": FamilyCase(
        TinyBase(
            _perception_lm,
            _perception_lm_config,
            template=turns("<|image|>", _LLAMA3, "<|eot_id|>", _LLAMA3_ASK, "{{ bos_token }}"),
        ),
        "<|eot_id|>",
    ),
    "aria": FamilyCase(TinyBase(_aria, _aria_config, template=chatml("<fim_prefix><|img|><fim_suffix>"))),
    "llama4": FamilyCase(TinyBase(_llama4, _llama4_config, template=_LLAMA4_TEMPLATE), "<|eot|>"),
    "llava_next_video": FamilyCase(
        TinyBase(_llava_next_video, _llava_next_video_config, template=TEMPLATES["llava"], required_template="vicuna_v1"),
        "</s>",
        " ",
    ),
    "granite4_vision": FamilyCase(
        TinyBase(_granite4_vision, _granite4_vision_config, template=granite_template("<image>\\n")), "<|end_of_text|>"
    ),
}
