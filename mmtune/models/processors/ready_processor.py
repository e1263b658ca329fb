"""Processors of ready bases: completion of missing keys, image-token check, and padding token."""

from __future__ import annotations

import textwrap
from typing import Any

from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin

from mmtune.chat_templates.resolving import end_of_turn_ids
from mmtune.families.family_table import family_of_processor
from mmtune.models.checkpoints.remote_code import first_line
from mmtune.models.fake_tensors import DataDependentOutputException, DynamicOutputShapeException
from mmtune.models.processors.feature_counter import feature_counter
from mmtune.models.processors.processor import read_processor
from mmtune.utils.errors import UserError

PROBE_SIZES = ((640, 480), (100, 333), (224, 224))
"""(width, height) in pixels of the images for which image tokens and features are compared."""
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>", "<unk>")
"""Padding tokens in the order of preference."""


def load_completed_processor(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load the processor of a checkpoint and set keys that its files lack from the model's config.

    Args:
        name: a directory or hub id.
        config: the model's config.
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: no processor for images and text, a slow tokenizer, or a missing key that the config does not determine.
        OSError, ValueError: files that cannot be read.
    """
    processor = read_processor(name, trust_remote_code)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model_type {config.model_type}: expected a processor for images and text, got {type(processor).__name__}; for a "
            "text model set model.language and model.vision"
        )
    if not family_of_processor(processor).has_placeholder(processor):
        raise UserError(
            f"model_type {config.model_type}: {type(processor).__name__} has no `image_token`, which is needed to encode "
            "images; use a base of another family"
        )
    if not processor.tokenizer.is_fast:
        raise UserError(
            f"its tokenizer: expected a fast tokenizer (tokenizer.json), whose token offsets labels need, got "
            f"{type(processor.tokenizer).__name__}; convert it to a fast tokenizer and save it to the base"
        )
    _complete(name, processor, config)
    return processor


def _complete(name: str, processor: Any, config: PreTrainedConfig) -> None:
    published = type(processor).get_processor_dict(name)[0]
    images = published.get("image_processor")
    if images is None:
        images, _ = type(processor.image_processor).get_image_processor_dict(name)
    filled: dict[str, Any] = {}
    family = family_of_processor(processor)
    for key, rule in family.processor_keys.items():
        owner, attribute = _owner(processor, key)
        published_value = (published if owner is processor else images).get(attribute)
        value = rule(config)
        if published_value is not None or getattr(owner, attribute) == value:
            continue
        if value is not None:
            setattr(owner, attribute, value)
            filled[key] = value
        elif getattr(owner, attribute) is None:
            raise UserError(f"processor_config.json: missing key {key}, which config.json does not determine; add it")
    family.complete_processor(processor, filled)
    if filled:
        values = ", ".join(f"{key}: {textwrap.shorten(str(value), 60, placeholder=' ...')}" for key, value in filled.items())
        print(f"{name}: keys missing in the processor's files set from config.json: {values}")


def _owner(processor: Any, key: str) -> tuple[Any, str]:
    owner, _, attribute = key.rpartition(".")
    return (getattr(processor, owner) if owner else processor), attribute


def prepare_processor(
    name: str, processor: ProcessorMixin, template: str, config: PreTrainedConfig, trust_remote_code: bool = False
) -> None:
    """Check a ready base's processor and tokenizer against its model config, and set the padding token.

    Args:
        name: the base, for messages.
        processor: the processor; its tokenizer is changed in place.
        template: the chat template that will be used.
        config: the model's config.
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: as `check_image_tokens` and `choose_pad_token`, or tokens without an embedding row.
    """
    check_image_tokens(processor, config, trust_remote_code)
    _check_embedding_rows(processor, config)
    _check_decoder(processor, config)
    choose_pad_token(name, processor.tokenizer, template, family_of_processor(processor).placeholder(processor))


def check_image_tokens(processor: Any, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Check that the number of image tokens of a processor equals the number of image features of its model.

    Where the numbers cannot be compared, a line says so.

    Raises:
        UserError: the numbers differ (the message names the responsible processor keys), the image tokens differ, or the model's
            components are not what its structure suggests.
    """
    family = family_of_processor(processor)
    token = _image_token_id(processor, config)
    counter = feature_counter(config, trust_remote_code)
    if counter.image_features is None:
        print(f"{counter.model_class}: image tokens and features are not compared: it has no get_image_features")
        return
    for width, height in PROBE_SIZES:
        try:
            media, [text] = family.process_images(processor, [Image.new("RGB", (width, height), "red")])
            features = counter.count(media)
        except (DataDependentOutputException, DynamicOutputShapeException):
            print(f"{counter.model_class}: image tokens and features are not compared: their number depends on weights")
            return
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"the model cannot process an image of {width} x {height} pixels from its processor: "
                f"{first_line(error)}{_mismatched_keys(processor, config)}"
            ) from error
        written = family.count_image_tokens(processor, text, token)
        if written != features:
            raise UserError(
                f"for an image of {width} x {height} pixels the processor writes {written} image tokens (id {token}), the "
                f"model gives {features} image features{_mismatched_keys(processor, config)}"
            )


def _image_token_id(processor: Any, config: Any) -> int:
    """The id of the token of image features: of the model's config, or of the processor's placeholder where that has none."""
    token = getattr(config, "image_token_id", None)
    if token is None:
        token = processor.tokenizer.convert_tokens_to_ids(family_of_processor(processor).placeholder(processor))
    return int(token)


def _mismatched_keys(processor: Any, config: Any) -> str:
    """The processor keys that do not match the model's config, with the expected values, for messages."""
    mismatches = []
    token_id = _image_token_id(processor, config)
    token = processor.tokenizer.convert_ids_to_tokens(token_id)
    family = family_of_processor(processor)
    placeholder = family.placeholder(processor)
    placeholder_id = processor.tokenizer.convert_tokens_to_ids(placeholder)
    if placeholder_id != token_id and family.placeholder_is_image_token:
        mismatches.append(f"image_token: expected {token!r} (config.json), got {placeholder!r} (id {placeholder_id})")
    for key, rule in family.processor_keys.items():
        owner, attribute = _owner(processor, key)
        expected, actual = rule(config), getattr(owner, attribute)
        if expected is not None and actual != expected:
            mismatches.append(f"{key}: expected {expected}, got {actual}")
    if mismatches:
        return f"; in the processor's files {'; '.join(mismatches)}"
    keys = ", ".join(family.processor_keys)
    return f"; the processor's files do not match config.json: check the image size{', ' + keys if keys else ''}"


def _check_embedding_rows(processor: Any, config: Any) -> None:
    """Check that the model has an embedding row for every token.

    Raises:
        UserError: tokens without a row.
    """
    text = config.get_text_config()
    # Molmo 2 has rows for its markers of images beside those of the words.
    rows, vocabulary = text.vocab_size + getattr(text, "additional_vocab_size", 0), processor.tokenizer.get_vocab()
    # Some families replace the image token by features before the embedding.
    ignored = None if family_of_processor(processor).embeds_image_token else config.image_token_id
    beyond = [token for token, token_id in vocabulary.items() if token_id >= rows and token_id != ignored]
    beyond.sort(key=vocabulary.__getitem__)
    if beyond:
        raise UserError(
            f"its tokenizer has {len(vocabulary):,} tokens and its model {rows:,} embedding rows: no row for "
            f"{', '.join(beyond[:3])}{' ...' * (len(beyond) > 3)}; save the model after resize_token_embeddings("
            f"{max(vocabulary.values()) + 1}), or save its tokenizer without these tokens"
        )


def _check_decoder(processor: Any, config: Any) -> None:
    """Check that the decoder of an encoder-decoder model starts with the token that the labels assume.

    Raises:
        UserError: it starts with another token, or the family is not known to have an encoder.
    """
    expected = family_of_processor(processor).decoder_start(processor)
    has_encoder = getattr(config, "is_encoder_decoder", False)
    starts = [
        each.decoder_start_token_id for each in (config, config.get_text_config()) if hasattr(each, "decoder_start_token_id")
    ]
    actual = next((start for start in starts if start is not None), None) if has_encoder else None
    if expected != actual:
        raise UserError(
            f"model_type {config.model_type}: expected decoder_start_token_id {expected} in config.json for its tokenizer "
            f"{type(processor.tokenizer).__name__}, got {actual}"
        )


def choose_pad_token(name: str, tokenizer: Any, template: str, image_token: str) -> None:
    """Set a padding token that is neither the image token nor an end-of-turn token, if the tokenizer has one.

    Labels of mmtune do not depend on it. Other trainers often exclude padding tokens from the loss; with an end-of-turn token as
    padding token they would never train the end of a turn.

    Raises:
        UserError: no suitable token.
    """
    end_tokens = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)}
    image = tokenizer.convert_tokens_to_ids(image_token)
    vocabulary = tokenizer.get_vocab()
    previous, pad = tokenizer.pad_token, tokenizer.pad_token_id
    if pad is not None and pad != image and pad not in end_tokens:
        return
    candidates = [token for token in PAD_NAMES if vocabulary.get(token, image) != image and vocabulary[token] not in end_tokens]
    if candidates:
        tokenizer.pad_token = candidates[0]
    elif pad is None or pad == image:
        if tokenizer.eos_token is None:
            raise UserError('it has no padding token; add "pad_token" to its tokenizer_config.json')
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token != previous:
        reason = "it was not set"
        if previous is not None:
            reason = f"{previous!r} {'is the image token' if pad == image else 'ends a turn'}"
        print(f"{name}: pad_token set to {tokenizer.pad_token!r}: {reason}")
