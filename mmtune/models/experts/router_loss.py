"""The load-balancing loss of a mixture of experts (arXiv 2101.03961, equations 4 to 6), as the class of a model computes it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig

from mmtune.utils.errors import UserError
from mmtune.utils.transformers_private import model_class

SWITCH = "output_router_logits"
"""transformers' setting of a config, and argument of a forward pass, that switches the loss on."""


@dataclass(frozen=True)
class RouterLoss:
    """The loss as one model has it.

    Attributes:
        coefficient: its weight in the training loss.
        added: the weight with which the class adds it to the loss that it computes from labels.
    """

    coefficient: float
    added: float


def router_loss_of(model: nn.Module, coefficient: float | None) -> RouterLoss | None:
    """The loss of a model in training; None where it is off.

    Args:
        model: plain or wrapped by PEFT.
        coefficient: the recipe's; None takes the config's.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return _settle(type(inner), inner.config, coefficient)


def has_router_loss(model: nn.Module) -> bool:
    """Whether the class of a model, plain or wrapped by PEFT, computes the loss where it is switched on."""
    return _computes_loss(type(model.get_base_model() if isinstance(model, PeftModel) else model))


def check_router_loss(config: PreTrainedConfig | None, default_class: type[nn.Module], coefficient: float | None) -> str | None:
    """Check before any weight is loaded that the class of a model has the loss that a recipe asks for.

    Args:
        config: the model's; None for a model of `default_class`.
        default_class: the class of models that are built here.
        coefficient: the recipe's; None takes the config's.

    Returns:
        A line about a loss that the config switches on, or that it names and its class does not have; None where there is
        nothing to say.

    Raises:
        UserError: the class computes no such loss.
    """
    kind = default_class if config is None else model_class(config)
    if kind is None:  # of code in the checkpoint; its loss is found when the model is loaded
        return None
    if coefficient and not _computes_loss(kind):
        raise UserError(
            f"{kind.__name__} computes no router loss, so nothing would be added to the loss; leave router_aux_loss_coef out"
        )
    if config is None or coefficient is not None or not getattr(config.get_text_config(), SWITCH, False):
        return None
    if not _computes_loss(kind):
        return f"{SWITCH} of the base's config has no effect: {kind.__name__} computes no router loss"
    weight = _config_coefficient(config)
    return f"router loss: router_aux_loss_coef {weight:g}, as the base's config has it ({SWITCH}: true); write 0 to leave it out"


def _settle(kind: type[nn.Module], config: PreTrainedConfig, coefficient: float | None) -> RouterLoss | None:
    is_on = bool(coefficient) or (coefficient is None and getattr(config.get_text_config(), SWITCH, False))
    if not is_on or not _computes_loss(kind):
        return None
    added = _config_coefficient(config)
    return RouterLoss(added if coefficient is None else coefficient, added)


def _config_coefficient(config: PreTrainedConfig) -> float:
    return float(config.get_text_config().router_aux_loss_coef)


def _computes_loss(kind: type[nn.Module]) -> bool:
    return SWITCH in inspect.signature(kind.forward).parameters
