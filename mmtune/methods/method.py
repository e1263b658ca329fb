"""A tuning method: its PEFT configuration, its settings, its limits, and the hooks that training and saving call.

`Method` has a default for every hook. A method without code of its own is one line of `method_table.py`; one with code is a
subclass in a file of `entries/`. torch and PEFT are imported inside the hooks, because recipes are checked without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmtune.methods.selectors import is_router
from mmtune.methods.setting_types import SELECTOR
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

DEFAULT_METHOD = "lora"
"""The language model's method where a recipe names none, and the one to suggest where another does not work."""

COMPONENTS = ("vision", "projector", "language")
QUANTIZED = ("int8", "nf4")

UNPROVEN = "mmtune has not tested it"
BIAS_ALL = {("bias", "all"): "it would train biases of every component; lora_only trains those of the tuned layers"}
MANAGED = {
    "task_type": "mmtune sets it",
    "peft_type": "the method names it",
    "auto_mapping": "mmtune sets it",
    "peft_version": "PEFT records it",
    "base_model_name_or_path": "give the base with model.base",
    "revision": "PEFT records it",
    "inference_mode": "mmtune sets it",
    "modules_to_save": "give another component the method full, and it is saved with the adapter",
    "runtime_config": "it holds for one process and is not saved with the adapter",
    "exclude_modules": "name what is meant with target_modules",
    "target_parameters": "only lora adapts parameters outside of linear layers, such as stacked experts; use method: lora",
    "fan_in_fan_out": "no layer of these families is stored transposed",
    "megatron_config": "mmtune does not run Megatron models",
    "megatron_core": "mmtune does not run Megatron models",
    "layers_to_transform": "write the layers into target_modules: a regular expression is matched against whole paths",
    "layers_pattern": "write the layers into target_modules: a regular expression is matched against whole paths",
}
"""Fields of PEFT's configurations that mmtune sets itself, with what a recipe should say instead."""


@dataclass(frozen=True)
class Setting:
    """A setting of a method that its PEFT configuration lacks; absent where a recipe does not give it."""

    annotation: Any
    description: str


@dataclass(frozen=True)
class Variant:
    """Settings of a method with capabilities of their own."""

    about: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One tuning method.

    Attributes:
        name: in a recipe.
        about: what it does and its paper.
        config: `module:Class` of its PEFT configuration.
        learning_rate: its default.
        defaults: settings that differ from PEFT's defaults.
        targets: the default of `target_modules`; None where a recipe has no such setting.
        components: the components that it can tune.
        any_layer: whether it adapts layers other than linear ones.
        selectors: settings that select "modules" or "parameters" of the base, resolved to full paths.
        managed: fields of its configuration that a recipe cannot set, with the reason.
        unsupported_values: (setting, value) that a recipe cannot give, to the reason.
        setting_types: annotations narrower than the configuration's, by setting.
        extra_settings: settings that its configuration lacks.
        by_component: settings that may differ between components, beside learning rate and targets.
        variants: by name, settings that are measured as a method of their own.
        other_names: names that other toolkits give it or its variants, with how a recipe writes them.
        other_keys: settings of other toolkits for it, with the setting (and value) of a component that replaces each.
        alternatives: methods to suggest where it does not work, the nearest first.
        mergeable: whether its update can be added to the base's weights.
        packable: whether it treats every sample of a packed row alike.
        skips_steps: whether an optimizer step may be skipped.
        supports_fsdp: whether it was compared under FSDP2 with one process.
        resumes_from_adapter: whether training can resume from the adapter's file alone.
        needs_full_layers: whether PEFT reads or copies a layer's weight, which ZeRO-3 shards.
        adds_to_loss: whether PEFT adds a term of the method to the loss that the model itself computes.
        language_prefix: of parameters outside the base model, which count as the language model's.
    """

    name: str
    about: str
    config: str
    learning_rate: float
    defaults: Mapping[str, Any] = field(default_factory=dict)
    targets: str | list[str] | None = "all-linear"
    components: tuple[str, ...] = COMPONENTS
    any_layer: bool = False
    selectors: Mapping[str, Literal["modules", "parameters"]] = field(default_factory=lambda: {"target_modules": "modules"})
    managed: Mapping[str, str] = field(default_factory=lambda: MANAGED)
    unsupported_values: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    setting_types: Mapping[str, Any] = field(default_factory=dict)
    extra_settings: Mapping[str, Setting] = field(default_factory=dict)
    by_component: tuple[str, ...] = ()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    other_keys: Mapping[str, str] = field(default_factory=dict)
    alternatives: tuple[str, ...] = (DEFAULT_METHOD,)
    mergeable: bool = True
    packable: bool = True
    skips_steps: bool = True
    supports_fsdp: bool = False
    resumes_from_adapter: bool = True
    needs_full_layers: bool = False
    adds_to_loss: bool = False
    language_prefix: str | None = None

    # Settings. These hooks run when a recipe is read, before torch and PEFT are imported.

    def config_class(self) -> Any:
        """The PEFT configuration's class."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(module), name)

    def default_settings(self) -> dict[str, Any]:
        """`defaults`, with the default selector."""
        return dict(self.defaults) | ({} if self.targets is None else {"target_modules": self.targets})

    def narrow_types(self) -> dict[str, Any]:
        """`setting_types`, and the type of the selectors of modules."""
        return {**dict.fromkeys(self.module_selectors, SELECTOR), **self.setting_types}

    @property
    def is_own_tuner(self) -> bool:
        """Whether PEFT knows it only after `import mmtune.methods.tuners`."""
        return self.config.startswith("mmtune.")

    @property
    def module_selectors(self) -> tuple[str, ...]:
        """Settings that select modules."""
        return tuple(name for name, kind in self.selectors.items() if kind == "modules")

    def measured_as(self, settings: Mapping[str, Any]) -> str:
        """Its name, or the variant's that these settings are, in `capabilities.json`."""
        for name, variant in self.variants.items():
            if all(settings.get(key) == value for key, value in variant.settings.items()):
                return name
        return self.name

    def conflicts(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Settings that do not work with others: the name and the message."""
        yield from ()

    def check_component(self, component: str, settings: Mapping[str, Any]) -> str | None:
        """Why it cannot tune a component with these settings; None when it can."""
        if component in self.components:
            return None
        where = " and ".join(f"tune.{name}" for name in self.components)
        return f"{self.name} works in {where} only; use frozen, full or {DEFAULT_METHOD} here"

    def incompatibility(self, settings: Mapping[str, Any], precision: str, model_type: str | None) -> str | None:
        """Why settings do not work with the base's precision or family, beside what was measured; None when they do.

        Args:
            model_type: of the base's config; None where it is not known yet.
        """
        return None

    def needs_full_weights(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is initialized from full weights, so that the base cannot be loaded sharded."""
        return self.needs_full_layers

    def plain_initialization(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings to replace so that the adapter is initialized without the base's weights and without data; its size stays."""
        return {}

    # Building the adapter.

    def find_targets(self, model: nn.Module, roots: Mapping[str, str], settings: Mapping[str, Any]) -> list[str] | None:
        """Full paths of the modules to adapt, where the method finds them itself; None where `selectors` do.

        Args:
            roots: path of each component that it tunes.

        Raises:
            UserError: the model has no such modules.
        """
        return None

    def settings_by_component(
        self, targets: Mapping[str, list[str]], settings: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Settings of the configuration that express what differs between several components.

        Args:
            targets: by component, the full paths of its adapted modules.
            settings: by component, its settings.
        """
        return {}

    def settle_targets(self, model: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings whose targets PEFT reads as they are meant.

        Args:
            settings: with full paths as targets.

        Raises:
            UserError: targets that PEFT would replace by others.
        """
        return settings

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """Check settings against the model where PEFT would not, or would stop with a traceback.

        Args:
            model: the base, with its embeddings.
            targets: the modules to adapt, by full path.

        Raises:
            UserError: with the setting and the module that do not fit.
        """
        if not self.any_layer:
            check_linear(targets, self.name)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        is_tied = head is not None and head.weight is embeddings.weight
        for path, module in targets.items():
            if is_router(module):
                raise UserError(f"{path} is a router, which returns more than its product; name the targets without it")
            if is_tied and module in (embeddings, head):
                raise UserError(
                    f"{path} is tied to the head, so an update of only one of them cannot be merged; train new tokens with "
                    "trainable_token_indices"
                )
        tokens, rows = settings.get("trainable_token_indices"), embeddings.weight.shape[0]
        outside = [token for token in tokens if not 0 <= token < rows] if isinstance(tokens, list) else []
        if outside:
            raise UserError(f"trainable_token_indices: expected token ids from 0 to {rows - 1}, got {outside[0]}")

    def build_config(self, settings: Mapping[str, Any], modules_to_save: list[str] | None, steps: int | None) -> PeftConfig:
        """The PEFT configuration.

        Args:
            settings: with full paths as targets.
            modules_to_save: modules that train in full beside the adapter.
            steps: optimizer steps of the run; None where they are not known, as when memory is estimated.
        """
        own = {name: value for name, value in settings.items() if name not in self.extra_settings}
        return self.config_class()(task_type="CAUSAL_LM", modules_to_save=modules_to_save, **own)

    def before_wrapping(self, model: nn.Module, config: PeftConfig, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Compute from training data what PEFT reads when it wraps the model.

        Args:
            model: the base, on its device.
            batches: training batches with labels, on the same device, read once.
        """

    def initializes_from_data(self, config: PeftConfig) -> bool:
        """Whether `after_wrapping` runs the model. A sharded model is gathered for it."""
        return False

    def after_wrapping(self, model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Initialize the adapter from training data where `initializes_from_data`; `batches` as in `before_wrapping`."""

    # Training.

    def rate_factor(self, parameter: str, settings: Mapping[str, Any]) -> float:
        """Factor on the component's learning rate for a parameter, by the parameter's name."""
        return 1.0

    def virtual_tokens(self, config: PeftConfig) -> int:
        """How many tokens it puts before the input embeddings of every sample."""
        return 0

    def shared_loss(self, model: PeftModel, passes: int) -> AbstractContextManager[None]:
        """Context of one forward pass, for a method that adds a term of its own to the loss.

        Args:
            passes: forward passes of one optimizer step, in all processes together, whose losses are summed.
        """
        return nullcontext()

    def after_step(self, model: PeftModel, step: int) -> None:
        """Called in every process after an optimizer step that was not skipped, before the gradients are cleared.

        Args:
            step: optimizer steps before this one.
        """

    def training_state(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and metadata that resuming needs besides the trained weights. Only where `resumes_from_adapter` is
        false."""
        return {}, {}

    def load_training_state(self, model: PeftModel, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Restore what `training_state` returned."""

    # Saving.

    def initial_factors(self, model: PeftModel) -> dict[str, torch.Tensor] | None:
        """The adapter's tensors before training, where the initialization changed the base's weights; None elsewhere."""
        return None

    def restore_base(self, adapter: Path, initial: Mapping[str, torch.Tensor]) -> None:
        """Rewrite a saved adapter so that it applies to the base's original weights.

        Args:
            adapter: its directory.
            initial: from `initial_factors`.
        """


def check_linear(targets: Mapping[str, nn.Module], subject: str) -> None:
    """
    Args:
        subject: the method or setting that takes linear layers only.

    Raises:
        UserError: a target is not a linear layer.
    """
    from torch import nn

    for path, module in targets.items():
        if not isinstance(module, nn.Linear):
            raise UserError(f"{subject} works on linear layers, and {path} is a {type(module).__name__}")
