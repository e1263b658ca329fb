"""Tiny bases whose image is a grid of patches: their processors, configs and chat templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from mmtune.models.tiny.tiny_bases import text_sizes, tiny_tokenizer, token_id

PARTS = "{% for b in m.content %}{{ b.text if b.type == 'text' else IMAGE }}{% endfor %}"


def chatml(image: str, thought: str = "") -> str:
    """ChatML; `thought` is the empty thinking block that a template writes before every answer."""
    return (
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('THOUGHT' if m.role == 'assistant' else '') }}"
            + PARTS
            + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\nTHOUGHT' }}{% endif %}"
        )
        .replace("IMAGE", repr(image))
        .replace("THOUGHT", thought.replace("\n", "\\n"))
    )


def grid_processor(
    kind: str,
    images: str,
    tokens: tuple[str, ...],
    video: str | None = None,
    audio: tuple[str, dict[str, Any]] | None = None,
    *,
    patch: int = 14,
    merge: int = 2,
    frames: int = 2,
    named: dict[str, str] | None = None,
    video_settings: dict[str, Any] | None = None,
    **names: Any,
) -> Callable[[], ProcessorMixin]:
    """The processor class `kind` with images of 4 to 64 groups of merged patches, and with its parts for video and audio."""

    def build() -> ProcessorMixin:
        import transformers as tf

        area = (merge * patch) ** 2
        sizes = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": frames}
        edges = {"size": {"shortest_edge": 4 * area * frames, "longest_edge": 64 * area * frames}}
        parts = {"image_processor": getattr(tf, images)(**sizes, **edges), "tokenizer": tiny_tokenizer(tokens, named, **names)}
        if video:
            parts["video_processor"] = getattr(tf, video)(**(sizes | (video_settings or {})))
        if audio:
            parts["feature_extractor"] = getattr(tf, audio[0])(**audio[1])
        processor: ProcessorMixin = getattr(tf, kind)(**parts)
        return processor

    return build


def grid_config(
    model_type: str, vision: dict[str, Any], text: dict[str, Any], tokens: dict[str, str], **settings: Any
) -> Callable[[Any], PreTrainedConfig]:
    """The config of a family; `tokens` are the tokens whose ids it has."""

    def config(processor: Any) -> PreTrainedConfig:
        ids = {key: token_id(processor, token) for key, token in tokens.items()}
        sizes = {**text_sizes(processor.tokenizer), **text}
        defaults: dict[str, Any] = {"tie_word_embeddings": False, **ids, **settings}
        return AutoConfig.for_model(model_type, vision_config=vision, text_config=sizes, **defaults)

    return config


QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IDS = dict(
    zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), QWEN_VISION, strict=True)
)
QWEN_NAMES = {"pad": "<|endoftext|>", "eos": "<|im_end|>"}
