"""Keys of processors follow from the model's config, and image tokens are held against the features of the real classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers as tf
from families import CHATML, FAMILIES, byte_level

from mmtune.errors import UserError
from mmtune.model.ready_processor import KEYS, check_image_tokens, choose_pad_token, prepare_processor

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 500, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
EYE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
ROPE = {**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
TILES = [[56 * h, 56 * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
MANY_TILES = [[56 * h, 56 * w] for h in range(1, 7) for w in range(1, 7)]


def _text(model_type: str) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type}


def _eye(model_type: str, **more: Any) -> dict[str, Any]:
    return {**EYE, "model_type": model_type, **more}


CONFIGS: dict[str, Any] = {
    "llava": lambda: tf.LlavaConfig(vision_config=_eye("clip_vision_model"), text_config=_text("llama")),
    "llava_next": lambda: tf.LlavaNextConfig(
        vision_config=_eye("clip_vision_model"), text_config=_text("llama"), image_grid_pinpoints=TILES
    ),
    "llava_onevision": lambda: tf.LlavaOnevisionConfig(
        vision_config=_eye("siglip_vision_model", vision_use_head=False),
        text_config=_text("qwen2"),
        image_grid_pinpoints=MANY_TILES,
        vision_feature_select_strategy="full",
    ),
    "qwen2_vl": lambda: tf.Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}, text_config=ROPE
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(vision_config={**QWEN, "fullatt_block_indexes": [0]}, text_config=ROPE),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(
        vision_config={**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, text_config=ROPE
    ),
    "idefics3": lambda: tf.Idefics3Config(
        vision_config={**EYE, "image_size": 28, "patch_size": 7}, text_config=_text("llama"), scale_factor=2
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        vision_config={**EYE, "image_size": 28, "patch_size": 7}, text_config=_text("llama"), scale_factor=2
    ),
    "internvl": lambda: tf.InternVLConfig(
        vision_config={**EYE, "image_size": [28, 28], "patch_size": [7, 7]}, text_config=_text("qwen2"), downsample_ratio=0.5
    ),
    "gemma3": lambda: tf.Gemma3Config(
        vision_config=_eye("siglip_vision_model"), text_config=_text("gemma3_text"), mm_tokens_per_image=16
    ),
    "paligemma": lambda: tf.PaliGemmaConfig(
        vision_config=_eye("siglip_vision_model"), text_config=_text("gemma"), projection_dim=16
    ),
    "pixtral": lambda: tf.Mistral3Config(
        vision_config={**_eye("pixtral", image_size=128, patch_size=8), "head_dim": 8}, text_config=_text("mistral")
    ),
}


def _config(family: str, processor: Any) -> Any:
    config = CONFIGS[family]()
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(
        getattr(processor.tokenizer, "image_token", processor.image_token)
    )
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_and_its_model_agree(family: str) -> None:
    processor = FAMILIES[family]()
    check_image_tokens("base", processor, _config(family, processor))


@pytest.mark.parametrize(
    ("family", "key"),
    [(family, key) for family in FAMILIES for key in KEYS.get(type(FAMILIES[family]()).__name__, {}) if "temporal" not in key],
)
def test_a_key_that_does_not_fit_is_named_with_the_value_it_should_have(family: str, key: str) -> None:
    processor = copy.deepcopy(FAMILIES[family]())
    config = _config(family, processor)
    owner: Any = processor.image_processor if "." in key else processor
    attribute = key.rpartition(".")[2]
    right = getattr(owner, attribute)
    assert KEYS[type(processor).__name__][key](config) == right
    wrong = {"full": "default", "default": "full"}.get(right, "anyres_max_1") if isinstance(right, str) else None
    wrong = wrong or (right[:1] if isinstance(right, list) else right + 1)
    setattr(owner, attribute, wrong)
    if hasattr(processor, "full_image_sequence"):  # Gemma 3's is made once
        processor.full_image_sequence = processor.full_image_sequence.replace(processor.tokenizer.image_token, "", 1)
    with pytest.raises(UserError) as caught:
        check_image_tokens("base", processor, config)
    assert f"{key}: expected {right}, got {wrong}" in str(caught.value)


def test_an_image_token_that_is_not_the_models_is_named() -> None:
    processor = FAMILIES["llava"]()
    config = CONFIGS["llava"]()
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    reason = (
        r"writes 0 tokens of id 2, and the model makes 16 .*image_token is '<image>' \(id 3\), and in config.json '<.im_end.>'"
    )
    with pytest.raises(UserError, match=reason):
        check_image_tokens("base", processor, config)


def test_an_image_size_that_is_not_the_towers_is_named() -> None:
    processor = FAMILIES["llava"]()
    config = _config("llava", processor)
    config.vision_config.image_size = 28
    with pytest.raises(UserError, match=r"cannot take an image of 640 x 480 pixels.*56\*56.*look at the image size"):
        check_image_tokens("base", processor, config)


@pytest.mark.parametrize(
    ("names", "pad"),
    [
        ({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"pad_token": "<|im_end|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"pad_token": "<|im_end|>", "eos_token": "<|endoftext|>"}, "<|im_end|>"),  # a turn ends with it, and there is no other
        ({"pad_token": "<image>", "eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({}, "<|endoftext|>"),
    ],
)
def test_padding_is_neither_an_image_nor_where_it_can_be_helped_an_end(names: dict[str, str], pad: str) -> None:
    tokenizer = byte_level((*CHATML, "<image>"), **names)
    choose_pad_token("base", tokenizer, FAMILIES["llava"]().chat_template, "<image>")
    assert tokenizer.pad_token == pad


def test_without_any_token_to_pad_with_the_line_to_add_is_named() -> None:
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>", "<image>"))
    with pytest.raises(UserError, match=r'add "pad_token" to its tokenizer_config\.json'):
        choose_pad_token("base", tokenizer, FAMILIES["llava"]().chat_template, "<image>")


def test_tokens_that_the_model_does_not_embed_are_named() -> None:
    processor = FAMILIES["llava"]()
    config = _config("llava", processor)
    prepare_processor("base", processor, processor.chat_template, config)
    tokens = processor.tokenizer.get_vocab()
    config.text_config.vocab_size = len(tokens) - 1
    last = max(tokens, key=tokens.__getitem__)
    with pytest.raises(UserError) as caught:
        prepare_processor("base", processor, processor.chat_template, config)
    assert f"no row for {last}; save the model after resize_token_embeddings({len(tokens)})" in str(caught.value)
