"""Turn a loaded model into one that trains what the recipe names, and show exactly what that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from mmtune.errors import UserError
from mmtune.model.components import Components, component_of, select_modules
from mmtune.recipe import TuneSection


@dataclass(frozen=True)
class ComponentCount:
    """Parameters of one component: how many there are, how many train, by which method and at which rate."""

    component: str
    method: str
    total: int
    trainable: int
    learning_rate: float | None


def apply_tuning(model: PreTrainedModel, components: Components, tune: TuneSection) -> PreTrainedModel | PeftModel:
    """Freeze, unfreeze and wrap by the recipe's `tune` section.

    Args:
        model: the loaded base, on its device.
        components: where its vision tower, projector and language model are.
        tune: the recipe's section.

    Returns:
        A `PeftModel` when `keeps_adapter`, components trained in full then being its `modules_to_save`; otherwise the model
        itself with `requires_grad` set. Trainable parameters are fp32.

    Raises:
        UserError: a selector that matches nothing, or a component that the model lacks.
    """
    paths = {
        "vision": components.vision_tower,
        "projector": components.projector,
        "language": components.language_model,
    }
    chosen = {"vision": tune.vision, "projector": tune.projector, "language": tune.language}
    for name, tuning in chosen.items():
        if tuning.method != "frozen" and paths[name] is None:
            raise UserError(f"tune.{name}: {type(model).__name__} has no {name} component; set it to frozen")

    model.requires_grad_(False)
    full = [name for name, tuning in chosen.items() if tuning.method == "full"]
    if keeps_adapter(tune):
        tuned: PreTrainedModel | PeftModel = get_peft_model(model, _peft_config(model, components, tune, full))
    else:
        # The head is the language model's last layer; where it is tied to the embeddings it is the same parameter.
        for name, parameter in model.named_parameters():
            component = component_of(name, components)
            parameter.requires_grad_(("language" if component == "lm_head" else component) in full)
        tuned = model
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return tuned


def keeps_adapter(tune: TuneSection) -> bool:
    """Whether the result is a PEFT directory beside the base rather than a whole model."""
    return tune.language.method == "lora" or (tune.language.method, tune.vision.method) == ("frozen", "frozen")


def _peft_config(model: nn.Module, components: Components, tune: TuneSection, full: list[str]) -> LoraConfig:
    """LoRA on the language model, or on nothing, with the components trained in full as `modules_to_save`."""
    saved: list[str] = []
    if "vision" in full and components.vision_tower is not None:
        saved.append(components.vision_tower)
        inside = components.projector is not None and components.projector.startswith(components.vision_tower + ".")
        if inside and "projector" not in full:
            raise UserError("tune.vision: this family's projector lies inside its vision tower; train both in full, or neither")
        if inside:
            full = [name for name in full if name != "projector"]
    if "projector" in full and components.projector is not None:
        saved.append(components.projector)
        for part in components.projector_parts:
            if part not in dict(model.named_modules()):
                raise UserError(
                    f"tune.projector: {part} is a bare parameter, which PEFT cannot save beside an adapter; set tune.projector "
                    "to frozen, or train the language model in full"
                )
            saved.append(part)
    if tune.language.method == "frozen":
        return LoraConfig(task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved)
    settings = dict(tune.language.settings)
    targets = select_modules(model, components, "language", settings.pop("target_modules"))
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, modules_to_save=saved or None, **settings)


def count_parameters(model: nn.Module, components: Components, tune: TuneSection, learning_rate: float) -> list[ComponentCount]:
    """Parameters by component of a model that `apply_tuning` made; the frozen copy of a saved module is not counted.

    Args:
        learning_rate: the run's own rate, for components that name none.
    """
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        count = totals.setdefault(component_of(name, components), [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    head = totals.pop("lm_head", [0, 0])
    totals["language"] = [a + b for a, b in zip(totals["language"], head, strict=True)]
    chosen = {"vision": tune.vision, "projector": tune.projector, "language": tune.language}
    return [
        ComponentCount(
            name,
            chosen[name].method,
            total,
            trainable,
            (chosen[name].learning_rate or learning_rate) if trainable else None,
        )
        for name, (total, trainable) in totals.items()
    ]


def learning_rates(model: nn.Module, components: Components, tune: TuneSection) -> dict[str, float]:
    """Learning rate by parameter name, for the parameters whose component names a rate of its own."""
    own = {
        "vision": tune.vision.learning_rate,
        "projector": tune.projector.learning_rate,
        "language": tune.language.learning_rate,
        "lm_head": tune.language.learning_rate,
    }
    rates = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (rate := own[component_of(name, components)]) is not None:
            rates[name] = rate
    return rates


def print_parameters(counts: Sequence[ComponentCount]) -> None:
    """The table of trainable parameters by component."""
    table = Table(title="What trains", title_justify="left")
    for name, justify in [("component", "left"), ("method", "left"), ("parameters", "right"), ("trainable", "right")]:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("learning rate", justify="right")
    for count in counts:
        rate = "" if count.learning_rate is None else f"{count.learning_rate:g}"
        table.add_row(count.component, count.method, f"{count.total:,}", f"{count.trainable:,}", rate)
    total, trainable = sum(c.total for c in counts), sum(c.trainable for c in counts)
    table.add_section()
    table.add_row("all", "", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})", "")
    Console().print(table)
