"""A recipe's `tune` section: the tuning method and settings of each component."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, StrictFloat, model_serializer
from pydantic_core import InitErrorDetails

from mmtune.methods import capability_table
from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.methods.selectors import NAMED, compile_selector, is_match
from mmtune.methods.soft_verbalizer import SOFT_VERBALIZER
from mmtune.recipe.other_toolkits import OTHER_METHODS, value_hint
from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value, method_arguments, unknown_key_at
from mmtune.recipe.section import PassThroughArguments, Section, Text
from mmtune.utils.errors import UserError, nearest

DEFAULT_METHODS = {"vision": "frozen", "projector": "full", "language": DEFAULT_METHOD}
"""The method of each component that a recipe does not name."""

_TYPICAL_PATH = "model.language_model.layers.31.self_attn.out_proj"
"""A path of usual length; a regular expression that takes too long on it is an error."""


class ComponentTuning(Section):
    """How one component is tuned. In a recipe a method's name alone, or a mapping with PEFT's names beside `method`."""

    _expected: ClassVar[str] = "a method's name or a mapping"
    method: Text = Field(description="frozen, full (its own weights), or one of `mmtune methods`.")
    learning_rate: Annotated[StrictFloat, Field(gt=0)] | None = Field(
        default=None, description="This component's own learning rate; null takes train.learning_rate, or else the method's."
    )
    settings: PassThroughArguments = Field(default_factory=Settings, description="PEFT's settings of the method, by its names.")

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if isinstance(values, str):
            values = {"method": values}
        if not isinstance(values, dict):
            return values, []
        method = values.get("method")
        own_names = ("method", "learning_rate")
        own = {name: value for name, value in values.items() if name in own_names}
        settings_given = {name: value for name, value in values.items() if name not in own}
        if isinstance(method, str) and method in METHODS:
            settings, errors = method_arguments(method).check(settings_given, also_valid=own_names)
            errors += _selector_errors(settings_given, METHODS[method].module_selectors)
            reasons = METHODS[method].unsupported_values
            errors += [
                error_at(name, f"{format_value(value)} is not supported: {reasons[name, value]}")
                for name, value in settings_given.items()
                if isinstance(value, str) and (name, value) in reasons
            ]
            errors += [error_at(name, message) for name, message in METHODS[method].conflicts(settings)]
            return own | {"settings": Settings(settings)}, errors
        errors = []
        if method not in ("frozen", "full") and method is not None:
            valid = ("frozen", "full", *METHODS)
            hint = nearest(method, valid) if isinstance(method, str) else ""
            hint = f"; {OTHER_METHODS[method]}" if isinstance(method, str) and method in OTHER_METHODS else hint
            errors.append(
                error_at("method", f"expected frozen, full or a method of `mmtune methods`, got {format_value(method)}{hint}")
            )
            return {"method": "frozen"}, errors
        if method == "full" and "target_modules" in settings_given:
            value = settings_given.pop("target_modules")
            if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))):
                errors.append(error_at("target_modules", f"expected a string or a list of strings, got {format_value(value)}"))
            errors += _selector_errors({"target_modules": value}, ("target_modules",))
            own["settings"] = Settings({"target_modules": value})
        for name in settings_given:
            if any(name in method_arguments(other).arguments for other in METHODS):
                errors.append(error_at(name, f"not supported with method: {method}; leave it out"))
            else:
                errors.append(unknown_key_at((name,), own_names))
        if method == "frozen" and own.pop("learning_rate", None) is not None:
            errors.append(error_at("learning_rate", "a frozen component has no learning rate"))
        return own, errors

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        rate = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return {"method": self.method, **rate, **self.settings}


def _selector_errors(settings: Mapping[str, Any], keys: Iterable[str]) -> list[InitErrorDetails]:
    """Errors of selectors of modules that need no model to be found.

    Args:
        keys: of the settings that select modules.
    """
    errors = []
    for key in keys:
        selector = settings.get(key)
        if hint := value_hint("target_modules", selector):
            errors.append(error_at(key, f"{format_value(selector)} is not the name of a module{hint}"))
        elif isinstance(selector, list) and (special := [name for name in selector if name in NAMED]):
            errors.append(error_at(key, f"a list holds names of modules; write {key}: {special[0]}, without a list"))
        elif isinstance(selector, list) and (wrong := [name for name in selector if set(str(name)) & set("*+?()[]|^$\\")]):
            errors.append(
                error_at(
                    key,
                    f"expected module names in the list, got {format_value(wrong[0])}; give a regular expression as one string",
                )
            )
        elif isinstance(selector, str) and selector not in NAMED:
            if meant := difflib.get_close_matches(selector.lower(), NAMED, n=1, cutoff=0.8):
                errors.append(error_at(key, f"{format_value(selector)} is not the name of a module; did you mean '{meant[0]}'?"))
                continue
            try:
                is_match(compile_selector(selector), _TYPICAL_PATH)
            except UserError as error:
                errors.append(error_at(key, str(error)))
    return errors


class TuneSection(Section):
    """The `tune` section: the method of each component."""

    vision: ComponentTuning = Field(default=ComponentTuning(method=DEFAULT_METHODS["vision"]), description="The vision encoder.")
    projector: ComponentTuning = Field(default=ComponentTuning(method=DEFAULT_METHODS["projector"]), description="The projector.")
    language: ComponentTuning = Field(
        default_factory=lambda: ComponentTuning.model_validate(DEFAULT_METHODS["language"]), description="The language model."
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict):
            return values, []
        tuned: dict[str, dict[str, Any]] = {}
        for name, default in DEFAULT_METHODS.items():
            value = values.get(name, default)
            if isinstance(value, dict):
                value = values[name] = {"method": default, **value}
            tuned[name] = value if isinstance(value, dict) else {"method": getattr(value, "method", value)}
        methods = {name: value["method"] for name, value in tuned.items()}
        if list(methods.values()) == ["frozen"] * 3:
            return values, [error_at((), "vision, projector and language are all frozen, so nothing would train")]
        return values, cls._check_together(tuned, methods)

    @staticmethod
    def _check_together(tuned: dict[str, dict[str, Any]], methods: dict[str, Any]) -> list[InitErrorDetails]:
        """Errors of what one adapter directory cannot hold."""
        errors = []
        used = {name: method for name, method in methods.items() if method in METHODS}
        for name, method in used.items():
            if (reason := METHODS[method].check_component(name, tuned[name])) is not None:
                errors.append(error_at((name,), reason))
        if errors:
            return errors
        if len(set(used.values())) > 1:
            listing = ", ".join(f"{name}: {method}" for name, method in used.items())
            advice = f"use {DEFAULT_METHOD} for each of them"
            errors.append(error_at((), f"one adapter directory holds one method, beside full: {listing}; {advice}"))
        elif len(used) > 1:
            method = METHODS[next(iter(used.values()))]
            may_differ = ("method", "learning_rate", "target_modules", *method.by_component)
            shared = [{key: value for key, value in tuned[name].items() if key not in may_differ} for name in used]
            if any(other != shared[0] for other in shared):
                names = ", ".join(may_differ[1:])
                errors.append(error_at((), f"components of one adapter differ in {names} only; make the rest equal"))
        return errors

    @property
    def components(self) -> dict[str, ComponentTuning]:
        """The three by name."""
        return {"vision": self.vision, "projector": self.projector, "language": self.language}

    @property
    def method(self) -> str | None:
        """The method of PEFT's kind that components use, if any does."""
        return next((tuning.method for tuning in self.components.values() if tuning.method in METHODS), None)

    @property
    def labels(self) -> list[str]:
        """The labels of the soft verbalizer; empty without one."""
        return self.language.settings.get(SOFT_VERBALIZER) or []

    @property
    def needs_full_weights(self) -> bool:
        """Whether the method is initialized from full weights, so that the base cannot be loaded sharded."""
        tuned = [tuning for tuning in self.components.values() if tuning.method in METHODS]
        return any(METHODS[tuning.method].needs_full_weights(tuning.settings) for tuning in tuned)

    def incompatibility(self, precision: str, **context: Any) -> tuple[str, str] | None:
        """The first component whose method does not work in a run, and why not; None when all work.

        Args:
            precision: of the base while training.
            context: what else is known about the run, as the other arguments of `capability_table.incompatibility`.
        """
        for component, tuning in self.components.items():
            if tuning.method in METHODS:
                reason = capability_table.incompatibility(tuning.method, tuning.settings, precision=precision, **context)
                if reason is not None:
                    return component, reason
        return None


def with_rates(tune: Mapping[str, Any]) -> dict[str, Any]:
    """The methods' own learning rates, for a recipe that names none for the run."""
    written = dict(tune)
    for component, default in DEFAULT_METHODS.items():
        value = written.get(component, default)
        value = dict(value) if isinstance(value, Mapping) else {"method": value}
        method = value.setdefault("method", default)
        if isinstance(method, str) and method in METHODS and value.get("learning_rate") is None:
            written[component] = value | {"learning_rate": METHODS[method].learning_rate}
    return written
