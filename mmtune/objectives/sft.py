"""Supervised fine-tuning: cross entropy at supervised positions. Other objectives extend this class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import Collator, collate
from mmtune.data.dataset import SampleEncoder, dummy_sample
from mmtune.data.encoding.encode import IGNORE_INDEX
from mmtune.distributed.context import DistributedContext
from mmtune.models.assemble import ASSEMBLED_CLASS
from mmtune.models.compute import computes_loss, count_virtual_tokens
from mmtune.models.experts.router_loss import SWITCH, RouterLoss, check_router_loss, has_router_loss, router_loss_of
from mmtune.models.load import ResolvedBase
from mmtune.models.packed_attention import packed_inputs
from mmtune.objectives.token_losses import by_chunks, cross_entropies
from mmtune.recipe.objective_section import ObjectiveSection
from mmtune.recipe.recipe import DataSection, Recipe
from mmtune.utils.errors import UserError, errors_at_key


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """Mask of the positions that predict a supervised token, shape (batch, length), from labels of the same shape."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] != IGNORE_INDEX


def score_supervised_only(inputs: dict[str, Any], virtual_tokens: int = 0) -> dict[str, Any]:
    """Ask the model for logits at supervised positions only.

    The loss is unchanged: positions with label -100 contribute nothing to cross entropy, so not computing their logits
    saves memory and time and changes no gradient.

    Args:
        inputs: a batch with `labels` of shape (batch, length), int64.
        virtual_tokens: the number of tokens that a prompt method puts before the input.

    Returns:
        The batch with `shift_labels` of shape (supervised,), and `logits_to_keep`, a boolean mask of shape
        (batch, virtual tokens + length) that selects the positions that predict them.
    """
    keep = supervised_positions(inputs["labels"])
    targets = inputs["labels"][:, 1:][keep[:, :-1]]
    mask = nn.functional.pad(keep, (virtual_tokens, 0), value=False)
    return {**inputs, "shift_labels": targets, "logits_to_keep": mask}


def scored_positions(inputs: dict[str, Any]) -> torch.Tensor:
    """The supervised positions of `inputs` from `model_inputs`, without virtual tokens, shape (batch, length)."""
    mask: torch.Tensor = inputs["logits_to_keep"]
    return mask[:, -inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1] :]


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model that computes no loss: `inputs` from `score_supervised_only` without their labels."""
    return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, each a sum over its supervised tokens divided by the number of them in the optimizer step.

    Attributes:
        loss: what is minimized, a scalar with a gradient.
        logits: at the supervised positions, shape (..., supervised, vocabulary).
        outputs: the model's.
        parts: scalars to report by name, without a gradient, where the loss has several parts.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    outputs: Any
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class SupervisedTuning:
    """The objective `sft`, and what any objective defines: its batches, the denominator of a step, its loss.

    A row must give a conversation (`mmtune.data.message.Sample`) with at least one supervised answer.

    Args:
        settings: the recipe's `objective` section.
    """

    def __init__(self, settings: ObjectiveSection) -> None:
        self.settings = settings
        self._router_loss: RouterLoss | None = None  # of the model that trains, from the first `model_inputs` on

    def check(self, recipe: Recipe, base: ResolvedBase) -> None:
        """Compare the objective with the recipe and the base's config and processor, before any weight is loaded.

        Training calls it always, `mmtune recipe check` only for an objective with further models. What the recipe alone shows
        belongs into the section's `conflicts`.

        Raises:
            UserError: they do not fit.
        """
        with errors_at_key("objective.router_aux_loss_coef"):
            line = check_router_loss(base.config, ASSEMBLED_CLASS, self.settings.router_aux_loss_coef)
        if line is not None:
            print(line)

    def load_models(self, recipe: Recipe, device: torch.device, dist: DistributedContext) -> None:
        """Load the frozen models of the objective, in full on this process's device."""

    def build_meta_models(self, recipe: Recipe) -> None:
        """Build the frozen models without weights (meta tensors), for the memory plan."""

    @property
    def frozen_models(self) -> list[nn.Module]:
        """The models beside the trained one that run a forward pass on every batch; memory and FLOPs count them."""
        return []

    def encoder(self, processor: ProcessorMixin, section: DataSection) -> SampleEncoder:
        """Encodes one row for this objective."""
        return SampleEncoder(processor, section)

    def collator(self, processor: ProcessorMixin, packed: bool = False, always_images: bool = False) -> Collator:
        """Makes a batch of encoded rows.

        Args:
            packed: all rows of a batch in one sequence.
            always_images: a batch without images gets a dummy sample with one, so that every process runs the vision tower in
                every step; the others would wait for it at ZeRO-3 and in DDP.
        """
        return Collator(pad_token_id(processor), dummy_sample(processor) if always_images else None, packed)

    def dummy_batch(self, processor: ProcessorMixin) -> dict[str, torch.Tensor]:
        """A batch that adds nothing to the loss, to the denominator or to any gradient."""
        return collate([dummy_sample(processor)], pad_token_id(processor))

    def denominator(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """What the summed loss of these batches is divided by, a scalar int64: the number of supervised tokens.

        The trainer adds those of all processes; zero is a step without a sample.
        """
        return torch.stack([supervised_positions(batch["labels"]).sum() for batch in batches]).sum()

    def model_inputs(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch.

        Args:
            model: without the wrappers of a distributed run.

        Returns:
            The inputs of `score_supervised_only`; with `labels` only if the model's class computes their loss.
        """
        inputs = score_supervised_only(packed_inputs(model, batch), count_virtual_tokens(model))
        if "decoder_input_ids" in inputs or not computes_loss(model):
            del inputs["labels"]
        self._router_loss = router_loss_of(model, self.settings.router_aux_loss_coef)
        if self._router_loss is not None:
            inputs[SWITCH] = True
        elif self.settings.router_aux_loss_coef == 0 and has_router_loss(model):
            inputs[SWITCH] = False
        return inputs

    def compute_loss(self, model: Callable[..., Any], inputs: dict[str, Any], denominator: torch.Tensor | int) -> Losses:
        """Forward pass and loss of one batch.

        Args:
            model: the model that trains, with its wrappers. Without labels (`without_labels`) it computes no loss. Its
                logits have the shape (..., supervised, vocabulary).
            inputs: from `model_inputs`; `shift_labels` has the targets of the logits, int64, shape (supervised,).
            denominator: of the whole optimizer step, over all processes.

        Returns:
            Sums over the batch's supervised tokens, divided by the denominator. A dummy batch has no such token: its loss is a
            zero with a gradient.
        """
        if "labels" in inputs:
            outputs = model(**inputs, num_items_in_batch=denominator)
            return self.with_router_loss(Losses(outputs["loss"], outputs["logits"], outputs), inputs, denominator, added=True)
        outputs = _supervised_outputs(model, without_labels(inputs))
        losses = by_chunks(cross_entropies, outputs["logits"].flatten(end_dim=-2), inputs["shift_labels"])
        return self.with_router_loss(Losses(losses.sum() / denominator, outputs["logits"], outputs), inputs, denominator)

    def with_router_loss(
        self, losses: Losses, inputs: dict[str, Any], denominator: torch.Tensor | int, added: bool = False
    ) -> Losses:
        """The losses with the router's, where a mixture of experts trains with one.

        A forward pass has one value. Its share in an optimizer step is that of the batch's supervised tokens, so that the shares
        of all batches and processes sum to 1, and a dummy batch has none. transformers' Trainer adds the full value for each.

        Args:
            inputs, denominator: as in `compute_loss`.
            added: whether the model has added it, in full, to the loss that it computed from labels.
        """
        if self._router_loss is None:
            return losses
        value = losses.outputs["aux_loss"]
        if not isinstance(value, torch.Tensor):
            raise UserError("objective.router_aux_loss_coef: the model has no router; leave it out")
        share = inputs["shift_labels"].numel() / denominator
        weight = self._router_loss.added if added else 0.0
        parts = losses.parts or {"crossentropy": (losses.loss - weight * value).detach()}
        loss = losses.loss + (self._router_loss.coefficient * share - weight) * value
        return replace(losses, loss=loss, parts={**parts, "router_aux": (share * value).detach()})

    def held_out_losses(self, losses: Losses) -> dict[str, torch.Tensor]:
        """What an evaluation while training reports of a batch: `loss`, and `loss_NAME` for each part of a loss of several.

        The router's term is left out: its value depends on which rows share a batch.

        Args:
            losses: from `compute_loss` with a denominator of 1.

        Returns:
            Sums over the supervised tokens of the batch.
        """
        parts = {f"loss_{name}": part for name, part in losses.parts.items() if name != "router_aux"}
        router = 0.0 if self._router_loss is None else self._router_loss.coefficient * losses.parts["router_aux"]
        return {"loss": losses.loss - router, **(parts if len(parts) > 1 else {})}

    def losses_by_source(
        self, losses: Losses, inputs: dict[str, Any], sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A loss of every supervised token and the number of its data source, both of shape (supervised,).

        The log has it as `loss/SOURCE`. This is the cross entropy, which compares sources alike for every objective.

        Args:
            sources: the source of every token of the batch, int64, shape (batch, length).
        """
        logits = losses.logits.detach().flatten(end_dim=-2)
        by_token = by_chunks(cross_entropies, logits, inputs["shift_labels"]).double().cpu()
        return by_token, sources[scored_positions(inputs)]


def _supervised_outputs(model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """The model's outputs, with logits at supervised positions. Few classes with an encoder take a mask, so they compute all."""
    if "decoder_input_ids" not in inputs:
        return model(**inputs)
    outputs = model(**{name: value for name, value in inputs.items() if name != "logits_to_keep"})
    outputs["logits"] = outputs["logits"][inputs["logits_to_keep"]]
    return outputs


def pad_token_id(processor: ProcessorMixin) -> int:
    """The token that fills shorter rows of a batch."""
    return int(processor.tokenizer.pad_token_id)
