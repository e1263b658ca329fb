"""The model of a recipe on the meta device: shapes and dtypes from configs, without weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig, PreTrainedModel

from mmtune.models.checkpoints.locate_base import BUILTIN, UNTRAINED, locate_base
from mmtune.models.checkpoints.remote_code import auto_class
from mmtune.models.compatibility import choose_feature_select_strategy, read_language_config, read_vision_tower
from mmtune.models.compute import prepare_computation
from mmtune.models.load import DTYPES
from mmtune.recipe.recipe import ModelSection
from mmtune.utils.errors import RecipeValueError, UserError


def read_model_config(section: ModelSection) -> PreTrainedConfig:
    """The configuration of the model of a recipe's `model` section, ready or assembled.

    Raises:
        UserError: a config that is not on this machine and cannot be downloaded.
    """
    config: PreTrainedConfig
    if section.base is not None:
        name = config_source(section)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=section.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(unreachable_file("model.base", section.base, "config.json", error)) from error
    else:
        assert section.vision is not None and section.language is not None  # checked by the recipe
        tower = read_vision_tower(section.vision, section.trust_remote_code)
        text = read_language_config(section.language, section.trust_remote_code)
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=text.vocab_size - 1,
            vision_feature_layer=section.vision_feature_layer,
            vision_feature_select_strategy=choose_feature_select_strategy(tower, section.vision_feature_select_strategy),
        )
    return config


def build_meta(section: ModelSection, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The recipe's model on the meta device, from configs alone.

    An assembled model lacks the few embedding rows that its tokenizer may add.

    Args:
        config: the model's configuration, where it has been read.

    Raises:
        UserError: a config that is neither on this machine nor on the hub.
    """
    attention = section.attn_implementation if section.attn_implementation in ("eager", "sdpa") else None
    config = config or read_model_config(section)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model: PreTrainedModel = auto_class(config).from_config(
                config,
                attn_implementation=attention,
                dtype=DTYPES[section.precision],
                trust_remote_code=section.trust_remote_code,
            )
    except ValueError as error:
        raise RecipeValueError("model", f"cannot be built from its config: {str(error).strip().splitlines()[0]}") from error
    prepare_computation(model)
    return model


def config_source(section: ModelSection) -> str:
    """The directory or hub id of a ready base's configuration and image processor."""
    return str(BUILTIN["builtin:tiny-llava"]) if section.base == UNTRAINED else locate_base(str(section.base))


def unreachable_file(key: str, name: str, file: str, error: Exception) -> str:
    """The message about a file of a checkpoint that is not on this machine and cannot be downloaded."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{key}: {name}: its {file} is not on this machine and cannot be downloaded: {line}"
