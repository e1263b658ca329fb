"""Questions in batches of similar length: encoded, looked up in the cache, answered, with the progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmtune.data.message import Sample, text_of
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.predictions.answer_cache import AnswerCache, question_key
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.models.compute import in_eval_mode, training_autocast

Encoded = dict[str, torch.Tensor]


def answer_questions(
    model: nn.Module,
    samples: Sequence[Sample],
    encode: Callable[[Sample], list[Encoded]],
    answer: Callable[[list[Sample], list[list[Encoded]]], Sequence[Prediction]],
    settings: Callable[[Sample], Mapping[str, Any]],
    rows: Callable[[Sample], int],
    batch_size: int,
    label: str,
    cache: AnswerCache | None = None,
) -> list[Prediction]:
    """The predictions for samples, in their order.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: the questions; they are sorted by length to reduce padding.
        encode: the tensors of a question: its prompt, or its candidates.
        answer: the predictions for a batch of questions.
        settings: what a prediction depends on besides the model and the tensors.
        rows: the rows that a question takes in a batch.
        batch_size: the most rows in a batch; a question with more is a batch of its own.
        label: the label of the progress display.
        cache: known answers, to which new ones are added; None: all are computed.
    """
    predictions: dict[int, Prediction] = {}
    batch: list[tuple[int, str, list[Encoded]]] = []

    def flush() -> None:
        indices, keys, encoded = zip(*batch, strict=True)
        with torch.no_grad(), training_autocast(model):  # tensors of inference mode could not train on at ZeRO-3
            answers = list(answer([samples[index] for index in indices], list(encoded)))
        predictions.update(zip(indices, answers, strict=True))
        if cache is not None:
            cache.add(dict(zip(keys, answers, strict=True)))
        progress.update(len(batch))
        batch.clear()

    with in_eval_mode(model), EvaluationProgress(label, len(samples)) as progress:
        for index in sorted(range(len(samples)), key=lambda index: _length(samples[index])):
            sample = samples[index]
            encoded, key = encode(sample), ""
            if cache is not None:
                key = question_key(encoded, settings(sample))
                if (known := cache.get(key)) is not None:
                    predictions[index] = known
                    progress.skip(1)
                    continue
            if batch and sum(rows(samples[other]) for other, _, _ in batch) + rows(sample) > batch_size:
                flush()
            batch.append((index, key, encoded))
        if batch:
            flush()
    return [predictions[index] for index in range(len(samples))]


def _length(sample: Sample) -> tuple[int, int]:
    """A sort key for the length of a prompt: its images, which have most of the tokens, and the characters of its text."""
    return len(sample.images), sum(len(text_of(message)) for message in sample.messages[:-1])
