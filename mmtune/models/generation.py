"""Generation settings: those that a checkpoint publishes, made valid, and those that mmtune asks a model with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, ProcessorMixin, StoppingCriteriaList, WatermarkingConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from mmtune.chat_templates.resolving import stop_token_ids
from mmtune.utils.files import read_json_object

DEFAULT_MAX_NEW_TOKENS = 64
"""At most this many new tokens, where a recipe has no `evaluate` section to say."""

MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate", "_from_model_config")
"""Settings that decide whether transformers accepts the others; they are tried first."""
NEEDS = {"penalty_alpha": "top_k"}
"""Settings that mean something else without another one."""
REFUSED = "transformers refuses to save a model with it"
ABSENT = "the model has no such token"
"""Why a setting is left out."""
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")


def read_generation_config(name: str, trust_remote_code: bool = False) -> tuple[GenerationConfig, str | None]:
    """A checkpoint's own generation config, without the settings that transformers refuses to save.

    `generation_config.json` of Vicuna has `temperature` without `do_sample`, for one: it has no effect, and a model that
    was changed cannot be saved with it. What a checkpoint publishes is kept as it is otherwise.

    Args:
        name: a directory or hub id with a `config.json`.

    Returns:
        The config, which `GenerationConfig.validate(strict=True)` accepts, and one line on the settings that were left out.

    Raises:
        UserError: `generation_config.json` is no JSON object.
        OSError, ValueError: files that cannot be read.
    """
    file = cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:  # transformers then takes the settings that config.json has
        file = cached_file(name, CONFIG_NAME)
        published = read_json_object(Path(file)) | {"_from_model_config": True}
    else:
        published = read_json_object(Path(file))
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    generation_config, left_out = make_generation_config_valid(published, config.get_text_config().vocab_size)
    reasons = [f"because {reason}: {', '.join(settings)}" for reason, settings in left_out.items()]
    return generation_config, f"{Path(file).name}: left out, {'; '.join(reasons)}" if reasons else None


def make_generation_config_valid(published: Mapping[str, Any], vocabulary: int) -> tuple[GenerationConfig, dict[str, list[str]]]:
    """As many settings as transformers accepts together, and those that were left out, by the reason.

    Args:
        published: the content of a `generation_config.json`.
        vocabulary: how many tokens the model has; a token id beyond is left out.
    """
    config = GenerationConfig()
    refused: dict[str, Any] = {}
    absent: list[str] = []
    known = vars(config)
    for key in sorted(published, key=lambda key: key not in MODES):
        value = published[key]
        if key not in known and published.get("_from_model_config"):
            continue  # transformers does not read it either
        if key in TOKENS:
            tokens = value if isinstance(value, list) else [] if value is None else [value]
            absent += [f"{key} {token}" for token in tokens if not _is_token(token, vocabulary)]
            existing = [token for token in tokens if _is_token(token, vocabulary)]
            value = (existing if isinstance(value, list) else existing[0]) if existing else None
        before = getattr(config, key, None)
        try:
            setattr(config, key, WatermarkingConfig.from_dict(value) if key == "watermarking_config" else value)
            config.validate(strict=True)
        except (ValueError, TypeError):
            if key in known:
                setattr(config, key, before)
            else:
                delattr(config, key)
            refused[key] = published[key]
    for key, needed in NEEDS.items():
        if needed in refused and getattr(config, key) is not None:
            refused[key] = getattr(config, key)
            setattr(config, key, None)
    left_out = {REFUSED: [f"{key} {value}" for key, value in refused.items()], ABSENT: absent}
    return config, {reason: settings for reason, settings in left_out.items() if settings}


def _is_token(token: Any, vocabulary: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocabulary


def generation_settings(model: torch.nn.Module, processor: ProcessorMixin, max_new_tokens: int) -> dict[str, Any]:
    """The settings of `generate`: greedy, ended by every token that ends a turn, with nothing of the base's own settings."""
    tokenizer = processor.tokenizer
    return {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stop_token_ids(_inner(model).generation_config, tokenizer, str(processor.chat_template)),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def unused_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Settings of the model's own generation config that `generate` does not use: its penalties, beams, sampling, lengths."""
    config = _inner(model).generation_config
    assert config is not None
    silent = {*TOKENS, "transformers_version", "_from_model_config", "use_cache", "cache_implementation"}
    silent |= {"output_attentions", "output_hidden_states"}
    return {key: value for key, value in config.to_diff_dict().items() if key not in silent}


def generate(
    model: torch.nn.Module,
    processor: ProcessorMixin,
    batch: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    stopping_criteria: Sequence[Callable[..., torch.Tensor]] = (),
) -> torch.Tensor:
    """Greedy answers to a batch of prompts, as evaluation, parity, rehearsal and chat ask for them.

    `generate` of transformers takes what its arguments leave open from the model's own generation config: a penalty, beams,
    suppressed tokens. That config is set aside meanwhile.

    Args:
        batch: `input_ids` of shape (rows, tokens), padded on the left, with what else the model takes.
        streamer: gets the tokens of a single row as they come.
        stopping_criteria: functions of `input_ids` and `scores` that return a boolean for each row: whether it is finished.

    Returns:
        Token ids of prompts and answers, int64, shape (rows, tokens).
    """
    inner = _inner(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig(**generation_settings(model, processor, max_new_tokens))
    try:
        answers: torch.Tensor = model.generate(  # type: ignore[operator]
            **batch,
            generation_config=inner.generation_config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(stopping_criteria),
        )
    finally:
        inner.generation_config = own
    return answers


def _inner(model: Any) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model
