"""Questions in batches of similar length: encoded, looked up in the cache, answered, with the progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn

from mmtune.data.message import RowError, Sample, text_of
from mmtune.data.processes import map_rows
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.predictions.answer_cache import AnswerCache, question_key
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.models.compute import in_eval_mode, training_autocast
from mmtune.utils.threads import core_share

Encoded = dict[str, torch.Tensor]

ENCODING_PROCESSES = 4
"""The most processes that encode questions while the model answers others."""
QUESTIONS_PER_PROCESS = 64
"""Fewer questions are encoded sooner than another process starts."""
QUESTIONS_AT_ONCE = 64
"""The most questions per task of an encoding process, which limits the images in memory; at most a batch."""


class _Arrays:
    """An encoded question as arrays, to be sent between processes; a tensor that candidates share is one array.

    Tensors themselves would be sent through shared memory, of which a container may have too little.
    """

    def __init__(self, encoded: list[Encoded]) -> None:
        tensors = {id(tensor): tensor for each in encoded for tensor in each.values()}
        self._names = [{name: id(tensor) for name, tensor in each.items()} for each in encoded]
        self._tensors = {
            number: (tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)
            for number, tensor in tensors.items()
        }

    def as_tensors(self) -> list[Encoded]:
        tensors = {number: torch.empty(shape, dtype=dtype) for number, (_, dtype, shape) in self._tensors.items()}
        for number, (content, _, _) in self._tensors.items():
            tensors[number].reshape(-1).view(torch.uint8).copy_(torch.from_numpy(content))
        return [{name: tensors[number] for name, number in names.items()} for names in self._names]


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

    Other processes encode the next questions where a core is left beside the model's.

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

    order = sorted(range(len(samples)), key=lambda index: _length(samples[index]))
    processes = min(ENCODING_PROCESSES, core_share() - 1, len(order) // QUESTIONS_PER_PROCESS)
    main_process = os.getpid()

    def encode_row(index: int) -> list[Encoded] | _Arrays:
        encoded = encode(samples[index])
        return encoded if os.getpid() == main_process else _Arrays(encoded)

    questions = map_rows(encode_row, order, processes, None, min(batch_size, QUESTIONS_AT_ONCE))
    with in_eval_mode(model), closing(questions), EvaluationProgress(label, len(samples)) as progress:
        for index, question in zip(order, questions, strict=True):
            if isinstance(question, RowError):
                raise question
            encoded = question.as_tensors() if isinstance(question, _Arrays) else question
            sample, key = samples[index], ""
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
