"""Families whose image features are resampled by queries, attended to across, or read by an encoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import SENTENCEPIECE, VISION, TinyBase, text_sizes, tiny_tokenizer, token_id
from mmtune.models.tiny.tiny_templates import TEMPLATES

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _idefics2() -> ProcessorMixin:
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    specials = ("<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>")
    images = Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=True)
    processor: ProcessorMixin = Idefics2Processor(images, tiny_tokenizer(specials, pad="<unk>", **SENTENCEPIECE), image_seq_len=3)
    return processor


def _idefics2_config(processor: Any) -> PreTrainedConfig:
    heads = {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return AutoConfig.for_model(
        "idefics2",
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        perceiver_config={"resampler_n_latents": 3, "resampler_depth": 1, "hidden_size": 64, **heads},
        text_config={"model_type": "mistral", **text_sizes(processor.tokenizer)},
        image_token_id=token_id(processor, "<image>"),
        tie_word_embeddings=False,
    )


SEPARATE_CASES: dict[str, FamilyCase] = {
    "idefics2": FamilyCase(
        TinyBase(_idefics2, _idefics2_config, template=str(TEMPLATES["idefics3"]).replace("<|im_start|>", "")),
        "<end_of_utterance>",
        leading=" ",
    ),
}
