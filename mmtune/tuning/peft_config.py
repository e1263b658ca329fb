"""The PEFT configuration of a recipe's `tune` section, with full paths of the adapted modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn

from mmtune.families.structure import Components
from mmtune.methods.method_table import METHODS, full_modules_config
from mmtune.methods.soft_verbalizer import trained_rows
from mmtune.models.components import select_modules, select_parameters
from mmtune.recipe.recipe import ComponentTuning, TuneSection
from mmtune.utils.errors import RecipeValueError, errors_at_key

SELECTORS = {"modules": select_modules, "parameters": select_parameters}


def peft_config(
    model: nn.Module, components: Components, tune: TuneSection, steps: int | None, label_tokens: Sequence[int] = ()
) -> PeftConfig:
    """The method's configuration, and the components trained in full as `modules_to_save`.

    Args:
        steps: optimizer steps of the run, for methods with a schedule over it.
        label_tokens: token ids of the labels of a soft verbalizer.

    Raises:
        UserError: a selector that matches nothing, or settings that do not fit the model.
    """
    saved = saved_modules(model, components, tune)
    if tune.method is None:
        return full_modules_config(saved)
    method = METHODS[tune.method]
    users = {name: tuning for name, tuning in tune.components.items() if tuning.method == method.name}
    # What may differ between components is resolved below; the rest is the same in each.
    settings = {**next(iter(users.values())).settings, **(users["language"].settings if "language" in users else {})}
    roots = {name: str(component_path(components, name)) for name in users}
    if (targets := method.find_targets(model, roots, settings)) is not None:
        settings["target_modules"] = targets
    for key, kind in method.selectors.items():
        if selected := _selected(SELECTORS[kind], model, components, users, key):
            settings[key] = [path for paths in selected.values() for path in paths]
            if key == "target_modules" and len(users) > 1:
                by_component = {name: tuning.settings for name, tuning in users.items()}
                settings |= method.settings_by_component(selected, by_component)
    with errors_at_key(f"tune.{next(iter(users))}"):
        settings = method.settle_targets(model, settings)
        if label_tokens:
            settings["trainable_token_indices"] = trained_rows(model, label_tokens)
        modules = {path: model.get_submodule(path) for path in settings.get("target_modules") or ()}
        method.check_model(model, modules, settings)
    return method.build_config(settings, saved or None, steps)


def _selected(
    select: Any, model: nn.Module, components: Components, users: Mapping[str, ComponentTuning], key: str
) -> dict[str, list[str]]:
    selected = {}
    for name, tuning in users.items():
        if tuning.settings.get(key):
            with errors_at_key(f"tune.{name}.{key}"):
                selected[name] = select(model, components, name, tuning.settings[key])
    return selected


def saved_modules(model: nn.Module, components: Components, tune: TuneSection) -> list[str]:
    """Modules that train in full beside an adapter."""
    saved: list[str] = []
    vision_whole = tune.vision.method == "full" and "target_modules" not in tune.vision.settings
    inside = str(components.projector).startswith(f"{components.vision_tower}.")
    for name, tuning in tune.components.items():
        if tuning.method != "full":
            continue
        if "target_modules" in tuning.settings:
            with errors_at_key(f"tune.{name}.target_modules"):
                saved += select_modules(model, components, name, tuning.settings["target_modules"])  # type: ignore[arg-type]
            continue
        if name == "vision" and inside and tune.projector.method != "full":
            raise RecipeValueError(
                "tune.vision", "this family's projector lies inside its vision tower; train both in full, or neither"
            )
        if name == "language":
            raise RecipeValueError(
                "tune.language",
                "full beside a method in another component would save the whole language model in the adapter; "
                "tune those components in full too, or name some layers with target_modules",
            )
        if name == "vision":
            saved += components.towers
        if name == "projector" and components.projector is not None and not (vision_whole and inside):
            saved += _saved_modules(model, components.projector)
        kept_frozen = frozen_parts(model, components, tune)
        for part in components.projector_extras if name == "projector" else ():
            if part not in kept_frozen:
                saved += _saved_modules(model, part)
    return saved


def _saved_modules(model: nn.Module, part: str) -> list[str]:
    """The part, or the modules of a list, such as Qwen3-VL's mergers: PEFT saves no bare list."""
    inner = model.get_submodule(part)
    return [f"{part}.{index}" for index in range(len(inner))] if isinstance(inner, nn.ModuleList) else [part]


def frozen_parts(model: nn.Module, components: Components, tune: TuneSection) -> list[str]:
    """Bare parameters of a projector that trains in full beside an adapter: PEFT saves modules, so these stay as they are.

    LLaVA-NeXT and LLaVA-OneVision have one, `image_newline`, a vector that ends each row of image features.
    """
    if tune.projector.method != "full" or "target_modules" in tune.projector.settings or not keeps_adapter(tune):
        return []
    parameters = dict(model.named_parameters())
    return [part for part in components.projector_extras if part in parameters]


def keeps_adapter(tune: TuneSection) -> bool:
    """Whether the result is a PEFT directory beside the base rather than a whole model."""
    return tune.method is not None or (tune.language.method, tune.vision.method) == ("frozen", "frozen")


def component_path(components: Components, name: str) -> str | None:
    paths = {
        "vision": components.vision_tower,
        "projector": components.projector,
        "language": components.language_model,
    }
    return paths[name]
