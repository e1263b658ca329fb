"""Multiple-choice scoring: the log-likelihood of each candidate answer of a question."""

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
    """Check that a sample has at least two candidate answers.

    Raises:
        RowError: fewer than two candidates.
    """
    if len(sample.choices) < 2:
        needed = "evaluate.score: choices needs a data template with options or a verbalizer"
        raise RowError(sample.id, "choices", f"expected at least 2 candidate answers, got {len(sample.choices)}; {needed}")


def score_choices(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], batch_size: int, label: str = "scoring"
) -> list[tuple[float, ...]]:
    """Log-likelihoods of all candidate answers, given the conversation before the answer.

    A log-likelihood is the sum over the candidate's tokens and the end-of-turn token. With the end-of-turn token no candidate is
    a prefix of another, so the candidates of a question are mutually exclusive. The sum is not normalized by length.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: conversations with `choices`; the last answer of each is not shown to the model.
        batch_size: candidates per batch; candidates are sorted by length to reduce padding.
        label: the label of the progress display.

    Returns:
        For each sample, one natural-log probability per choice.

    Raises:
        RowError: a sample without choices, or one that cannot be encoded.
    """
    for sample in samples:
        check_choices(sample)
    candidates = [(index, choice) for index, sample in enumerate(samples) for choice in range(len(sample.choices))]
    candidates.sort(key=lambda item: _num_characters(samples[item[0]], item[1]))
    scores: dict[tuple[int, int], float] = {}
    with in_eval_mode(model), EvaluationProgress(label, len(candidates), "candidate answers") as progress:
        for start in range(0, len(candidates), batch_size):
            chunk = candidates[start : start + batch_size]
            encoded = [_encode_choice(samples[index], samples[index].choices[choice], processor) for index, choice in chunk]
            scores.update(zip(chunk, _log_likelihoods(model, encoded, processor.tokenizer.pad_token_id), strict=True))
            progress.update(len(chunk))
    return [tuple(scores[index, choice] for choice in range(len(sample.choices))) for index, sample in enumerate(samples)]


def most_likely_choice(sample: Sample, scores: Sequence[float]) -> str:
    """The choice with the highest score; the first one if several are equal."""
    return sample.choices[max(range(len(scores)), key=lambda number: scores[number])]


def _num_characters(sample: Sample, choice: int) -> int:
    texts = (block.get("text", "") for message in sample.messages[:-1] for block in message["content"])
    return sum(map(len, texts)) + len(sample.choices[choice])


def _encode_choice(sample: Sample, choice: str, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """The conversation with one candidate as its last answer; only that answer has labels."""
    prompt, _ = split_question(sample)
    answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
    encoded = encode_sample(replace(sample, messages=[*prompt, answer]), processor, supervise="last")
    labels = encoded["labels"].clone()
    # A user turn separates two answers, so the last answer starts after the last unsupervised position before its end.
    supervised = labels[0] != IGNORE_INDEX
    end = int(supervised.nonzero().max()) + 1
    unsupervised = (~supervised[:end]).nonzero()
    labels[:, : int(unsupervised.max()) + 1] = IGNORE_INDEX
    return {**encoded, "labels": labels}


def _log_likelihoods(model: nn.Module, encoded: list[dict[str, torch.Tensor]], pad_token_id: int) -> list[float]:
    batch: dict[str, Any] = move_batch(model, collate(encoded, pad_token_id))
    labels = batch.pop("labels")
    # Logits only where a supervised token is predicted: logits of all positions of a batch may not fit in memory.
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    with torch.inference_mode(), training_autocast(model):
        positions = supervised - 1 + count_virtual_tokens(model)
        if "decoder_input_ids" in batch:  # few classes with an encoder compute logits at some positions only
            logits = model(**batch).logits[:, positions]
        else:
            logits = model(**batch, logits_to_keep=positions).logits
    targets = labels[:, supervised]
    # Shape (candidates, positions); unsupervised positions have a loss of 0.
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    return [-float(total) for total in losses.double().sum(dim=1)]
