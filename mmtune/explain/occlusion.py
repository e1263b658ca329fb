"""Occlusion: the change of the log-probability of each answer token when a cell or a word is replaced.

Zeiler & Fergus 2014, "Visualizing and Understanding Convolutional Networks" (arXiv 1311.2901) slide a grey square over an image.
Here a cell of the image takes the image's mean color, and the tokens of a word take the mean embedding of the vocabulary; their
positions stay. Covert, Lundberg & Lee 2021, "Explaining by Removing" (arXiv 2011.14878) compare such replacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.evaluation.predictions.choices import supervised_logits
from mmtune.explain.explained_inputs import ExplainedInputs
from mmtune.explain.word_embeddings import changed_embeddings, mean_embedding
from mmtune.models.compute import in_eval_mode, training_autocast

LOGITS_AT_ONCE = 2**27
"""The most logits of a batch: 512 MiB in fp32."""


def count_occlusions(inputs: ExplainedInputs) -> int:
    """The forward passes of `occlusion_scores`."""
    return 1 + len(inputs.cells) + len(inputs.words)


def occlusion_scores(
    model: nn.Module, processor: ProcessorMixin, inputs: ExplainedInputs, batch_size: int, done: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each answer token, and how much of it each cell and word takes away when it is replaced.

    The unchanged conversation is computed in a batch of the same size, because half precision rounds differently in others.

    Args:
        batch_size: forward passes at once, fewer for a long answer.
        done: called after each batch with the number of its forward passes.

    Returns:
        fp64, shape (answer tokens,), and (cells + words, answer tokens): cells in reading order, then words.
    """
    pad_token_id, length = processor.tokenizer.pad_token_id, inputs.encoded["input_ids"].shape[1]
    rows = _rows(inputs, processor)
    results = []
    with torch.no_grad(), in_eval_mode(model):
        baseline = mean_embedding(model)
        size = _rows_at_once(model, inputs, batch_size)
        while chunk := list(islice(rows, size)):
            replaced = torch.zeros(len(chunk), length, dtype=torch.bool, device=baseline.device)
            for number, (_, positions) in enumerate(chunk):
                replaced[number, list(positions)] = True

            def replace_words(embeddings: torch.Tensor, replaced: torch.Tensor = replaced) -> torch.Tensor:
                return torch.where(replaced[..., None], baseline.to(embeddings.dtype), embeddings)

            words = changed_embeddings(model, replaced.shape, replace_words) if replaced.any() else nullcontext()
            with training_autocast(model), words:
                logits, labels = supervised_logits(model, [encoded for encoded, _ in chunk], pad_token_id)
            results.append(token_log_probabilities(logits, labels).cpu())
            done(len(chunk))
    values = torch.cat(results)
    return values[0], values[0] - values[1:]


def _rows(inputs: ExplainedInputs, processor: ProcessorMixin) -> Iterator[tuple[dict[str, torch.Tensor], tuple[int, ...]]]:
    """The tensors of each forward pass, with the positions of the tokens that are replaced in it."""
    yield inputs.encoded, ()
    for encoded in inputs.without_cells(processor):
        yield encoded, ()
    for word in inputs.words:
        yield inputs.encoded, word.positions


def _rows_at_once(model: nn.Module, inputs: ExplainedInputs, batch_size: int) -> int:
    """The rows of a batch whose logits fit in memory, at most `batch_size`."""
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return max(1, min(batch_size, LOGITS_AT_ONCE // (vocabulary * len(inputs.answer_ids))))


def token_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the labels but the last, the end of turn; fp64, shape (rows, tokens - 1).

    Args:
        logits: shape (rows, tokens, vocabulary), each predicting the label at its place.
        labels: int64, shape (rows, tokens).
    """
    logits = logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(dim=-1).gather(-1, labels[:, :-1, None])[..., 0].double()
