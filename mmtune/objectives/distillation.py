"""Knowledge distillation: a student learns the distribution, and on request the hidden states and attention, of a teacher.

Sources: soft labels, Hinton et al. (arXiv 1503.02531); the generalized Jensen-Shannon divergence, GKD (arXiv 2306.13649, equation
1), as TRL defines it; hidden states, TinyBERT (arXiv 1909.10351); attention distributions, MiniLM (arXiv 2002.10957).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mmtune.chat_templates.resolving import set_chat_template
from mmtune.data.dataset import dummy_sample
from mmtune.distributed.context import DistributedContext
from mmtune.distributed.sharded_parameters import unsharded_loading
from mmtune.models.compute import count_virtual_tokens
from mmtune.models.experts.router_loss import SWITCH
from mmtune.models.load import ResolvedBase
from mmtune.models.meta_model import read_model_config
from mmtune.models.packed_attention import check_packable_family, check_packable_method
from mmtune.objectives.distillation_losses import attention_divergences, divergences, hidden_state_errors
from mmtune.objectives.reference_model import ReferenceModel, find_reference_model
from mmtune.objectives.sft import Losses, SupervisedTuning, scored_positions, without_labels
from mmtune.objectives.teacher_checks import TEACHER, check_layers, check_model_inputs, check_vocabulary
from mmtune.objectives.token_losses import by_chunks, cross_entropies
from mmtune.recipe.objective_section import DistillationSection, LayerPairs
from mmtune.recipe.recipe import Recipe
from mmtune.utils.errors import RecipeValueError, errors_at_key


class Distillation(SupervisedTuning):
    """The objective `distillation`: batches, denominator and evaluation are those of `sft`, and the loss adds a frozen teacher's.

    loss = crossentropy_weight CE + distillation_weight D + hidden_states.weight H + attention_maps.weight A,
    where each term is a sum over supervised tokens divided by their number in the optimizer step, and H and A are means over the
    pairs of layers.
    """

    settings: DistillationSection

    def __init__(self, settings: DistillationSection) -> None:
        super().__init__(settings)
        self._teacher: nn.Module | None = None
        self._half = False
        self._located: ReferenceModel | None = None

    def check(self, recipe: Recipe, base: ResolvedBase) -> None:
        super().check(recipe, base)
        config = base.config or read_model_config(recipe.model)  # a model that is assembled here has none on disk
        if getattr(config, "is_encoder_decoder", False):
            raise RecipeValueError(
                "objective.type",
                f"distillation takes a model that continues its prompt, got the encoder-decoder {config.model_type}",
            )
        reference, processor = self._reference(recipe), base.processor
        with errors_at_key(TEACHER):
            theirs = reference.load_processor()
            if recipe.data.packing:
                check_packable_method(reference.method)
                check_packable_family(reference.config)
        check_vocabulary(processor.tokenizer.get_vocab(), theirs.tokenizer.get_vocab())
        set_chat_template(theirs, str(processor.chat_template))
        check_model_inputs(dummy_sample(processor), dummy_sample(theirs))
        check_layers(self.settings, config.get_text_config(), reference.config.get_text_config())

    def load_models(self, recipe: Recipe, device: torch.device, dist: DistributedContext) -> None:
        with unsharded_loading(dist), errors_at_key(TEACHER):
            self._set_teacher(recipe, self._reference(recipe).load().to(device))

    def build_meta_models(self, recipe: Recipe) -> None:
        with errors_at_key(TEACHER):
            self._set_teacher(recipe, self._reference(recipe).build_meta())

    @property
    def frozen_models(self) -> list[nn.Module]:
        return [] if self._teacher is None else [self._teacher]

    def compute_loss(self, model: Callable[..., Any], inputs: dict[str, Any], denominator: torch.Tensor | int) -> Losses:
        settings = self.settings
        unlabelled = without_labels(inputs)
        unlabelled |= {"output_hidden_states": True} if settings.hidden_states else {}
        unlabelled |= {"output_attentions": True} if settings.attention_maps else {}
        positions = scored_positions(inputs)
        asked = {name: value for name, value in unlabelled.items() if name != SWITCH}  # the teacher's routers do not train
        student, teacher = model(**unlabelled), self._ask_teacher(asked, positions)
        logits, soft = student["logits"].flatten(end_dim=-2), teacher["logits"].flatten(end_dim=-2)
        scored = logits if settings.crossentropy_weight else logits.detach()  # then reported only
        divergence = partial(divergences, beta=settings.beta, temperature=settings.temperature)
        weights = {"crossentropy": settings.crossentropy_weight, "distillation": settings.distillation_weight}
        terms = {
            "crossentropy": by_chunks(cross_entropies, scored, inputs["shift_labels"]),
            "distillation": by_chunks(divergence, logits, soft),
        }
        if settings.hidden_states is not None:
            masks = inputs["logits_to_keep"], self._teacher_mask(positions)
            states = student["hidden_states"], teacher["hidden_states"]
            weights["hidden_states"] = settings.hidden_states.weight
            terms["hidden_states"] = _over_pairs(settings.hidden_states, hidden_state_errors, states, masks)
        if settings.attention_maps is not None:
            maps = [[layer.transpose(1, 2) for layer in each["attentions"]] for each in (student, teacher)]
            weights["attention_maps"] = settings.attention_maps.weight
            terms["attention_maps"] = _over_pairs(settings.attention_maps, attention_divergences, maps, (positions, positions))
        parts = {name: values.sum() / denominator for name, values in terms.items()}
        loss = torch.stack([weight * parts[name] for name, weight in weights.items() if weight]).sum()
        losses = Losses(loss, student["logits"], student, {name: part.detach() for name, part in parts.items()})
        return self.with_router_loss(losses, inputs, denominator)

    def _reference(self, recipe: Recipe) -> ReferenceModel:
        """The teacher, located once: a later lookup could find a newer checkpoint of a run that has not finished."""
        if self._located is None:
            attention = "eager" if self.settings.attention_maps else None
            with errors_at_key(TEACHER):
                self._located = find_reference_model(self.settings.teacher, recipe.model, attention)
        return self._located

    def _set_teacher(self, recipe: Recipe, teacher: nn.Module) -> None:
        self._teacher, self._half = teacher, recipe.model.precision != "fp32"

    def _teacher_mask(self, positions: torch.Tensor) -> torch.Tensor:
        """The supervised positions, shifted by the teacher's own virtual tokens."""
        assert self._teacher is not None  # loaded before training
        return nn.functional.pad(positions, (count_virtual_tokens(self._teacher), 0), value=False)

    def _ask_teacher(self, inputs: dict[str, Any], positions: torch.Tensor) -> Any:
        assert self._teacher is not None  # loaded before training
        inputs = inputs | {"logits_to_keep": self._teacher_mask(positions), "use_cache": False}
        with torch.no_grad(), torch.autocast(positions.device.type, torch.bfloat16, enabled=self._half):
            return self._teacher(**inputs)


def _over_pairs(
    pairs: LayerPairs,
    compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    layers: Sequence[Sequence[torch.Tensor]],
    masks: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The mean over pairs of layers, shape (supervised,); `layers` and `masks` are the student's and the teacher's."""
    (student, teacher), (student_mask, teacher_mask) = layers, masks
    return torch.stack([compare(student[s][student_mask], teacher[t][teacher_mask]) for s, t in pairs.layers]).mean(0)
