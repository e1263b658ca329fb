"""Keys of processors follow from the model's config, and image tokens are held against the features of the real classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from family_processors import FAMILIES, TURNS, byte_level

from mmtune.models.processors.ready_processor import PROCESSOR_KEYS, check_image_tokens, choose_pad_token, prepare_processor
from mmtune.models.tiny.tiny_bases import BASES
from mmtune.utils.errors import UserError

TEMPLATE = TURNS.format(image="<image>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_and_its_model_agree(family: str) -> None:
    processor = FAMILIES[family]()
    check_image_tokens(processor, BASES[family].config(processor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_does_not_fit_is_named_with_the_value_it_should_have(family: str) -> None:
    config = BASES[family].config(FAMILIES[family]())
    for key, rule in PROCESSOR_KEYS[type(FAMILIES[family]()).__name__].items():
        processor: Any = copy.deepcopy(FAMILIES[family]())
        owner = processor.image_processor if "." in key else processor
        attribute = key.rpartition(".")[2]
        right = getattr(owner, attribute)
        assert rule(config) == right
        if isinstance(right, str):
            wrong: Any = {"full": "default", "default": "full"}.get(right, "anyres_max_1")
        else:
            wrong = right[:1] if isinstance(right, list) else right + 1
        setattr(owner, attribute, wrong)
        if family == "paligemma":
            processor.image_seq_length = wrong
        if hasattr(processor, "full_image_sequence"):  # Gemma 3's is made once
            processor.full_image_sequence = processor.full_image_sequence.replace(processor.tokenizer.image_token, "", 1)
        if attribute != "temporal_patch_size":  # of a single image it makes no other number of tokens
            with pytest.raises(UserError) as caught:
                check_image_tokens(processor, config)
            assert f"{key}: expected {right}, got {wrong}" in str(caught.value)


def test_an_image_token_that_is_not_the_models_is_named() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    config.image_token_id = processor.tokenizer.eos_token_id
    with pytest.raises(UserError) as caught:
        check_image_tokens(processor, config)
    reason = f"image_token is '<image>' (id {processor.image_token_id}), and in config.json '</s>'"
    assert f"writes 0 tokens of id {config.image_token_id}, and the model makes 16 features" in str(caught.value)
    assert reason in str(caught.value)


def test_an_image_size_that_is_not_the_towers_is_named() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    config.vision_config.image_size = 28
    with pytest.raises(UserError, match=r"cannot take an image of 640 x 480 pixels.*56\*56.*look at the image size"):
        check_image_tokens(processor, config)


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
    choose_pad_token("base", tokenizer, TEMPLATE, "<image>")
    assert tokenizer.pad_token == pad


def test_without_any_token_to_pad_with_the_line_to_add_is_named() -> None:
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>", "<image>"))
    with pytest.raises(UserError, match=r'add "pad_token" to its tokenizer_config\.json'):
        choose_pad_token("base", tokenizer, TEMPLATE, "<image>")


def test_tokens_that_the_model_does_not_embed_are_named() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    prepare_processor("base", processor, processor.chat_template, config)
    tokens = processor.tokenizer.get_vocab()
    config.text_config.vocab_size = len(tokens) - 1
    last = max(tokens, key=tokens.__getitem__)
    with pytest.raises(UserError) as caught:
        prepare_processor("base", processor, processor.chat_template, config)
    assert f"no row for {last}; save the model after resize_token_embeddings({len(tokens)})" in str(caught.value)
