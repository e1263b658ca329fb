"""Processors of ready bases: keys that their files lack, and image tokens held against the model's image features."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Processor,
    PaliGemmaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
)

from mmtune.chat_templates.resolving import end_of_turn_ids
from mmtune.distributed.sharded_parameters import meta_init
from mmtune.models.compatibility import PREFIX_TOKENS
from mmtune.models.components import find_components
from mmtune.models.fake_tensors import MemoryTracker, suppress_fake_tensor_warnings
from mmtune.models.processors.processor import read_processor
from mmtune.utils.errors import UserError

PROBE_SIZES = ((640, 480), (100, 333), (224, 224))
"""(width, height) in pixels of the images that are counted before weights load."""
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>", "<unk>")
"""Tokens to pad with, in the order of preference."""

Rule = Callable[[Any], Any]
"""From a model's config to a value of its processor; None where the config does not tell."""


def _patch(config: Any) -> int:
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def _grid(config: Any) -> int:
    """Patches of a tower's image."""
    size = config.vision_config.image_size
    return (int(size if isinstance(size, int) else size[0]) // _patch(config)) ** 2


def _extra(config: Any) -> int | None:
    tower = config.vision_config
    known = PREFIX_TOKENS.get(tower.model_type)
    return None if known is None else known + (getattr(tower, "num_register_tokens", 0) or 0)


def _strategy(config: Any) -> str:
    return str(config.vision_feature_select_strategy)


_LLAVA: dict[str, Rule] = {
    "patch_size": _patch,
    "vision_feature_select_strategy": _strategy,
    "num_additional_image_tokens": _extra,
}
_QWEN: dict[str, Rule] = {
    "image_processor.patch_size": _patch,
    "image_processor.merge_size": lambda config: config.vision_config.spatial_merge_size,
    "image_processor.temporal_patch_size": lambda config: config.vision_config.temporal_patch_size,
}
_SHUFFLED: dict[str, Rule] = {"image_seq_len": lambda config: _grid(config) // config.scale_factor**2}
_TILES: dict[str, Rule] = {"image_processor.image_grid_pinpoints": lambda config: config.image_grid_pinpoints}

PROCESSOR_KEYS: dict[str, dict[str, Rule]] = {
    "LlavaProcessor": _LLAVA,
    "LlavaNextProcessor": {**_LLAVA, **_TILES},
    "LlavaOnevisionProcessor": {
        "num_image_tokens": _grid,
        "vision_feature_select_strategy": _strategy,
        "vision_aspect_ratio": lambda config: config.vision_aspect_ratio,
        **_TILES,
    },
    "Qwen2VLProcessor": _QWEN,
    "Qwen2_5_VLProcessor": _QWEN,
    "Qwen3VLProcessor": _QWEN,
    "Idefics3Processor": _SHUFFLED,
    "SmolVLMProcessor": _SHUFFLED,
    "InternVLProcessor": {"image_seq_length": lambda config: int(_grid(config) * config.downsample_ratio**2)},
    "Gemma3Processor": {"image_seq_length": lambda config: config.mm_tokens_per_image},
    "PaliGemmaProcessor": {"image_processor.image_seq_length": _grid},
    "PixtralProcessor": {"patch_size": _patch, "spatial_merge_size": lambda config: getattr(config, "spatial_merge_size", 1)},
}
"""By a processor's class: the keys that decide how many tokens stand for an image, and their values by the model's config."""


def load_completed_processor(name: str, config: PreTrainedConfig, trust_remote_code: bool = False) -> ProcessorMixin:
    """A checkpoint's processor, with the keys that its files leave out taken from the model's config.

    Args:
        name: a directory or hub id.
        config: the model's.

    Raises:
        UserError: no processor of images and text, a tokenizer that keeps no offsets, or a key that is missing and does not
            follow from the config.
        OSError, ValueError: files that cannot be read.
    """
    processor = read_processor(name, trust_remote_code)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"it (model_type {config.model_type}) has no processor of images and text, only a "
            f"{type(processor).__name__}; a text model is named as model.language, beside a model.vision"
        )
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise UserError(
            f"model_type {config.model_type}: {type(processor).__name__} does not say what it writes for an "
            "image, so its samples cannot be encoded exactly; take a base of another family"
        )
    if not processor.tokenizer.is_fast:
        raise UserError(
            f"its tokenizer ({type(processor.tokenizer).__name__}) has no tokenizer.json, and exact labels "
            "need its offsets; convert it to one that the tokenizers library reads, and save it there"
        )
    _complete(name, processor, config)
    return processor


def _complete(name: str, processor: Any, config: PreTrainedConfig) -> None:
    published = type(processor).get_processor_dict(name)[0]
    images = published.get("image_processor")
    if images is None:
        images, _ = type(processor.image_processor).get_image_processor_dict(name)
    filled = {}
    for key, rule in PROCESSOR_KEYS.get(type(processor).__name__, {}).items():
        owner, attribute = _owner(processor, key)
        given = (published if owner is processor else images).get(attribute)
        value = rule(config)
        if given is not None or getattr(owner, attribute) == value:
            continue
        if value is not None:
            setattr(owner, attribute, value)
            filled[key] = value
        elif getattr(owner, attribute) is None:
            raise UserError(f"processor_config.json lacks {key}, which config.json does not tell either; add it")
    if isinstance(processor, PaliGemmaProcessor):
        processor.image_seq_length = processor.image_processor.image_seq_length
    if isinstance(processor, Gemma3Processor) and filled:  # it writes an image in full when it is made
        tokenizer = processor.tokenizer
        tokens = tokenizer.image_token * processor.image_seq_length
        processor.full_image_sequence = f"\n\n{tokenizer.boi_token}{tokens}{tokenizer.eoi_token}\n\n"
    if filled:
        told = ", ".join(f"{key}: {textwrap.shorten(str(value), 60, placeholder=' ...')}" for key, value in filled.items())
        print(f"{name}: the processor's files lack keys that follow from config.json: {told}")


def _owner(processor: Any, key: str) -> tuple[Any, str]:
    owner, _, attribute = key.rpartition(".")
    return (getattr(processor, owner) if owner else processor), attribute


def prepare_processor(
    name: str, processor: ProcessorMixin, template: str, config: PreTrainedConfig, trust_remote_code: bool = False
) -> None:
    """Hold a ready base's processor and tokenizer against its model, and put the padding token right.

    Args:
        template: the chat template that it will be used with.

    Raises:
        UserError: as `check_image_tokens` and `choose_pad_token`, or a tokenizer with tokens that the model does not embed.
    """
    check_image_tokens(processor, config, trust_remote_code)
    _check_rows(processor, config)
    choose_pad_token(name, processor.tokenizer, template, processor.image_token)


def check_image_tokens(processor: Any, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Hold the tokens that a processor writes for an image against the features that the model makes of it.

    The model is made from its config alone, and its vision part runs on tensors without data.

    Raises:
        UserError: other numbers, with the key of the processor that decides; or an image token that is not the model's.
    """
    config = type(config).from_dict(config.to_dict())  # a model made of a config writes into it
    if (token := getattr(config, "image_token_id", None)) is None:
        return
    seen: dict[Any, int] = {}
    with suppress_fake_tensor_warnings():
        with meta_init():
            model: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code).eval()
        find_components(model)  # refuses a structure without the parts that tuning needs
        if not hasattr(model, "get_image_features"):
            return
        memory = MemoryTracker(0)
        memory.track_model(model)
        takes = inspect.signature(model.get_image_features).parameters
        for width, height in PROBE_SIZES:
            image = Image.new("RGB", (width, height), "red")
            try:
                batch = processor(images=[[image]], text=[processor.image_token], return_tensors="pt")
                written = int((batch["input_ids"] == token).sum())
                inputs = {key: value for key, value in batch.items() if key in takes and key != "input_ids"}
                key = tuple((each, value.shape if value.is_floating_point() else str(value)) for each, value in inputs.items())
                if key not in seen:
                    seen[key] = _features(model, memory, inputs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                return  # what it computes depends on its weights
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                raise UserError(
                    f"the model cannot take an image of {width} x {height} pixels as its processor gives it: "
                    f"{str(error).strip().splitlines()[0]}{_wrong(processor, config)}"
                ) from error
            if written != seen[key]:
                raise UserError(
                    f"for an image of {width} x {height} pixels the processor writes {written} tokens of id "
                    f"{token}, and the model makes {seen[key]} features{_wrong(processor, config)}"
                )


def _features(model: Any, memory: MemoryTracker, inputs: dict[str, torch.Tensor]) -> int:
    with memory, torch.no_grad():
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
    parts = features if isinstance(features, (list, tuple)) else [features]
    return int(sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size)


def _wrong(processor: Any, config: Any) -> str:
    """The keys of a processor that do not follow from the model's config, with the values that would."""
    wrong = []
    token = processor.tokenizer.convert_ids_to_tokens(config.image_token_id)
    if processor.image_token_id != config.image_token_id and not isinstance(processor, Gemma3Processor):
        wrong.append(f"image_token is {processor.image_token!r} (id {processor.image_token_id}), and in config.json {token!r}")
    for key, rule in PROCESSOR_KEYS.get(type(processor).__name__, {}).items():
        owner, attribute = _owner(processor, key)
        value, given = rule(config), getattr(owner, attribute)
        if value is not None and given != value:
            wrong.append(f"{key}: expected {value}, got {given}")
    if wrong:
        return f"; in the processor's files {'; '.join(wrong)}"
    keys = ", ".join(PROCESSOR_KEYS.get(type(processor).__name__, {}))
    return f"; the processor's files do not fit config.json: look at the image size{', ' + keys if keys else ''}"


def _check_rows(processor: Any, config: Any) -> None:
    """Refuse a tokenizer with tokens that the model does not embed."""
    rows, vocabulary = config.get_text_config().vocab_size, processor.tokenizer.get_vocab()
    # These two families put features in place of the image token before they embed.
    absent = config.image_token_id if isinstance(processor, (Gemma3Processor, PaliGemmaProcessor)) else None
    beyond = [token for token, number in vocabulary.items() if number >= rows and number != absent]
    beyond.sort(key=vocabulary.__getitem__)
    if beyond:
        raise UserError(
            f"its tokenizer has {len(vocabulary):,} tokens, and the model embeds {rows:,}: no row for "
            f"{', '.join(beyond[:3])}{' ...' * (len(beyond) > 3)}; save the model after resize_token_embeddings("
            f"{max(vocabulary.values()) + 1}), or its tokenizer without those tokens"
        )


def choose_pad_token(name: str, tokenizer: Any, template: str, image_token: str) -> None:
    """Give a tokenizer a padding token that is neither an image's nor the end of a turn, where it knows another one.

    Labels do not depend on it here. Elsewhere they often do: a trainer that leaves padding out of the loss would never teach the
    end of a turn.

    Raises:
        UserError: no token to pad with.
    """
    ends = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)}
    image = tokenizer.convert_tokens_to_ids(image_token)
    vocabulary = tokenizer.get_vocab()
    was, pad = tokenizer.pad_token, tokenizer.pad_token_id
    if pad is not None and pad != image and pad not in ends:
        return
    fit = [token for token in PAD_NAMES if vocabulary.get(token, image) != image and vocabulary[token] not in ends]
    if fit:
        tokenizer.pad_token = fit[0]
    elif pad is None or pad == image:
        if tokenizer.eos_token is None:
            raise UserError('no token to pad with; add "pad_token" to its tokenizer_config.json')
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token != was:
        why = "there is none"
        if was is not None:
            why = f"{was!r} {'stands for an image' if pad == image else 'ends a turn'}"
        print(f"{name}: pad_token: {tokenizer.pad_token!r}, because {why}")
