"""Parity of two models on real samples: logits and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import IGNORE_INDEX, Supervise, encode_sample
from mmtune.data.message import Sample
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.models.compute import move_batch, training_autocast
from mmtune.models.generation import reads_with_encoder


@dataclass(frozen=True)
class ModelOutputs:
    """Logits and greedy answers of a model on a set of samples.

    Attributes:
        logits: per sample, fp32 of shape (answer tokens, vocabulary), at the positions that predict answer tokens. Logits at
            other positions are neither trained nor used to generate, and can be ill-conditioned.
        answers: greedy answers to the last questions.
    """

    logits: list[torch.Tensor]
    answers: list[str]


@dataclass(frozen=True)
class LogitDifference:
    """The difference between the logits of two models; all values are infinite if a logit is not finite.

    Attributes:
        largest: the largest absolute difference.
        mean: the mean absolute difference.
        kl: the mean KL divergence in nats per predicted token.
    """

    largest: float
    mean: float
    kl: float


def collect_outputs(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], max_new_tokens: int, label: str = "comparing"
) -> ModelOutputs:
    """The logits of a model in eval mode at answer positions, and its greedy answers."""
    logits = answer_logits(model, processor, samples, label)
    return ModelOutputs(logits, generate_answers(model, processor, samples, max_new_tokens, batch_size=8, label=label))


def answer_logits(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], label: str = "comparing"
) -> list[torch.Tensor]:
    """Teacher-forced logits at answer positions (see `ModelOutputs.logits`), one sample at a time.

    The decoder of an encoder-decoder model writes only the last answer.
    """
    model.eval()
    supervise: Supervise = "last" if reads_with_encoder(model) else "all"
    logits = []
    with EvaluationProgress(label, len(samples), "logits of samples") as progress:
        for sample in samples:
            inputs = move_batch(model, encode_sample(sample, processor, supervise=supervise))
            is_answer = inputs.pop("labels")[0, 1:] != IGNORE_INDEX
            with torch.inference_mode(), training_autocast(model):
                sample_logits = model(**inputs).logits[0, -len(is_answer) - 1 : -1]  # without positions of virtual tokens
                logits.append(sample_logits[is_answer].float().cpu())
            progress.update(1)
    return logits


def compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> LogitDifference:
    """The difference between two lists of logits over all samples and positions, with KL(expected || actual)."""
    p, q = torch.cat(list(expected)).double(), torch.cat(list(actual)).double()
    if not (p.isfinite().all() and q.isfinite().all()):
        return LogitDifference(float("inf"), float("inf"), float("inf"))
    difference = (p - q).abs()
    kl = nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
    return LogitDifference(difference.max().item(), difference.mean().item(), kl.item())


def count_same_answers(expected: ModelOutputs, actual: ModelOutputs) -> int:
    """The number of identical greedy answers."""
    return sum(a == b for a, b in zip(expected.answers, actual.answers, strict=True))
