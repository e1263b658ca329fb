"""Answers of a model to the last questions of samples: generated text, or the most likely choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import Sample, prompt_messages, text_of
from mmtune.evaluation.choices import most_likely_choice, score_choices
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.models.compute import count_virtual_tokens, in_eval_mode, move_batch, training_autocast
from mmtune.models.generation import generate, padding_side
from mmtune.recipe.recipe import EvaluateSection


def predict_answers(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], section: EvaluateSection, label: str
) -> list[str]:
    """The prediction for each sample: generated text, or the most likely choice."""
    if section.score == "generate":
        return generate_answers(model, processor, samples, section.max_new_tokens, section.batch_size, label)
    scores = score_choices(model, processor, samples, section.batch_size, label)
    return [most_likely_choice(sample, sample_scores) for sample, sample_scores in zip(samples, scores, strict=True)]


def generate_answers(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int,
    label: str = "answering",
) -> list[str]:
    """Greedy answers to the last questions of samples, in the order of the samples.

    Args:
        model: in train or eval mode; it runs in eval mode, and its mode is restored.
        samples: conversations that end with an answer, which is not shown to the model.
        max_new_tokens: at most this many new tokens per answer.
        batch_size: questions per batch; questions are sorted by length to reduce padding.
        label: the label of the progress display.
    """
    tokenizer = processor.tokenizer
    answers: dict[int, str] = {}
    order = sorted(range(len(samples)), key=lambda index: sum(len(text_of(m)) for m in samples[index].messages[:-1]))
    with in_eval_mode(model), EvaluationProgress(label, len(order)) as progress:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            prompts = {i: encode_prompt(samples[i].id, prompt_messages(samples[i]), processor, samples[i].tools) for i in chunk}
            for group in _batch_groups(model, prompts):
                rows = [prompts[i] for i in group]
                batch = move_batch(model, collate(rows, tokenizer.pad_token_id, side=padding_side(model)))
                with torch.inference_mode(), training_autocast(model):
                    output = generate(model, processor, batch, max_new_tokens)
                texts = tokenizer.batch_decode(output, skip_special_tokens=True)
                answers.update(zip(group, texts, strict=True))
                progress.update(len(group))
    return [answers[index] for index in range(len(samples))]


def _batch_groups(model: nn.Module, prompts: dict[int, dict[str, torch.Tensor]]) -> list[list[int]]:
    """Indices of the prompts that may share a batch: all, or those of equal length if the model has virtual tokens.

    PEFT puts virtual tokens before the padding. Padding would change their distance to the prompt, and with it the answer.
    """
    if not count_virtual_tokens(model):
        return [list(prompts)]
    lengths: dict[int, list[int]] = {}
    for index, prompt in prompts.items():
        lengths.setdefault(prompt["input_ids"].shape[1], []).append(index)
    return list(lengths.values())
