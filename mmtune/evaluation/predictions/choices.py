"""Multiple-choice scoring: the log-likelihood of each candidate answer of a question."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_choices
from mmtune.data.message import RowError, Sample
from mmtune.evaluation.predictions.answer_cache import AnswerCache
from mmtune.evaluation.predictions.decoding import NEAR_TIE
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.evaluation.predictions.prompt_cache import TOKEN_INPUTS, score_from_prompt, shares_prompt, sum_log_likelihoods
from mmtune.evaluation.predictions.running import Encoded, answer_questions
from mmtune.models.compute import count_virtual_tokens, move_batch
from mmtune.models.generation import run_generate


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
    """Log-likelihoods of all candidate answers, one natural logarithm per choice of each sample; as `predict_choices`."""
    return [prediction.scores for prediction in predict_choices(model, processor, samples, batch_size, label)]


def predict_choices(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    batch_size: int,
    label: str = "scoring",
    cache: AnswerCache | None = None,
) -> list[Prediction]:
    """The most likely choices of samples, given the conversation before the answer, with the log-likelihood of each choice.

    A log-likelihood is the sum over the candidate's tokens and the end-of-turn token. With the end-of-turn token no candidate is
    a prefix of another, so the candidates of a question are mutually exclusive. The sum is not normalized by length.

    The prompt of a question, with its images, is computed once, and its candidates continue it, where `shares_prompt`; elsewhere
    it is computed with every candidate.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: conversations with `choices`; the last answer of each is not shown to the model.
        batch_size: candidates per batch.
        label: the label of the progress display.
        cache: known answers, to which new ones are added; None: all are computed.

    Raises:
        RowError: a sample without choices, or one that cannot be encoded.
    """
    for sample in samples:
        check_choices(sample)
    score_batch = _score_shared if shares_prompt(model) else _score_plain

    def answer(questions: list[Sample], candidates: list[list[Encoded]]) -> list[Prediction]:
        scores = score_batch(model, processor, candidates, batch_size)
        tokens = [tuple(int((each["labels"] != IGNORE_INDEX).sum()) for each in encoded) for encoded in candidates]
        return [choice_prediction(*each) for each in zip(questions, map(tuple, scores), tokens, strict=True)]

    return answer_questions(
        model,
        samples,
        lambda sample: encode_choices(sample, processor),
        answer,
        lambda sample: {"kind": "choices", "choices": sample.choices},
        lambda sample: len(sample.choices),
        batch_size,
        label,
        cache,
    )


def choice_prediction(sample: Sample, scores: tuple[float, ...], tokens: tuple[int, ...]) -> Prediction:
    """The most likely choice of a sample from their log-likelihoods; the first one if several are equal.

    Args:
        tokens: the number of tokens of each choice.
    """
    first, second = sorted(scores, reverse=True)[:2]
    return Prediction(sample.choices[scores.index(first)], first - second < NEAR_TIE, scores=scores, tokens=tokens)


def _score_shared(
    model: nn.Module, processor: ProcessorMixin, questions: list[list[Encoded]], batch_size: int
) -> list[list[float]]:
    prompts, continuations = [], []
    for candidates in questions:
        start = _common_length(candidates)
        prompt = {key: value[:, :start] if key in TOKEN_INPUTS else value for key, value in candidates[0].items()}
        prompts.append({key: value for key, value in prompt.items() if key != "labels"})
        continuations.append([_continuation(candidate, start) for candidate in candidates])
    batch = move_batch(model, collate(prompts, processor.tokenizer.pad_token_id, side="left"))
    score = partial(score_from_prompt, continuations=continuations, rows_at_once=batch_size)
    scores: list[list[float]] = run_generate(model, processor, batch, 1, custom_generate=score)
    return scores


def _common_length(candidates: list[Encoded]) -> int:
    """The number of tokens before the answer that all candidates begin with."""
    first = candidates[0]["input_ids"][0]
    length = int((candidates[0]["labels"][0] != IGNORE_INDEX).nonzero()[0])
    for candidate in candidates[1:]:
        length = min(length, int((candidate["labels"][0] != IGNORE_INDEX).nonzero()[0]))
        different = (candidate["input_ids"][0, :length] != first[:length]).nonzero()
        length = int(different[0]) if len(different) else length
    return length


def _continuation(candidate: Encoded, start: int) -> Encoded:
    """The per-token tensors of a candidate from `start` to its last token with a label."""
    end = int((candidate["labels"][0] != IGNORE_INDEX).nonzero()[-1]) + 1
    return {key: value[:, start:end] for key, value in candidate.items() if key in TOKEN_INPUTS and value.ndim == 2}


def _score_plain(
    model: nn.Module, processor: ProcessorMixin, questions: list[list[Encoded]], batch_size: int
) -> list[list[float]]:
    candidates = [candidate for question in questions for candidate in question]
    scores: list[float] = []
    for start in range(0, len(candidates), batch_size):
        scores += _log_likelihoods(model, candidates[start : start + batch_size], processor.tokenizer.pad_token_id)
    remaining = iter(scores)
    return [[next(remaining) for _ in question] for question in questions]


def _log_likelihoods(model: nn.Module, encoded: list[Encoded], pad_token_id: int) -> list[float]:
    return sum_log_likelihoods(*supervised_logits(model, encoded, pad_token_id))


def supervised_logits(model: nn.Module, encoded: list[Encoded], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict the supervised tokens of conversations.

    Logits of all positions of a batch may not fit in memory, so the model computes them only where some row has a label.

    Args:
        encoded: results of `encode_sample`.
        pad_token_id: the padding token.

    Returns:
        Logits of shape (rows, tokens, vocabulary), and labels of shape (rows, tokens), -100 where a row has none.
    """
    batch: dict[str, Any] = move_batch(model, collate(encoded, pad_token_id))
    labels = batch.pop("labels")
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()[:, 0]
    positions = supervised - 1 + count_virtual_tokens(model)
    if "decoder_input_ids" in batch:  # few classes with an encoder compute logits at some positions only
        logits = model(**batch).logits[:, positions]
    else:
        logits = model(**batch, logits_to_keep=positions).logits
    return logits, labels[:, supervised]
