"""Whether two models are the same function on real samples: logits and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.encoding.encode import IGNORE_INDEX, encode_sample
from mmtune.data.message import Sample
from mmtune.evaluation.evaluate import generate_answers
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.models.compute import move_batch, training_autocast


@dataclass(frozen=True)
class ModelOutputs:
    """What a model does on a set of samples.

    Attributes:
        logits: per sample, fp32 of shape (answer tokens, vocabulary), at the positions that predict the answers. What a model
            would say inside a question is never trained, never sampled, and can be ill-conditioned.
        answers: greedy answers to the last questions.
    """

    logits: list[torch.Tensor]
    answers: list[str]


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart: the largest and the mean absolute difference, and the mean KL divergence in nats
    per predicted token. Infinite where a logit is not finite."""

    largest: float
    mean: float
    kl: float


def collect_outputs(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], max_new_tokens: int, label: str = "comparing"
) -> ModelOutputs:
    """Logits of a model in eval mode where it answers, and what it answers on its own."""
    logits = answer_logits(model, processor, samples, label)
    return ModelOutputs(logits, generate_answers(model, processor, samples, max_new_tokens, batch_size=8, label=label))


def answer_logits(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], label: str = "comparing"
) -> list[torch.Tensor]:
    """`ModelOutputs.logits`, teacher-forced, one sample at a time."""
    model.eval()
    logits = []
    with EvaluationProgress(label, len(samples), "logits of samples") as progress:
        for sample in samples:
            inputs = move_batch(model, encode_sample(sample, processor))
            predicts = inputs.pop("labels")[0, 1:] != IGNORE_INDEX
            with torch.inference_mode(), training_autocast(model):
                seen = model(**inputs).logits[0, -len(predicts) - 1 : -1]  # after any virtual tokens
                logits.append(seen[predicts].float().cpu())
            progress.update(1)
    return logits


def compare(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """The difference of `ModelOutputs.logits`, KL(one || other) over all samples and positions."""
    a, b = torch.cat(list(one)).double(), torch.cat(list(other)).double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return Difference(float("inf"), float("inf"), float("inf"))
    apart = (a - b).abs()
    kl = nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
    return Difference(apart.max().item(), apart.mean().item(), kl.item())


def count_same_answers(one: ModelOutputs, other: ModelOutputs) -> int:
    """How many greedy answers are the same text."""
    return sum(a == b for a, b in zip(one.answers, other.answers, strict=True))
