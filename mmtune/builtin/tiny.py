"""The built-in model: a LLaVA-class checkpoint of under two million parameters that reads handwritten digits.

`builtin:tiny-llava` is the trained checkpoint that ships in `mmtune/builtin/tiny_llava`; `builtin:tiny-llava-untrained` is
the same architecture and tokenizer with random weights. `recipes/tiny_llava.yaml` trains the first from the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmtune.builtin.digits import CELL, TASKS

TRAINED = Path(__file__).parent / "tiny_llava"
SPECIAL = {"pad": "<|pad|>", "end": "<|end|>"}
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
IMAGE_TOKEN = "<image>"
PATCH = 8


def _questions(count: int = 4000) -> Iterator[str]:
    """Text of the kind the model meets, so that its words become single tokens; any other text falls back to bytes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        digits = [int(digit) for digit in rng.integers(10, size=4)]
        yield from list(TASKS.values())[number % len(TASKS)](digits, rng)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, the same on every machine."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*SPECIAL.values(), *ROLE_TOKENS, IMAGE_TOKEN],
        show_progress=False,
    )
    bpe.train_from_iterator(_questions(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL["pad"],
        eos_token=SPECIAL["end"],
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        additional_special_tokens=ROLE_TOKENS,
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """The processor of the built-in model: 32 x 32 pixels in, 16 image tokens out."""
    size = {"height": 2 * CELL, "width": 2 * CELL}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 2 * CELL}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    template = resources.files("mmtune.model").joinpath("chat_templates/tiny.jinja").read_text(encoding="utf-8")
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def build_untrained(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The architecture with random fp32 weights drawn from `seed`: a CLIP tower of 4 layers, an MLP, a Llama of 5 layers."""
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
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
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
