"""Answers of a model to the last questions of samples: generated text, or the most likely choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import Sample, prompt_messages, text_of
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.predictions.choices import most_likely_choice, score_choices
from mmtune.evaluation.predictions.decoding import NEAR_TIE, DecodingSettings, TokenChoice
from mmtune.evaluation.predictions.prompt_cache import answer_prompts, shares_prompt
from mmtune.models.compute import count_virtual_tokens, in_eval_mode, move_batch, training_autocast
from mmtune.models.generation import generate, generation_settings, padding_side
from mmtune.recipe.recipe import EvaluateSection

Encoded = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one question.

    Attributes:
        text: the answer; of several sampled answers, the most frequent one.
        near_tie: whether rounding could change it: the two largest logits of one of its tokens, or the log-likelihoods of the two
            most likely choices, differ by less than `NEAR_TIE`.
        answers: all answers if several were sampled.
        scores: the log-likelihood of each choice.
    """

    text: str
    near_tie: bool = False
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


def decoding_of(section: EvaluateSection) -> DecodingSettings:
    """How the recipe's `evaluate` section generates answers."""
    sampling = section.sampling
    if sampling is None:
        return DecodingSettings(section.max_new_tokens)
    return DecodingSettings(section.max_new_tokens, sampling.temperature, sampling.num_return_sequences, sampling.seed)


def predict_answers(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], section: EvaluateSection, label: str
) -> list[Prediction]:
    """The prediction for each sample: generated text, or the most likely choice."""
    if section.score == "choices":
        scores = score_choices(model, processor, samples, section.batch_size, label)
        return [choice_prediction(sample, each) for sample, each in zip(samples, scores, strict=True)]
    predictions = generate_predictions(model, processor, samples, decoding_of(section), section.batch_size, label)
    return [vote(prediction, section.answer_after) for prediction in predictions]


def choice_prediction(sample: Sample, scores: tuple[float, ...]) -> Prediction:
    """The most likely choice of a sample with choices, from their log-likelihoods."""
    first, second = sorted(scores, reverse=True)[:2]
    return Prediction(most_likely_choice(sample, scores), first - second < NEAR_TIE, scores=scores)


def vote(prediction: Prediction, marker: str | None) -> Prediction:
    """The prediction whose text is the most frequent of several answers; of equally frequent ones, the first.

    Answers are compared by the text after the last `marker`, without case and white space around words.
    """
    if not prediction.answers:
        return prediction
    keys = [" ".join((text.rpartition(marker)[2] if marker else text).casefold().split()) for text in prediction.answers]
    winner = keys.index(Counter(keys).most_common(1)[0][0])  # of equal counts, the one counted first
    return Prediction(prediction.answers[winner], answers=prediction.answers)


def generate_answers(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int,
    label: str = "answering",
) -> list[str]:
    """Greedy answers to the last questions of samples, in the order of the samples; as `generate_predictions`."""
    predictions = generate_predictions(model, processor, samples, DecodingSettings(max_new_tokens), batch_size, label)
    return [prediction.text for prediction in predictions]


def generate_predictions(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    decoding: DecodingSettings,
    batch_size: int,
    label: str = "answering",
) -> list[Prediction]:
    """Generated answers to the last questions of samples, in the order of the samples.

    Several answers to one question share the cache of its prompt where `shares_prompt`.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: conversations that end with an answer, which is not shown to the model.
        decoding: how to generate.
        batch_size: answers per batch; questions are sorted by length to reduce padding.
        label: the label of the progress display.
    """
    predictions: dict[int, Prediction] = {}
    order = sorted(range(len(samples)), key=lambda index: _length(samples[index]))
    questions = max(1, batch_size // decoding.answers)
    stop = generation_settings(model, processor, decoding.max_new_tokens)["eos_token_id"]
    with in_eval_mode(model), EvaluationProgress(label, len(order)) as progress:
        for start in range(0, len(order), questions):
            chunk = order[start : start + questions]
            prompts = {i: encode_prompt(samples[i].id, prompt_messages(samples[i]), processor, samples[i].tools) for i in chunk}
            for group in _batch_groups(model, prompts):
                choice = TokenChoice(decoding, stop, [samples[index].id for index in group])
                answers = _answer_batch(model, processor, [prompts[index] for index in group], decoding, choice)
                predictions.update(zip(group, answers, strict=True))
                progress.update(len(group))
    return [predictions[index] for index in range(len(samples))]


def _length(sample: Sample) -> tuple[int, int]:
    """A sort key for the length of a prompt: its images, which have most of the tokens, and the characters of its text."""
    return len(sample.images), sum(len(text_of(message)) for message in sample.messages[:-1])


def _batch_groups(model: nn.Module, prompts: dict[int, Encoded]) -> list[list[int]]:
    """Indices of the prompts that may share a batch: all, or those of equal length if the model has virtual tokens.

    PEFT puts virtual tokens before the padding. Padding would change their distance to the prompt, and with it the answer.
    """
    if not count_virtual_tokens(model):
        return [list(prompts)]
    lengths: dict[int, list[int]] = {}
    for index, prompt in prompts.items():
        lengths.setdefault(prompt["input_ids"].shape[1], []).append(index)
    return list(lengths.values())


def _answer_batch(
    model: nn.Module, processor: ProcessorMixin, prompts: list[Encoded], decoding: DecodingSettings, choice: TokenChoice
) -> Iterator[Prediction]:
    count = decoding.answers
    shared = count > 1 and shares_prompt(model)
    rows = prompts if shared else [prompt for prompt in prompts for _ in range(count)]
    batch = move_batch(model, collate(rows, processor.tokenizer.pad_token_id, side=padding_side(model)))
    with torch.inference_mode(), training_autocast(model):
        output = generate(
            model,
            processor,
            batch,
            decoding.max_new_tokens,
            custom_generate=partial(answer_prompts, choice=choice, repeats=count if shared else 1),
        )
    texts = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
    near_ties = choice.near_ties_of_rows()
    for start in range(0, len(texts), count):
        yield Prediction(texts[start], near_ties[start], answers=tuple(texts[start : start + count]) if count > 1 else ())
