"""The KV cache of a prompt, computed once and shared by the candidate answers or the sampled answers of a question.

A prompt, with its images, goes through the model once; its keys and values are then repeated for each answer. `generate` of
transformers prepares the inputs, so that masks and positions are those of the model's class.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from mmtune.data.batching.collate import CROSS_ATTENTION_MASKS, PER_TOKEN
from mmtune.data.encoding.encode import IGNORE_INDEX
from mmtune.models.compute import count_virtual_tokens
from mmtune.models.generation import reads_with_encoder
from mmtune.utils.transformers_private import inputs_of_next_tokens, sample_tokens

TOKEN_INPUTS = (*PER_TOKEN, *CROSS_ATTENTION_MASKS)
"""Inputs of shape (rows, tokens, ...) that later tokens need too; media are needed with the prompt only."""

LOOP_SETTINGS = ("logits_processor", "stopping_criteria", "generation_config")


def shares_prompt(model: nn.Module) -> bool:
    """Whether the cache of a prompt can be repeated and continued by several tokens at once.

    It cannot for an encoder-decoder model, virtual tokens of a prompt method, and caches with a sliding window or a recurrent
    state. Their prompts are computed with each answer.
    """
    if reads_with_encoder(model) or count_virtual_tokens(model):
        return False
    inner: Any = model
    layers = DynamicCache(config=inner.config.get_text_config(decoder=True)).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def answer_prompts(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    choice: LogitsProcessor,
    repeats: int,
    **inputs: Any,
) -> torch.Tensor:
    """A `custom_generate` of transformers: one or several answers to each prompt, in adjacent rows.

    Args:
        model: the model without an adapter's wrapper.
        input_ids: the prompts, int64, shape (prompts, tokens), padded on the left.
        logits_processor, stopping_criteria, generation_config: of transformers' loop.
        choice: chooses the next token. Janus' `generate` does not pass a logits processor on, but its loop.
        repeats: answers to each prompt; more than 1 needs `shares_prompt`.
        inputs: of the model.

    Returns:
        Prompts and answers, int64, shape (prompts x repeats, tokens).
    """
    if repeats > 1:
        beginning = {name: _without_last(name, value) for name, value in inputs.items()}
        prompt = model.prepare_inputs_for_generation(input_ids[:, :-1], is_first_iteration=True, **beginning)
        cache = model(**prompt, return_dict=True).past_key_values
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(repeats)
        inputs = _repeated({**inputs, "past_key_values": cache}, rows)
        input_ids = input_ids[rows]
    return sample_tokens(
        model,
        input_ids,
        logits_processor=LogitsProcessorList([*logits_processor, choice]),
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **inputs,
    )


def _without_last(name: str, value: Any) -> Any:
    """An input of the prompt without its last token, with which the loop of transformers begins."""
    if name == "position_ids":
        return value[..., :-1]  # of one or several parts
    return value[:, :-1] if name in (*TOKEN_INPUTS, "inputs_embeds") and value is not None else value


def score_from_prompt(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    continuations: Sequence[Sequence[dict[str, torch.Tensor]]],
    rows_at_once: int,
    **inputs: Any,
) -> list[list[float]]:
    """A `custom_generate` of transformers: the log-likelihood of each continuation of each prompt.

    Args:
        model: the model without an adapter's wrapper.
        input_ids: the prompts, int64, shape (prompts, tokens), padded on the left.
        continuations: for each prompt, the per-token tensors of its continuations, shape (1, length), with `labels`.
        rows_at_once: continuations in a forward pass.
        inputs: of the model, and settings of transformers' loop that are not used.

    Returns:
        For each prompt and continuation, the sum of the log-probabilities of the tokens with labels.
    """
    inputs = {name: value for name, value in inputs.items() if name not in LOOP_SETTINGS}
    prompt = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs)
    outputs = model(**prompt, return_dict=True)
    first = outputs.logits[:, -1]
    scores: list[list[float]] = [[] for _ in continuations]
    items = [(number, each) for number, several in enumerate(continuations) for each in several]
    for start in range(0, len(items), rows_at_once):
        chunk = items[start : start + rows_at_once]
        rows = torch.tensor([number for number, _ in chunk], device=input_ids.device)
        logits = first[rows, None]
        labels = _padded([each["labels"] for _, each in chunk], IGNORE_INDEX).to(input_ids.device)
        if (length := labels.shape[1] - 1) > 0:  # the last token predicts nothing that is scored
            tokens = {
                name: _padded([each[name][:, :-1] for _, each in chunk], 0).to(input_ids.device)
                for name in chunk[0][1]
                if name != "labels"
            }
            following = _repeated(inputs_of_next_tokens(model, outputs, inputs, length), rows)
            following |= {"logits_to_keep": 0} if "logits_to_keep" in inputs else {}
            for name in tokens.keys() & following.keys() - {"attention_mask"}:  # token types of the answer, not of the prompt
                following[name] = torch.cat([following[name][:, :-length], tokens[name]], dim=1)
            ids = torch.cat([input_ids[rows], tokens["input_ids"]], dim=1)
            prepared = model.prepare_inputs_for_generation(ids, next_sequence_length=length, **following)
            logits = torch.cat([logits, model(**prepared, return_dict=True).logits], dim=1)
        for number, value in zip(rows.tolist(), sum_log_likelihoods(logits, labels), strict=True):
            scores[number].append(value)
    return scores


def sum_log_likelihoods(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """For each row, the sum of the log-probabilities of its labels.

    Args:
        logits: shape (rows, tokens, vocabulary); half precision is computed in fp32.
        labels: int64, shape (rows, tokens), the tokens that the logits predict; -100 is not scored.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return [-float(total) for total in losses.double().sum(dim=1)]


def _padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Tensors of shape (1, length) as one of shape (rows, longest), padded on the right."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat([nn.functional.pad(row, (0, longest - row.shape[1]), value=value) for row in rows])


def _repeated(inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The inputs that tokens after the prompt need, for these rows of the batch; a row may occur several times."""
    repeated: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "past_key_values":
            cache = copy.copy(value)
            cache.layers = [copy.copy(layer) for layer in value.layers]
            cache.batch_select_indices(rows)
            repeated[name] = cache
        elif name == "position_ids":
            repeated[name] = value.index_select(value.ndim - 2, rows)  # (rows, tokens), or of several parts before them
        elif name in TOKEN_INPUTS and value is not None:
            repeated[name] = value[rows]
        elif value is None or isinstance(value, (bool, int)):
            repeated[name] = value
    return repeated
