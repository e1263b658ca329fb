"""Gradient x input: the first-order estimate of occlusion, from one backward pass for each answer token.

Simonyan, Vedaldi & Zisserman 2014 (arXiv 1312.6034) read the gradient of a class score at the pixels; Shrikumar et al. 2016,
"Not Just a Black Box" (arXiv 1605.01713) multiply it by the input. The input is here its difference from the occluded one: for a
cell, `pixel_values` minus `pixel_values` with the cell in the mean color; for a word, its embeddings minus the mean embedding.
The score is the inner product of gradient and difference. For a model that is linear in its input it equals occlusion (Ancona
et al. 2018, arXiv 1711.06104). Both inputs come from the model's processor, so every layout of `pixel_values` works: a picture,
tiles, or patches in rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import PER_TOKEN
from mmtune.evaluation.predictions.choices import supervised_logits
from mmtune.explain.explained_inputs import ExplainedInputs
from mmtune.explain.occlusion import token_log_probabilities
from mmtune.explain.word_embeddings import changed_embeddings, mean_embedding
from mmtune.models.compute import in_eval_mode, training_autocast
from mmtune.utils.errors import UserError

Change = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By tensor: the places of the values, flattened, that occluding a cell changes, and how much larger they are without it."""


def count_gradients(inputs: ExplainedInputs) -> int:
    """The backward passes of `gradient_scores`."""
    return len(inputs.answer_ids)


def gradient_scores(
    model: nn.Module, processor: ProcessorMixin, inputs: ExplainedInputs, batch_size: int, done: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each answer token, and the gradient x input of each cell and word.

    Args:
        batch_size: has no effect: one conversation is computed.
        done: called after each backward pass with 1.

    Returns:
        As `occlusion_scores`.

    Raises:
        UserError: no gradient reaches the pixels of the image.
    """
    changes = [_change(inputs.encoded, encoded) for encoded in inputs.without_cells(processor)]
    names = sorted({name for change in changes for name in change})
    first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    encoded = {**inputs.encoded, **{name: inputs.encoded[name].to(first.device, first.dtype) for name in names}}
    for name in names:
        encoded[name].requires_grad_()
    embedded: list[torch.Tensor] = []

    def keep(embeddings: torch.Tensor) -> torch.Tensor:
        embedded[:] = [embeddings.detach().requires_grad_()]
        return embedded[0].clone()  # some models write image features into it

    words = changed_embeddings(model, inputs.encoded["input_ids"].shape, keep)
    count = len(inputs.answer_ids)
    rows = []
    with torch.enable_grad(), in_eval_mode(model):
        baseline = mean_embedding(model)
        with training_autocast(model), words:
            logits, labels = supervised_logits(model, [encoded], processor.tokenizer.pad_token_id)
        values = token_log_probabilities(logits, labels)[0]
        for number, value in enumerate(values):
            gradients = torch.autograd.grad(
                value, [*embedded, *(encoded[name] for name in names)], retain_graph=number + 1 < count, allow_unused=True
            )
            if any(gradient is None for gradient in gradients):
                raise UserError(
                    f"model_type {model.config.model_type}: no gradient reaches the image's pixels or the prompt's embeddings; "  # type: ignore[union-attr]
                    "the method occlusion needs none"
                )
            rows.append(_products(gradients, embedded[0] - baseline, names, changes, inputs))
            done(1)
    return values.detach().cpu(), torch.stack(rows, dim=1)


def _change(encoded: dict[str, torch.Tensor], without: dict[str, torch.Tensor]) -> Change:
    """What an occluded cell changes; most of the values stay."""
    change = {}
    for name, value in encoded.items():
        if value.is_floating_point() and name not in PER_TOKEN:
            difference = value.double().flatten() - without[name].double().flatten()
            places = difference.nonzero()[:, 0]
            if len(places):
                change[name] = (places, difference[places])
    return change


def _products(
    gradients: tuple[torch.Tensor, ...],
    embedded: torch.Tensor,
    names: list[str],
    changes: list[Change],
    inputs: ExplainedInputs,
) -> torch.Tensor:
    """The score of each cell and word for one token, fp64.

    Args:
        gradients: at the embeddings, shape (1, tokens, width), and at each tensor of `names`.
        embedded: the embeddings minus the mean embedding.
    """
    at_words = (gradients[0].double() * embedded.detach().double()).sum(dim=-1)[0].cpu()
    at_pixels = {name: gradient.double().flatten().cpu() for name, gradient in zip(names, gradients[1:], strict=True)}
    cells = [
        sum((float(at_pixels[name][places] @ difference) for name, (places, difference) in change.items()), 0.0)
        for change in changes
    ]
    words = [float(at_words[list(word.positions)].sum()) for word in inputs.words]
    return torch.tensor([*cells, *words], dtype=torch.float64)
