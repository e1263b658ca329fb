"""A recipe's `tune` section: what trains, component by component, and by which method."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, StrictFloat, model_serializer
from pydantic_core import InitErrorDetails

from mmtune.methods.method_table import INITS_IN_PARTS, METHODS, METHODS_OF_WHOLE_WEIGHTS
from mmtune.methods.selectors import NAMED, compile_selector, is_match
from mmtune.recipe.other_toolkits import OTHER_METHODS, value_hint
from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value, method_arguments, unknown_key_at
from mmtune.recipe.section import PassThroughArguments, Section, Text
from mmtune.utils.errors import UserError, nearest

DEFAULT_METHODS = {"vision": "frozen", "projector": "full", "language": "lora"}
"""The method of each component that a recipe does not name."""

_A_PATH = "model.language_model.layers.31.self_attn.out_proj"
"""A path of a usual length, by which a selector that would not end is known."""


class ComponentTuning(Section):
    """How one component is tuned. In a recipe a method's name alone, or a mapping with PEFT's names beside `method`."""

    _expected: ClassVar[str] = "a method's name or a mapping"
    method: Text = Field(description="frozen, full (its own weights), or one of `mmtune methods`.")
    learning_rate: Annotated[StrictFloat, Field(gt=0)] | None = Field(
        default=None, description="This component's own learning rate; null takes train.learning_rate, or else the method's."
    )
    loraplus_lr_ratio: Annotated[StrictFloat, Field(gt=0)] | None = Field(
        default=None, description="LoRA+ (arXiv 2402.12354): how many times faster B learns than A. lora only."
    )
    settings: PassThroughArguments = Field(default_factory=Settings, description="PEFT's settings of the method, by its names.")

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if isinstance(given, str):
            given = {"method": given}
        if not isinstance(given, dict):
            return given, []
        method = given.get("method")
        own_names = ("method", "learning_rate", *(("loraplus_lr_ratio",) if method == "lora" else ()))
        own = {name: value for name, value in given.items() if name in own_names}
        borrowed = {name: value for name, value in given.items() if name not in own}
        if isinstance(method, str) and method in METHODS:
            settings, errors = method_arguments(method).check(borrowed, also_valid=own_names)
            errors += _selector_errors(borrowed)
            errors += [
                error_at(name, f"{format_value(value)} is refused: {METHODS[method].values[name, value]}")
                for name, value in borrowed.items()
                if isinstance(value, str) and (name, value) in METHODS[method].values
            ]
            return own | {"settings": Settings(settings)}, errors
        errors = []
        if method not in ("frozen", "full") and method is not None:
            valid = ("frozen", "full", *METHODS)
            hint = nearest(method, valid) if isinstance(method, str) else ""
            told = f"; {OTHER_METHODS[method]}" if isinstance(method, str) and method in OTHER_METHODS else hint
            errors.append(
                error_at("method", f"expected frozen, full or a method of `mmtune methods`, got {format_value(method)}{told}")
            )
            return {"method": "frozen"}, errors
        if method == "full" and "target_modules" in borrowed:
            value = borrowed.pop("target_modules")
            if not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))):
                errors.append(error_at("target_modules", f"expected a string or a list of strings, got {format_value(value)}"))
            errors += _selector_errors({"target_modules": value})
            own["settings"] = Settings({"target_modules": value})
        for name in borrowed:
            if any(name in method_arguments(other).arguments for other in METHODS):
                errors.append(error_at(name, f"not supported with method: {method}; leave it out"))
            else:
                errors.append(unknown_key_at((name,), own_names))
        if method == "frozen" and own.pop("learning_rate", None) is not None:
            errors.append(error_at("learning_rate", "a frozen component has no learning rate"))
        return own, errors

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        own = {"learning_rate": self.learning_rate, "loraplus_lr_ratio": self.loraplus_lr_ratio}
        return {"method": self.method, **{name: value for name, value in own.items() if value is not None}, **self.settings}


def _selector_errors(given: Mapping[str, Any]) -> list[InitErrorDetails]:
    """What is wrong with selectors of modules, before there is a model to select from."""
    errors = []
    for key in ("target_modules", "feedforward_modules"):
        selector = given.get(key)
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
                is_match(compile_selector(selector), _A_PATH)
            except UserError as error:
                errors.append(error_at(key, str(error)))
    return errors


class TuneSection(Section):
    """What trains, component by component."""

    vision: ComponentTuning = Field(default=ComponentTuning(method=DEFAULT_METHODS["vision"]), description="The vision encoder.")
    projector: ComponentTuning = Field(default=ComponentTuning(method=DEFAULT_METHODS["projector"]), description="The projector.")
    language: ComponentTuning = Field(
        default_factory=lambda: ComponentTuning.model_validate(DEFAULT_METHODS["language"]), description="The language model."
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(given, dict):
            return given, []
        tuned: dict[str, dict[str, Any]] = {}
        for name, default in DEFAULT_METHODS.items():
            value = given.get(name, default)
            if isinstance(value, dict):
                value = given[name] = {"method": default, **value}
            tuned[name] = value if isinstance(value, dict) else {"method": getattr(value, "method", value)}
        methods = {name: value["method"] for name, value in tuned.items()}
        if list(methods.values()) == ["frozen"] * 3:
            return given, [error_at((), "vision, projector and language are all frozen, so nothing would train")]
        return given, cls._between(tuned, methods)

    @staticmethod
    def _between(tuned: dict[str, dict[str, Any]], methods: dict[str, Any]) -> list[InitErrorDetails]:
        """What PEFT cannot keep in one adapter directory."""
        errors = []
        used = {name: method for name, method in methods.items() if method in METHODS}
        for name, method in used.items():
            if name != "language" and METHODS[method].kind != "layers":
                errors.append(error_at((name,), f"{method} is for tune.language; here frozen, full or a method for layers"))
            if name != "language" and tuned[name].get("init_lora_weights") == "eva":
                errors.append(error_at((name,), "init_lora_weights: eva is supported in tune.language only"))
            if name == "projector" and method in ("bottleneck", "ln_tuning"):
                errors.append(error_at((name,), f"{method} finds nothing to work on in a projector; use full or lora"))
        if errors:
            return errors
        if len(set(used.values())) > 1:
            told = ", ".join(f"{name}: {method}" for name, method in used.items())
            errors.append(error_at((), f"one adapter directory holds one method, beside full: {told}; use lora for each of them"))
        elif len(used) > 1:
            method = METHODS[next(iter(used.values()))]
            ranks = ("method", "learning_rate", "target_modules", *method.by_component)
            shared = [{key: value for key, value in tuned[name].items() if key not in ranks} for name in used]
            if any(other != shared[0] for other in shared):
                allowed = ", ".join(ranks[1:])
                errors.append(error_at((), f"components of one adapter differ in {allowed} only; make the rest equal"))
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
    def needs_whole_weights(self) -> bool:
        """Whether what is put in place is made from the base's weights, and needs them whole."""
        inits = [tuning.settings.get("init_lora_weights") for tuning in self.components.values()]
        read = any(isinstance(init, str) and not init.startswith(INITS_IN_PARTS) for init in inits)
        return read or self.method in METHODS_OF_WHOLE_WEIGHTS


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
