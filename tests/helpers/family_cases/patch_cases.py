"""Families with the grid of patches of Qwen2-VL and a tower of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from family_cases.tile_cases import CHATML, chatml, turns
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, TinyBase, text_sizes, tiny_tokenizer, token_id

_SIZES: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_PIXELS = {"min_pixels": 4 * 28**2, "max_pixels": 64 * 28**2}


def _lfm3_vl() -> ProcessorMixin:
    import transformers as tf

    specials = ("<|pad|>", "<|startoftext|>", *CHATML_TOKENS, "<|vision_start|>", "<|vision_end|>")
    named = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = tiny_tokenizer(specials, named, bos="<|startoftext|>", eos="<|im_end|>", pad="<|pad|>")
    images = tf.Qwen2VLImageProcessor(**_PIXELS, **_SIZES)
    return tf.Lfm3VlProcessor(images, tokenizer, tf.Qwen3VLVideoProcessor(**_SIZES))


def _lfm3_vl_config(processor: Any) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 1, "patch_size": 14, "layer_types": ["conv", "full_attention"]}
    text = {"model_type": "lfm3", **text_sizes(processor.tokenizer), "layer_types": ["conv", "full_attention"]}
    return AutoConfig.for_model(
        "lfm3_vl",
        vision_config=vision,
        text_config={**text, "tie_word_embeddings": True},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=token_id(processor, "<|vision_start|>"),
        vision_end_token_id=token_id(processor, "<|vision_end|>"),
        projector_hidden_size=64,
    )


# ---- Muse

_MUSE = ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|finetune_right_pad|>")
_MUSE += ("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")
_MUSE_NAMES = {"bos": "<|begin_of_text|>", "eos": "<|eot|>", "pad": "<|finetune_right_pad|>", "adds_bos": False}
_MUSE_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_MUSE_VISION |= {"pos_emb_height": 8, "pos_emb_width": 8, "layer_types": ["window_attention", "full_attention"]}
_MUSE_TEMPLATE = turns(
    "<|patch|>",
    "'<|header_start|>' + m.role + '<|header_end|>\\n\\n'",
    "<|eot|>",
    "<|header_start|>assistant<|header_end|>\\n\\n",
    "{{ bos_token }}",
)


def _muse_glimmer() -> ProcessorMixin:
    import transformers as tf

    images = tf.MuseGlimmerImageProcessor(max_image_tokens=16)
    return tf.MuseGlimmerProcessor(images, tf.MuseGlimmerVideoProcessor(), tiny_tokenizer(_MUSE, **_MUSE_NAMES))


def _muse_config(model_type: str, **settings: Any) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        text = {**text_sizes(processor.tokenizer), "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
        return AutoConfig.for_model(
            model_type,
            vision_config=_MUSE_VISION,
            text_config={**text, **settings.get("text", {})},
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            out_hidden_size=128,
            projector_hidden_size=64,
            **{name: value for name, value in settings.items() if name != "text"},
        )

    return config


def _muse_spark() -> ProcessorMixin:
    import transformers as tf

    specials = (*_MUSE, "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>")
    audio = tf.MuseSparkFeatureExtractor(samples_per_token=8)
    images, video = tf.MuseGlimmerImageProcessor(max_image_tokens=16), tf.MuseGlimmerVideoProcessor()
    return tf.MuseSparkProcessor(images, video, tiny_tokenizer(specials, **_MUSE_NAMES), audio)


def _muse_spark_config(processor: Any) -> PreTrainedConfig:
    audio = {"patch_sizes": [2, 4], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": 64}
    text = {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 32}
    settings = {"text": {**text, "mlp_layer_types": ["dense", "sparse"]}, "audio_config": audio}
    return _muse_config("muse_spark", **settings, audio_token_id=processor.audio_token_id)(processor)


# ---- Cohere Compass

_COMPASS = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
_COMPASS += ("<|CHATBOT_TOKEN|>", "<PAD>", "<UNK>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")


def _cohere_compass() -> ProcessorMixin:
    import transformers as tf

    names = {"bos": "<BOS_TOKEN>", "eos": "<|END_OF_TURN_TOKEN|>", "pad": "<PAD>", "unk": "<UNK>"}
    images = tf.CohereCompassImageProcessor(**_PIXELS, **_SIZES)
    return tf.CohereCompassProcessor(images, tiny_tokenizer(_COMPASS, **names), tf.CohereCompassVideoProcessor(**_SIZES))


def _cohere_compass_config(processor: Any) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 128, "out_hidden_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    layers = ["sliding_attention", "full_attention"]
    text = {**text_sizes(processor.tokenizer), "layer_types": layers, "sliding_window": 64, "logit_scale": 1.0}
    text |= {"rope_parameters": {"sliding_attention": rope, "full_attention": None}, "tie_word_embeddings": True}
    return AutoConfig.for_model(
        "cohere_compass",
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config=text,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )


_COMPASS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(m.role, '<|SYSTEM_TOKEN|>') }}{% for b in m.content %}"
    "{{ b.text if b.type == 'text' else '<|VISION_START|><|IMAGE_PAD|><|VISION_END|>' }}{% endfor %}{{ '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

# ---- MiniCPM-V


_MINICPM = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>"}
_MINICPM |= {"image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>"}
_MINICPM |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
_MINICPM_MARKERS = ("image_start", "image_end", "slice_start", "slice_end")
_MINICPM_IMAGES: dict[str, Any] = {"patch_size": 7, "scale_resolution": 56, "max_slice_nums": 4}
_QWEN35_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _minicpm(kind: str, images: str, video: str, **settings: Any) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        import transformers as tf

        tokenizer = tiny_tokenizer(CHATML_TOKENS, _MINICPM, **CHATML)
        sizes = {**_MINICPM_IMAGES, **settings}
        parts = {"image_processor": getattr(tf, images)(**sizes), "video_processor": getattr(tf, video)(**sizes)}
        processor: ProcessorMixin = getattr(tf, kind)(**parts, tokenizer=tokenizer)
        return processor

    return build


def _minicpm_config(model_type: str, **settings: Any) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return AutoConfig.for_model(
            model_type,
            vision_config={**sizes, "image_size": 112, "patch_size": 7},
            text_config={**text_sizes(processor.tokenizer), **_QWEN35_TEXT},
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            insert_layer_id=0,
            tie_word_embeddings=False,
            **settings,
        )

    return config


def _minicpmv4_7_config(processor: Any) -> PreTrainedConfig:
    markers = {f"{name}_id": getattr(processor.tokenizer, f"{name}_token_id") for name in _MINICPM_MARKERS}
    (newline,) = processor.tokenizer("\n")["input_ids"]
    return _minicpm_config("minicpmv4_7", **markers, newline_id=newline)(processor)


PATCH_CASES: dict[str, FamilyCase] = {
    "lfm3_vl": FamilyCase(
        TinyBase(_lfm3_vl, _lfm3_vl_config, template=chatml("<|vision_start|><|image_pad|><|vision_end|>", "{{ bos_token }}"))
    ),
    "muse_glimmer": FamilyCase(TinyBase(_muse_glimmer, _muse_config("muse_glimmer"), template=_MUSE_TEMPLATE), "<|eot|>"),
    "muse_spark": FamilyCase(TinyBase(_muse_spark, _muse_spark_config, template=_MUSE_TEMPLATE), "<|eot|>"),
    "cohere_compass": FamilyCase(
        TinyBase(_cohere_compass, _cohere_compass_config, template=_COMPASS_TEMPLATE), "<|END_OF_TURN_TOKEN|>"
    ),
    "minicpmv4_6": FamilyCase(
        TinyBase(
            _minicpm("MiniCPMV4_6Processor", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor"),
            _minicpm_config("minicpmv4_6", image_size=56),
            template=chatml("<|image_pad|>\\n"),
        )
    ),
    "minicpmv4_7": FamilyCase(
        TinyBase(
            _minicpm("MiniCPMV4_7Processor", "MiniCPMV4_6ImageProcessor", "MiniCPMV4_6VideoProcessor"),
            _minicpmv4_7_config,
            template=chatml("<|image_pad|>\\n"),
        )
    ),
    "minicpm_ocr": FamilyCase(
        TinyBase(
            _minicpm("MiniCPMOcrProcessor", "MiniCPMOcrImageProcessor", "MiniCPMOcrVideoProcessor", downsample_mode="4x"),
            _minicpm_config("minicpm_ocr"),
            template=chatml("<|image_pad|>\\n"),
        )
    ),
}
