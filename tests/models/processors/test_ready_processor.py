"""Processors of ready bases: keys from the model's config, and image tokens compared with features of the real classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from family_processors import FAMILIES, TURNS, byte_level

from mmtune.families.family_table import family_of_processor
from mmtune.models.processors import feature_counter
from mmtune.models.processors.ready_processor import check_image_tokens, choose_pad_token, prepare_processor
from mmtune.models.tiny.tiny_bases import BASES
from mmtune.utils.errors import UserError

TEMPLATE = TURNS.format(image="<image>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_equal_image_features(family: str) -> None:
    processor = FAMILIES[family]()
    check_image_tokens(processor, BASES[family].config(processor))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mismatched_key_is_an_error_with_the_expected_value(family: str) -> None:
    config = BASES[family].config(FAMILIES[family]())
    for key, rule in family_of_processor(FAMILIES[family]()).processor_keys.items():
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
        if attribute != "temporal_patch_size":  # does not change the number of tokens of a single image
            with pytest.raises(UserError) as caught:
                check_image_tokens(processor, config)
            assert f"{key}: expected {right}, got {wrong}" in str(caught.value)


def test_a_mismatched_image_token_is_an_error() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    config.image_token_id = processor.tokenizer.eos_token_id
    with pytest.raises(UserError) as caught:
        check_image_tokens(processor, config)
    problem = f"image_token: expected '</s>' (config.json), got '<image>' (id {processor.image_token_id})"
    assert f"writes 0 image tokens (id {config.image_token_id}), the model gives 16 image features" in str(caught.value)
    assert problem in str(caught.value)


def test_a_mismatched_image_size_is_an_error() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    config.vision_config.image_size = 28
    with pytest.raises(UserError, match=r"cannot process an image of 640 x 480 pixels.*56\*56.*check the image size"):
        check_image_tokens(processor, config)


@pytest.fixture
def no_kept_counters() -> Iterator[None]:
    """A counter is built for the test, and does not stay for the next."""
    feature_counter._KEPT.clear()
    yield
    feature_counter._KEPT.clear()


@pytest.mark.usefixtures("no_kept_counters")
def test_features_that_depend_on_the_language_model_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_norm(model: Any) -> Any:
        def features(pixel_values: Any, return_dict: bool = True) -> Any:
            output = model.get_image_features(pixel_values, return_dict=return_dict)
            output.pooler_output = output.pooler_output[0] * model.get_decoder().norm.weight
            return output

        return features

    monkeypatch.setattr(feature_counter, "image_features_of", with_norm)
    processor = FAMILIES["llava"]()
    with pytest.raises(UserError, match=r"and on nothing else; not so: model\.language_model\.norm\.weight; the family"):
        check_image_tokens(processor, BASES["llava"].config(processor))


@pytest.mark.usefixtures("no_kept_counters")
def test_a_model_without_image_features_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(feature_counter, "image_features_of", lambda model: None)
    processor = FAMILIES["llava"]()
    check_image_tokens(processor, BASES["llava"].config(processor))
    assert "image tokens and features are not compared: it has no get_image_features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "pad"),
    [
        ({"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"pad_token": "<|im_end|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        (
            {"pad_token": "<|im_end|>", "eos_token": "<|endoftext|>"},
            "<|im_end|>",
        ),  # an end-of-turn token, but no other token is available
        ({"pad_token": "<image>", "eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({}, "<|endoftext|>"),
    ],
)
def test_the_padding_token_is_not_the_image_token_and_preferably_not_an_end_token(names: dict[str, str], pad: str) -> None:
    tokenizer = byte_level((*CHATML, "<image>"), **names)
    choose_pad_token("base", tokenizer, TEMPLATE, "<image>")
    assert tokenizer.pad_token == pad


def test_a_tokenizer_without_a_padding_token_is_an_error() -> None:
    tokenizer = byte_level(("<|im_start|>", "<|im_end|>", "<image>"))
    with pytest.raises(UserError, match=r'add "pad_token" to its tokenizer_config\.json'):
        choose_pad_token("base", tokenizer, TEMPLATE, "<image>")


def test_tokens_without_an_embedding_row_are_an_error() -> None:
    processor = FAMILIES["llava"]()
    config = BASES["llava"].config(processor)
    prepare_processor("base", processor, processor.chat_template, config)
    tokens = processor.tokenizer.get_vocab()
    config.text_config.vocab_size = len(tokens) - 1
    last = max(tokens, key=tokens.__getitem__)
    with pytest.raises(UserError) as caught:
        prepare_processor("base", processor, processor.chat_template, config)
    assert f"no row for {last}; save the model after resize_token_embeddings({len(tokens)})" in str(caught.value)
