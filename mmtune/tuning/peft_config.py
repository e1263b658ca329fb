"""The PEFT configuration of a recipe's `tune` section: what it tunes by full path, and what does not fit the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import EvaConfig, LoraConfig, LoraGAConfig, OFTConfig, PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from mmtune.methods.bottleneck import BottleneckConfig, bottleneck_targets
from mmtune.methods.gated_prefix import gated_prefix_targets
from mmtune.methods.method_table import METHODS, MUTATING_INITS
from mmtune.models.components import Components, select_modules, select_parameters
from mmtune.recipe.recipe import ComponentTuning, TuneSection
from mmtune.utils.errors import RecipeValueError, UserError, errors_at_key


def peft_config(model: nn.Module, components: Components, tune: TuneSection, steps: int | None) -> PeftConfig:
    """The method's configuration, and the components trained in full as `modules_to_save`.

    Args:
        steps: optimizer steps of the run, for AdaLoRA.

    Raises:
        UserError: a selector that matches nothing, or settings that do not fit the model.
    """
    saved = saved_modules(model, components, tune)
    if tune.method is None:
        return LoraConfig(task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=saved)
    method = METHODS[tune.method]
    users = {name: tuning for name, tuning in tune.components.items() if tuning.method == method.name}
    # What may differ between components is resolved below; of the rest, each has the same.
    settings = {**next(iter(users.values())).settings, **(users["language"].settings if "language" in users else {})}
    if method.name == "bottleneck":
        placement = settings.get("placement", BottleneckConfig.placement)
        settings["target_modules"] = [
            path for name in users for path in bottleneck_targets(model, str(component_path(components, name)), placement)
        ]
    elif method.name == "gated_prefix":
        settings["target_modules"] = gated_prefix_targets(model, components.language_model, settings.get("adapter_layers"))
    elif method.kind == "layers":
        chosen = _selected(select_modules, model, components, users, "target_modules")
        settings["target_modules"] = [path for paths in chosen.values() for path in paths]
        if method.name == "lora" and len(users) > 1:
            settings["rank_pattern"] = {p: users[n].settings["r"] for n, paths in chosen.items() for p in paths}
            settings["alpha_pattern"] = {p: users[n].settings["lora_alpha"] for n, paths in chosen.items() for p in paths}
    for key, select in (("target_parameters", select_parameters), ("feedforward_modules", select_modules)):
        if settings.get(key):
            found = _selected(select, model, components, users, key)
            settings[key] = [path for paths in found.values() for path in paths]
    with errors_at_key(f"tune.{next(iter(users))}"):
        _check_fits(model, method.name, settings)
    if method.name == "adalora":
        settings["total_step"] = steps
    if settings.get("init_lora_weights") == "eva":
        settings["eva_config"] = EvaConfig(**(settings.get("eva_config") or {}))
    if settings.get("init_lora_weights") == "lora_ga":
        settings["lora_ga_config"] = LoraGAConfig(**(settings.get("lora_ga_config") or {}))
    return method.config_class()(task_type="CAUSAL_LM", modules_to_save=saved or None, **settings)


def _selected(
    select: Any, model: nn.Module, components: Components, users: Mapping[str, ComponentTuning], key: str
) -> dict[str, list[str]]:
    selected = {}
    for name, tuning in users.items():
        if tuning.settings.get(key):
            with errors_at_key(f"tune.{name}.{key}"):
                selected[name] = select(model, components, name, tuning.settings[key])
    return selected


def _check_fits(model: nn.Module, method: str, settings: Mapping[str, Any]) -> None:
    """Refuse what PEFT would take and train wrongly, save unreadably, or stumble over."""
    targets = {path: model.get_submodule(path) for path in settings.get("target_modules") or ()}
    linear = {path: module for path, module in targets.items() if isinstance(module, nn.Linear)}
    other = [path for path in targets if path not in linear]
    init = settings.get("init_lora_weights")
    mutates = isinstance(init, str) and init.startswith(MUTATING_INITS)
    if other and (method not in ("lora", "ln_tuning", "bottleneck", "gated_prefix") or mutates):
        told = f"init_lora_weights: {init}" if mutates else method
        raise UserError(f"{told} works on linear layers, and {other[0]} is a {type(targets[other[0]]).__name__}")
    if mutates:
        for path, module in linear.items():
            rank = (settings.get("rank_pattern") or {}).get(path, settings["r"])
            if rank > min(module.in_features, module.out_features):
                size = f"{module.in_features} x {module.out_features}"
                raise UserError(f"r: {rank} is more than {path} ({size}) has to decompose for init_lora_weights: {init}")
    _check_embeddings(model, targets, settings.get("trainable_token_indices"))
    if method == "adalora" and settings["target_r"] >= settings["init_r"]:  # PEFT would look for the 0th smallest importance
        raise UserError(f"target_r: {settings['target_r']} is not below init_r: {settings['init_r']}; ranks only shrink")
    if method == "oft":  # PEFT would take another size, with a warning
        size = settings.get("oft_block_size", OFTConfig.oft_block_size)
        for path, module in linear.items():
            if module.in_features % size:
                raise UserError(f"oft_block_size: {size} does not divide the {module.in_features} inputs of {path}")


def _check_embeddings(model: Any, targets: Mapping[str, nn.Module], tokens: Sequence[int] | Mapping[str, Any] | None) -> None:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    for path, module in targets.items():
        if tied and module in (embeddings, head):
            raise UserError(
                f"{path} is tied to the head, so an update of the one cannot be folded in; train new tokens with "
                "trainable_token_indices"
            )
    rows = embeddings.weight.shape[0]
    outside = [token for token in tokens if not 0 <= token < rows] if isinstance(tokens, list) else []
    if outside:
        raise UserError(f"trainable_token_indices: {outside[0]} is no token; there are {rows}")


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
        if name == "vision" and components.vision_tower is not None:
            saved.append(components.vision_tower)
        if name == "projector" and components.projector is not None and not (vision_whole and inside):
            saved.append(components.projector)
        kept_frozen = frozen_parts(model, components, tune)
        for part in components.projector_extras if name == "projector" else ():
            if part in kept_frozen:
                continue
            inner = model.get_submodule(part)
            # PEFT saves no bare list: Qwen3-VL's DeepStack mergers are named one by one.
            saved += [f"{part}.{index}" for index in range(len(inner))] if isinstance(inner, nn.ModuleList) else [part]
    return saved


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
