"""Answers of a model to the last questions of samples: generated text, or the most likely choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.answer_decoding import decode_answers
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import Sample, prompt_messages
from mmtune.evaluation.predictions.answer_cache import AnswerCache
from mmtune.evaluation.predictions.choices import predict_choices
from mmtune.evaluation.predictions.decoding import DecodingSettings, TokenChoice
from mmtune.evaluation.predictions.likelihood_choice import most_likely_choices
from mmtune.evaluation.predictions.prediction import Prediction, vote
from mmtune.evaluation.predictions.prompt_cache import answer_prompts, shares_prompt
from mmtune.evaluation.predictions.running import Encoded, answer_questions
from mmtune.models.compute import count_virtual_tokens, move_batch
from mmtune.models.generation import generate, generation_settings, padding_side
from mmtune.recipe.recipe import EvaluateSection


def predict_answers(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    section: EvaluateSection,
    label: str,
    cache: AnswerCache | None = None,
) -> list[Prediction]:
    """The prediction for each sample: generated text, or the most likely choice."""
    if section.score == "choices":

        def predict(questions: Sequence[Sample], progress: str) -> list[Prediction]:
            return predict_choices(model, processor, questions, section.batch_size, progress, cache)

        return most_likely_choices(samples, section.choice_scores, predict, label)
    predictions = generate_predictions(model, processor, samples, decoding_of(section), section.batch_size, label, cache)
    return [vote(prediction, section.answer_after) for prediction in predictions]


def decoding_of(section: EvaluateSection) -> DecodingSettings:
    """How the recipe's `evaluate` section generates answers."""
    sampling = section.sampling
    if sampling is None:
        return DecodingSettings(section.max_new_tokens)
    return DecodingSettings(section.max_new_tokens, sampling.temperature, sampling.num_return_sequences, sampling.seed)


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
    cache: AnswerCache | None = None,
) -> list[Prediction]:
    """Generated answers to the last questions of samples, in the order of the samples.

    Several answers to one question share the cache of its prompt where `shares_prompt`.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: conversations that end with an answer, which is not shown to the model.
        decoding: how to generate.
        batch_size: answers per batch.
        label: the label of the progress display.
        cache: known answers, to which new ones are added; None: all are generated.
    """
    generation = generation_settings(model, processor, decoding.max_new_tokens)

    def encode(sample: Sample) -> list[Encoded]:
        return [encode_prompt(sample.id, prompt_messages(sample), processor, sample.tools)]

    def settings(sample: Sample) -> dict[str, Any]:
        sampled = {"row": sample.id} if decoding.temperature else {}
        return {"kind": "generate", **asdict(decoding), **generation, **sampled}

    def answer(questions: list[Sample], prompts: list[list[Encoded]]) -> list[Prediction]:
        predictions: dict[int, Prediction] = {}
        for group in _batch_groups(model, [prompt for [prompt] in prompts]):
            choice = TokenChoice(decoding, generation["eos_token_id"], [questions[index].id for index in group])
            answers = _answer_batch(model, processor, [prompts[index][0] for index in group], decoding, choice)
            predictions.update(zip(group, answers, strict=True))
        return [predictions[index] for index in range(len(questions))]

    return answer_questions(model, samples, encode, answer, settings, lambda _: decoding.answers, batch_size, label, cache)


def _batch_groups(model: nn.Module, prompts: list[Encoded]) -> list[list[int]]:
    """Indices of the prompts that may share a batch: all, or those of equal length if the model has virtual tokens.

    PEFT puts virtual tokens before the padding. Padding would change their distance to the prompt, and with it the answer.
    """
    if not count_virtual_tokens(model):
        return [list(range(len(prompts)))]
    lengths: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        lengths.setdefault(prompt["input_ids"].shape[1], []).append(index)
    return list(lengths.values())


def _answer_batch(
    model: nn.Module, processor: ProcessorMixin, prompts: list[Encoded], decoding: DecodingSettings, choice: TokenChoice
) -> list[Prediction]:
    count = decoding.answers
    shared = count > 1 and shares_prompt(model)
    rows = prompts if shared else [prompt for prompt in prompts for _ in range(count)]
    batch = move_batch(model, collate(rows, processor.tokenizer.pad_token_id, side=padding_side(model)))
    loop = partial(answer_prompts, choice=choice, repeats=count if shared else 1)
    output = generate(model, processor, batch, decoding.max_new_tokens, custom_generate=loop)
    texts = decode_answers(processor.tokenizer, output.tolist())
    near_ties = choice.near_ties_of_rows()
    return [
        Prediction(texts[start], near_ties[start], answers=tuple(texts[start : start + count]) if count > 1 else ())
        for start in range(0, len(texts), count)
    ]
