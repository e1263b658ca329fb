"""Generation: the generation config of a checkpoint, made valid, and greedy generation with fixed settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from mmtune.chat_templates.resolving import stop_token_ids
from mmtune.families.family_table import family_of_processor
from mmtune.utils.files import read_json_object

DEFAULT_MAX_NEW_TOKENS = 64
"""`max_new_tokens` for a recipe without an `evaluate` section."""

MODE_SETTINGS = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate", "_from_model_config")
"""Settings on which the validity of others depends; they are set first."""
SAMPLING_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
"""Settings that have no effect with temperature 0."""
REQUIRED_SETTINGS = {"penalty_alpha": "top_k"}
"""Settings that have another meaning without a second setting."""
NOT_SAVABLE = "transformers does not save a model with it"
UNKNOWN_TOKEN = "the model has no such token"
"""Reasons for dropping a setting."""
TOKEN_SETTINGS = ("eos_token_id", "bos_token_id", "pad_token_id")


def read_generation_config(name: str, config: PreTrainedConfig) -> tuple[GenerationConfig, str | None]:
    """Read the generation config of a checkpoint and drop the settings with which transformers cannot save a model.

    For example, Vicuna's `generation_config.json` has `temperature` without `do_sample`. It has no effect, but a modified model
    cannot be saved with it. All other settings are unchanged.

    Args:
        name: a directory or hub id with a `config.json`.
        config: the configuration of its model.

    Returns:
        The config, valid under `GenerationConfig.validate(strict=True)`, and one line about the dropped settings, or None.

    Raises:
        UserError: `generation_config.json` is not a JSON object.
        OSError, ValueError: files that cannot be read.
    """
    file = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:  # transformers then uses the generation settings in config.json
        file = cached_file(name, CONFIG_NAME)
        published = read_json_object(Path(file)) | {"_from_model_config": True}
    else:
        published = read_json_object(Path(file))
    generation_config, dropped = make_generation_config_valid(published, config.get_text_config().vocab_size)
    reasons = [f"because {reason}: {', '.join(settings)}" for reason, settings in dropped.items()]
    return generation_config, f"{Path(file).name}: dropped {'; '.join(reasons)}" if reasons else None


def make_generation_config_valid(published: Mapping[str, Any], vocabulary: int) -> tuple[GenerationConfig, dict[str, list[str]]]:
    """The valid settings of a generation config, and the dropped settings by reason.

    Args:
        published: the content of a `generation_config.json`.
        vocabulary: the vocabulary size of the model; larger token ids are dropped.
    """
    config = GenerationConfig()
    not_savable: dict[str, Any] = {}
    unknown_tokens: list[str] = []
    fields = vars(config)
    for key in sorted(published, key=lambda key: key not in MODE_SETTINGS):
        value = published[key]
        if key not in fields and published.get("_from_model_config"):
            continue  # a key of config.json that is not a generation setting
        if key in TOKEN_SETTINGS:
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            unknown_tokens += [f"{key} {token}" for token in tokens if not _is_token(token, vocabulary)]
            valid_tokens = [token for token in tokens if _is_token(token, vocabulary)]
            value = (valid_tokens if isinstance(value, list) else valid_tokens[0]) if valid_tokens else None
        previous = getattr(config, key, None)
        try:
            setattr(config, key, WatermarkingConfig.from_dict(value) if key == "watermarking_config" else value)
            config.validate(strict=True)
        except (ValueError, TypeError):
            if key in fields:
                setattr(config, key, previous)
            else:
                delattr(config, key)
            not_savable[key] = published[key]
    for key, required in REQUIRED_SETTINGS.items():
        if required in not_savable and getattr(config, key) is not None:
            not_savable[key] = getattr(config, key)
            setattr(config, key, None)
    dropped = {NOT_SAVABLE: [f"{key} {value}" for key, value in not_savable.items()], UNKNOWN_TOKEN: unknown_tokens}
    return config, {reason: settings for reason, settings in dropped.items() if settings}


def _is_token(token: Any, vocabulary: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocabulary


def generation_settings(model: torch.nn.Module, processor: ProcessorMixin, max_new_tokens: int) -> dict[str, Any]:
    """The generation settings of `generate`: greedy decoding with all end-of-turn tokens as stop tokens."""
    tokenizer = processor.tokenizer
    start = family_of_processor(processor).decoder_start(processor)
    forced = getattr(_inner(model).generation_config, "forced_bos_token_id", None)  # a part of every answer of BART
    return {
        **({} if start is None else {"decoder_start_token_id": start, "forced_bos_token_id": forced}),
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_token_ids(_inner(model).generation_config, tokenizer, str(processor.chat_template)),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def unused_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Settings of the model's generation config that `generate` ignores: penalties, beams, sampling, lengths."""
    config = _inner(model).generation_config
    assert config is not None
    without_effect = {*TOKEN_SETTINGS, "transformers_version", "_from_model_config", "use_cache", "cache_implementation"}
    without_effect |= {"output_attentions", "output_hidden_states"}
    return {key: value for key, value in config.to_diff_dict().items() if key not in without_effect}


def greedy_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Settings of the model's generation config that change greedy answers and that `generate` ignores, such as penalties."""
    return {key: value for key, value in unused_settings(model).items() if key not in SAMPLING_SETTINGS}


def drop_greedy_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Remove `greedy_settings` from the generation config, and return them: engines would apply them, evaluation does not."""
    dropped = greedy_settings(model)
    config, defaults = _inner(model).generation_config, GenerationConfig()
    for key in dropped:
        setattr(config, key, getattr(defaults, key, None))
    return dropped


def generate(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[Callable[..., torch.Tensor]] = (),
    custom_generate: Callable[..., Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """Generation for a batch of prompts, greedy by default; used by evaluation, parity, rehearsal and chat.

    Args:
        model: the model, plain or with an adapter.
        processor: its processor, with a chat template.
        batch: `input_ids` of shape (rows, tokens), padded on `padding_side`, and the other inputs of the model.
        max_new_tokens: at most this many new tokens.
        streamer: receives the tokens of a single row as they are generated.
        stopping_criteria: functions of `input_ids` and `scores` that return a boolean per row: whether to stop it.
        custom_generate: transformers' argument: a loop in place of its own, which returns prompts and answers.
        settings: further settings of the GenerationConfig, such as `do_sample` and `temperature`.

    Returns:
        Token ids of the answers, int64, shape (rows, tokens).
    """
    tokens: torch.Tensor = run_generate(
        model,
        processor,
        batch,
        max_new_tokens,
        settings,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList(stopping_criteria),
        custom_generate=custom_generate,
    )
    return tokens[:, answer_start(model, batch) :]


def answer_start(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """The position at which an answer begins in what `run_generate` returns for a batch of prompts."""
    return 1 if reads_with_encoder(model) else batch["input_ids"].shape[1]  # 1: the decoder's start token


def run_generate(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """What transformers' `generate` returns for a batch of prompts with `generation_settings`.

    `generate` takes unset arguments from the model's generation config (penalties, beams, suppressed tokens). This function
    replaces that config during the call. The other arguments are those of `mmtune.models.generation.generate`, and `settings`
    are added to the config.
    """
    inner = _inner(model)
    previous = inner.generation_config
    inner.generation_config = GenerationConfig(**generation_settings(model, processor, max_new_tokens) | dict(settings or {}))
    try:
        return model.generate(**batch, generation_config=inner.generation_config, **arguments)  # type: ignore[operator]
    finally:
        inner.generation_config = previous


def reads_with_encoder(model: torch.nn.Module) -> bool:
    """Whether a model is an encoder-decoder model, whose answer does not continue the prompt."""
    return bool(getattr(_inner(model).config, "is_encoder_decoder", False))


def padding_side(model: torch.nn.Module) -> Literal["left", "right"]:
    """The side on which prompts are padded for `generate`: an encoder reads a prompt from its first position."""
    return "right" if reads_with_encoder(model) else "left"


def _inner(model: Any) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
