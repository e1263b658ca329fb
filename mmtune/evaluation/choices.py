"""Score a closed question by the likelihood of each answer that it leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_sample
from mmtune.data.message import RowError, Sample, split_question
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.models.compute import count_virtual_tokens, in_eval_mode, move_batch, training_autocast


def check_choices(sample: Sample) -> None:
    """
    Raises:
        RowError: when the sample does not say between which answers to choose.
    """
    if len(sample.choices) < 2:
        detail = "evaluate.score: choices needs a template with options or a verbalizer, and two answers at least"
        raise RowError(sample.id, "choices", f"{len(sample.choices)} candidate answers; {detail}")


def score_choices(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], batch_size: int, what: str = "scoring"
) -> list[tuple[float, ...]]:
    """The log-likelihood of every candidate answer, given the conversation before it.

    It is the sum over the candidate's tokens and the one that ends the turn, so that no candidate is the beginning of another,
    and those of one question are probabilities of exclusive events. It is not divided by length.

    Args:
        model: in any mode; it is put in eval mode and back.
        samples: conversations that end with an answer, which the model does not see, and have `choices`.
        batch_size: candidates scored at once; of similar length first, so that little is padded.
        what: is asked, for the progress that is shown.

    Returns:
        For each sample, a log-probability (natural logarithm) for each of its choices.

    Raises:
        RowError: a sample without choices, or one that cannot be encoded.
    """
    for sample in samples:
        check_choices(sample)
    candidates = [(place, number) for place, sample in enumerate(samples) for number in range(len(sample.choices))]
    candidates.sort(key=lambda item: _characters(samples[item[0]], item[1]))
    scores: dict[tuple[int, int], float] = {}
    starts = range(0, len(candidates), batch_size)
    with in_eval_mode(model), EvaluationProgress(what, len(candidates), "candidate answers") as progress:
        for start in starts:
            chosen = candidates[start : start + batch_size]
            encoded = [_encoded(samples[place], samples[place].choices[number], processor) for place, number in chosen]
            scores.update(zip(chosen, _log_likelihoods(model, encoded, processor.tokenizer.pad_token_id), strict=True))
            progress.update(len(chosen))
    return [tuple(scores[place, number] for number in range(len(sample.choices))) for place, sample in enumerate(samples)]


def most_likely_choice(sample: Sample, scores: Sequence[float]) -> str:
    """The choice with the highest score; of equals the first."""
    return sample.choices[max(range(len(scores)), key=lambda number: scores[number])]


def _characters(sample: Sample, number: int) -> int:
    texts = (block.get("text", "") for message in sample.messages[:-1] for block in message["content"])
    return sum(map(len, texts)) + len(sample.choices[number])


def _encoded(sample: Sample, choice: str, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """The conversation with one candidate as its last answer, labelled there alone."""
    prompt, _ = split_question(sample)
    answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
    encoded = encode_sample(replace(sample, messages=[*prompt, answer]), processor)
    labels = encoded["labels"].clone()
    # The user's turn stands between two answers, so the last one begins after the last position that is not supervised.
    supervised = labels[0] != IGNORE_INDEX
    end = int(supervised.nonzero().max()) + 1
    before = (~supervised[:end]).nonzero()
    labels[:, : int(before.max()) + 1] = IGNORE_INDEX
    return {**encoded, "labels": labels}


def _log_likelihoods(model: nn.Module, encoded: list[dict[str, torch.Tensor]], pad_token_id: int) -> list[float]:
    batch: dict[str, Any] = move_batch(model, collate(encoded, pad_token_id))
    labels = batch.pop("labels")
    # Only the positions before a supervised token need the vocabulary's width: a batch of prompts would not fit in memory.
    wanted = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    with torch.inference_mode(), training_autocast(model):
        logits = model(**batch, logits_to_keep=wanted - 1 + count_virtual_tokens(model)).logits
    targets = labels[:, wanted]
    # (candidates, positions); what is not supervised has a loss of 0.
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return [-float(total) for total in losses.double().sum(dim=1)]
