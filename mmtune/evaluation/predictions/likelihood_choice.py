"""The most likely choice by adjusted log-likelihoods: per token, and relative to a content-free image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mmtune.data.media.image_content import media_key
from mmtune.data.media.media import EmbeddedMedia, image_size
from mmtune.data.message import RowError, Sample, images_in, text_of, with_images
from mmtune.evaluation.predictions.choices import choice_prediction
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.recipe.prompt_sections import ChoiceScores

PredictChoices = Callable[[Sequence[Sample], str], Sequence[Prediction]]
"""Predictions with log-likelihoods for samples; the second argument is the label of the progress display."""


def most_likely_choices(
    samples: Sequence[Sample], settings: ChoiceScores, predict: PredictChoices, label: str
) -> list[Prediction]:
    """The choice with the largest adjusted log-likelihood for each sample.

    With `calibrate`, the log-likelihood of a choice given the same conversation with a content-free image is subtracted (Zhao et
    al., arXiv 2102.09690; Holtzman et al., arXiv 2104.08315). It is computed once for conversations that differ in their images
    only. With `per_token`, the result is divided by the number of tokens of the choice, end of turn included.

    Args:
        predict: the log-likelihoods of the choices of samples.

    Raises:
        RowError: with `calibrate`, a sample whose question has no image.
    """
    predictions = list(predict(samples, label))
    priors = _content_free_scores(samples, predict, label) if settings.calibrate else [None] * len(samples)
    adjusted = []
    for sample, prediction, prior in zip(samples, predictions, priors, strict=True):
        scores = prediction.scores
        if prior is not None:
            scores = tuple(score - content_free for score, content_free in zip(scores, prior, strict=True))
        if settings.per_token:
            scores = tuple(score / tokens for score, tokens in zip(scores, prediction.tokens, strict=True))
        adjusted.append(choice_prediction(sample, scores, prediction.tokens))
    return adjusted


def _content_free_scores(samples: Sequence[Sample], predict: PredictChoices, label: str) -> list[tuple[float, ...] | None]:
    questions = [content_free_sample(sample) for sample in samples]
    keys = [content_key(question) for question in questions]
    distinct = dict(zip(keys, questions, strict=True))
    predictions = dict(zip(distinct, predict(list(distinct.values()), f"{label}, content-free"), strict=True))
    return [predictions[key].scores for key in keys]


def content_free_sample(sample: Sample) -> Sample:
    """The sample with a uniform grey image of the same size for each image of the last user turn that has one.

    Raises:
        RowError: no user turn has an image.
    """
    turns = [number for number, message in enumerate(sample.messages) if message["role"] == "user" and images_in(message)]
    if not turns:
        raise RowError(sample.id, "choices", "evaluate.choice_scores.calibrate needs a question with an image")
    messages = list(sample.messages)
    messages[turns[-1]] = with_images(messages[turns[-1]], lambda image: _grey_image(*image_size(image)))
    return replace(sample, messages=messages)


def content_key(sample: Sample) -> str:
    """The same text for samples with equal prompts and choices."""
    turns = [
        [message["role"], text_of(message), [media_key(image) for image in images_in(message)]]
        for message in sample.messages[:-1]
    ]
    return json.dumps([turns, sample.choices])


def _grey_image(width: int, height: int) -> EmbeddedMedia:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (127, 127, 127)).save(file, "PNG")
    return EmbeddedMedia(Path("content-free"), f"{width}x{height}.png", data=file.getvalue())
