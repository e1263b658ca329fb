"""Whether two models are the same function on real samples: logits and greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.encode import IGNORE_INDEX, encode_sample
from mmtune.data.message import Sample
from mmtune.evaluation.run import generate_answers


@dataclass(frozen=True)
class Observed:
    """What a model does on a set of samples.

    Attributes:
        logits: per sample, fp32 of shape (answer tokens, vocabulary), at the positions that predict the answers. What a model
            would say inside a question is never trained, never sampled, and can be ill-conditioned.
        answers: greedy answers to the last questions.
    """

    logits: list[torch.Tensor]
    answers: list[str]


def observe(model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], max_new_tokens: int) -> Observed:
    """Logits of a model in eval mode where it answers, teacher-forced, and what it answers on its own."""
    model.eval()
    device = next(model.parameters()).device
    logits = []
    for sample in samples:
        inputs = {key: value.to(device) for key, value in encode_sample(sample, processor).items()}
        predicts = inputs.pop("labels")[0, 1:] != IGNORE_INDEX
        with torch.inference_mode():
            logits.append(model(**inputs).logits[0, :-1][predicts].float().cpu())
    return Observed(logits, generate_answers(model, processor, samples, max_new_tokens, batch_size=8))


def largest_difference(one: Observed, other: Observed) -> float:
    """The largest absolute difference of logits over all samples, positions and tokens; infinite when any is not finite."""
    worst = 0.0
    for a, b in zip(one.logits, other.logits, strict=True):
        difference = (a - b).abs().max().item()
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst


def same_answers(one: Observed, other: Observed) -> int:
    """How many greedy answers are the same text."""
    return sum(a == b for a, b in zip(one.answers, other.answers, strict=True))
