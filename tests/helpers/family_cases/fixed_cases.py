"""Families with a fixed number of tokens for every image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import BASES, VISION, TinyBase, text_sizes, tiny_tokenizer, token_id
from mmtune.models.tiny.tiny_models import IMAGE, PATCH

SQUARE = {"height": IMAGE, "width": IMAGE}
GRID = IMAGE // PATCH
"""Patches along an edge."""

# Deepseek-VL's system text is shortened; the line ends and roles are those of the release.
_USER_ASSISTANT = (
    "A helpful assistant.\n\n{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' }}{% for b in m.content %}"
    "{{ b.text if b.type == 'text' else 'IMAGE' }}{% endfor %}{{ '\n\n' }}{% else %}{{ 'ASSISTANT: ' + m.content[0].text }}"
    "{{ 'END' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _user_assistant(user: str, assistant: str, image: str, end: str) -> str:
    changes = {"USER": user, "ASSISTANT": assistant, "IMAGE": image, "END": end}
    template = _USER_ASSISTANT
    for old, new in changes.items():
        template = template.replace(old, new)
    return template


# ---- ViP-LLaVA: LLaVA's processor, and features of several layers side by side


def _vipllava_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "vipllava",
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        vision_feature_layer=[-2, -1, 1],
        image_seq_length=GRID**2,
        image_token_index=token_id(processor, "<image>"),
    )


# ---- DeepSeek-VL and Janus

_DEEPSEEK_BOS, _DEEPSEEK_END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
_DEEPSEEK = {"bos": _DEEPSEEK_BOS, "eos": _DEEPSEEK_END, "pad": "<pad>"}


def _deepseek(kind: str) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        import transformers as tf

        tokenizer = tiny_tokenizer(tuple(_DEEPSEEK.values()), {"image_token": "<image_placeholder>"}, **_DEEPSEEK)
        sizes: dict[str, Any] = {"size": SQUARE}
        if kind == "DeepseekVLHybrid":
            sizes["high_res_size"] = {"height": 2 * IMAGE, "width": 2 * IMAGE}
        images = getattr(tf, f"{kind}ImageProcessor")(**sizes)
        processor: ProcessorMixin = getattr(tf, f"{kind}Processor")(images, tokenizer, num_image_tokens=GRID**2)
        return processor

    return build


def _deepseek_config(model_type: str) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        settings: dict[str, Any] = {}
        if model_type == "deepseek_vl_hybrid":
            attention = {"num_attention_heads": 2, "window_size": 4, "global_attn_indexes": [1]}
            sizes = {"hidden_size": 32, "mlp_dim": 64, "output_channels": 16, "image_size": 2 * IMAGE, "patch_size": 7}
            settings["high_res_vision_config"] = {"num_hidden_layers": 2, **attention, **sizes}
        return AutoConfig.for_model(
            model_type,
            text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            image_token_id=token_id(processor, "<image_placeholder>"),
            tie_word_embeddings=False,
            **settings,
        )

    return config


def _janus() -> ProcessorMixin:
    from transformers import JanusImageProcessor, JanusProcessor

    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    images = JanusImageProcessor(size=SQUARE)
    processor: ProcessorMixin = JanusProcessor(
        images, tiny_tokenizer(tuple(_DEEPSEEK.values()), named, **_DEEPSEEK), num_image_tokens=GRID**2
    )
    return processor


def _janus_config(processor: Any) -> PreTrainedConfig:
    text = text_sizes(processor.tokenizer)
    width = {"projection_dim": text["hidden_size"]}
    codes = {"embed_dim": 8, "num_embeddings": 16, "image_token_embed_dim": text["hidden_size"]}
    return AutoConfig.for_model(
        "janus",
        text_config={"model_type": "llama", **text},
        vision_config={**VISION, **width, "num_image_tokens": GRID**2},
        vq_config={**codes, **width, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        image_token_id=token_id(processor, "<image_placeholder>"),
        tie_word_embeddings=False,
    )


_CHAT = {"user": "User", "assistant": "Assistant", "end": _DEEPSEEK_END}
_DEEPSEEK_TEMPLATE = _user_assistant(**_CHAT, image="<image_placeholder>")
_JANUS_TEMPLATE = _user_assistant("<|User|>", "<|Assistant|>", "<image_placeholder>\n", _DEEPSEEK_END)

# ---- the table

FIXED_CASES: dict[str, FamilyCase] = {
    "vipllava": FamilyCase(
        TinyBase(BASES["llava"].processor, _vipllava_config, template=BASES["llava"].template, required_template="vicuna_v1"),
        end="</s>",
        leading=" ",
    ),
    "deepseek_vl": FamilyCase(
        TinyBase(_deepseek("DeepseekVL"), _deepseek_config("deepseek_vl"), template=_DEEPSEEK_TEMPLATE),
        end=_DEEPSEEK_END,
        leading=" ",
    ),
    "deepseek_vl_hybrid": FamilyCase(
        TinyBase(_deepseek("DeepseekVLHybrid"), _deepseek_config("deepseek_vl_hybrid"), template=_DEEPSEEK_TEMPLATE),
        end=_DEEPSEEK_END,
        leading=" ",
    ),
    "janus": FamilyCase(TinyBase(_janus, _janus_config, template=_JANUS_TEMPLATE), end=_DEEPSEEK_END, leading=" "),
}
