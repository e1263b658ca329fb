"""The built-in model: a LLaVA checkpoint of under two million parameters that reads handwritten digits.

`builtin:tiny-llava` is the trained checkpoint in `mmtune/builtin/tiny_llava`; `builtin:tiny-llava-untrained` has the same
architecture and processor with random weights. The first was trained from the second with `recipes/tiny_llava_read.yaml`, then
`recipes/tiny_llava.yaml`.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmtune.builtin import TINY_LLAVA
from mmtune.builtin.digits import CELL

PATCH = 8  # side of a patch in pixels


def build_processor() -> LlavaProcessor:
    """The processor of the built-in model: images of 32 x 32 pixels, 16 image tokens each.

    Its tokenizer is a byte-level BPE of 372 tokens with merges learned from the questions of the data set.
    """
    processor: LlavaProcessor = AutoProcessor.from_pretrained(str(TINY_LLAVA), trust_remote_code=False)
    return processor


def build_untrained(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The built-in model with random fp32 weights: a CLIP tower of 4 layers, an MLP projector, a Llama of 5 layers.

    Args:
        seed: the seed of the weights.
    """
    processor = build_processor()
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=2 * CELL,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(2 * CELL // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor
