"""Applying a recipe's `tune` section to a loaded model, and tables of what it trains."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from mmtune.console.styled_console import StyledConsole
from mmtune.distributed.deepspeed_private import full_size
from mmtune.distributed.sharded_parameters import gathered_forward, to_float32
from mmtune.families.structure import Components, find_components
from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.methods.selectors import ALL_EXPERTS
from mmtune.models.components import PEFT_PREFIX, component_of, select_modules
from mmtune.models.compute import move_batch
from mmtune.models.experts.expert_stacks import BASE_LAYER, ExpertStack, find_experts, without_layer_numbers
from mmtune.recipe.recipe import TuneSection
from mmtune.tuning.peft_config import component_path, frozen_parts, keeps_adapter, peft_config
from mmtune.tuning.save import initial_factors
from mmtune.utils.errors import RecipeValueError, errors_at_key

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class ComponentCount:
    """Parameters of one component: how its frozen ones are stored, how many train, by which method and at which rate."""

    component: str
    method: str
    weights: str
    total: int
    trainable: int
    learning_rate: float | None


@dataclass(frozen=True)
class TunedModel:
    """The model as it trains.

    Attributes:
        counts: parameters by component.
        learning_rates: by parameter name, where it is not the run's own.
        initial: LoRA's matrices before training, where the adapter's file needs them (`initial_factors`).
        notes: sentences on parts that stay frozen.
    """

    model: PreTrainedModel | PeftModel
    counts: list[ComponentCount]
    learning_rates: dict[str, float]
    initial: dict[str, torch.Tensor] | None
    notes: list[str]


def tune_model(
    model: PreTrainedModel,
    tune: TuneSection,
    learning_rate: float,
    *,
    steps: int | None = None,
    batches: Iterable[Mapping[str, torch.Tensor]] = (),
    label_tokens: Sequence[int] = (),
) -> TunedModel:
    """Apply the recipe's `tune` section with `apply_tuning`, and print the adapted modules and the trainable parameters.

    Args:
        learning_rate: the run's own rate, for components that name none.
        steps, batches, label_tokens: as `apply_tuning`.
    """
    base_components = find_components(model)
    kept_frozen, stacks = frozen_parts(model, base_components, tune), list(find_experts(model).values())
    tuned = apply_tuning(model, base_components, tune, steps=steps, batches=batches, label_tokens=label_tokens)
    components = find_components(tuned)
    counts = count_parameters(tuned, components, tune, learning_rate)
    print_trained_modules(trained_modules(tuned))
    print_parameters(counts)
    notes = list(describe_frozen_experts(stacks, tuned, base_components, tune))
    why = "PEFT saves modules beside an adapter, and it is a parameter of its own"
    notes += [f"tune.projector: {part} stays frozen: {why}" for part in kept_frozen]
    for line in notes:
        print(line)
    return TunedModel(tuned, counts, learning_rates(tuned, components, tune, learning_rate), initial_factors(tuned), notes)


def apply_tuning(
    model: PreTrainedModel,
    components: Components,
    tune: TuneSection,
    *,
    steps: int | None = None,
    batches: Iterable[Mapping[str, torch.Tensor]] = (),
    label_tokens: Sequence[int] = (),
) -> PreTrainedModel | PeftModel:
    """Freeze, unfreeze and wrap by the recipe's `tune` section.

    Args:
        model: the loaded base, on its device.
        components: where its vision tower, projector and language model are.
        tune: the recipe's section.
        steps: optimizer steps of the run, for methods with a schedule over it.
        batches: training batches, for initializations that read data.
        label_tokens: token ids of the labels of a soft verbalizer.

    Returns:
        A `PeftModel` when `keeps_adapter`, components trained in full then being its `modules_to_save`; otherwise the model
        itself with `requires_grad` set. Trainable parameters are fp32.

    Raises:
        UserError: a selector that matches nothing, a component that the model lacks, or settings that do not fit.
    """
    for name, tuning in tune.components.items():
        if tuning.method != "frozen" and component_path(components, name) is None:
            raise RecipeValueError(f"tune.{name}", f"{type(model).__name__} has no {name} component; set it to frozen")
    model.requires_grad_(False)
    if keeps_adapter(tune):
        with _errors_of_peft(tune):
            config = peft_config(model, components, tune, steps, label_tokens)
            tuned: PreTrainedModel | PeftModel = _wrap(model, config, tune, batches)
    else:
        for name in _trained_in_full(model, components, tune):
            model.get_parameter(name).requires_grad_(True)
        tuned = model
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            to_float32(parameter)
    _keep_frozen_statistics(tuned)
    return tuned


def _keep_frozen_statistics(model: nn.Module) -> None:
    """Frozen batch normalizations (FastVLM's tower, Emu3's image tokenizer) use and keep the statistics of the base in training.

    In training mode they would use those of the batch, so that a row depends on the others, and change the base's: an adapter
    does not save them.
    """
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, _: Any) -> None:
    module.eval()


def _trained_in_full(model: nn.Module, components: Components, tune: TuneSection) -> list[str]:
    """Parameters of a run without an adapter."""
    names = []
    for component, tuning in tune.components.items():
        if tuning.method != "full":
            continue
        selected = None
        if "target_modules" in tuning.settings:
            with errors_at_key(f"tune.{component}.target_modules"):
                selected = set(select_modules(model, components, component, tuning.settings["target_modules"]))  # type: ignore[arg-type]
        for name, _ in model.named_parameters():
            # The head is the language model's last layer; where it is tied to the embeddings it is the same parameter.
            owner = component_of(name, components)
            is_owned = ("language" if owner == "lm_head" else owner) == component
            if is_owned and (selected is None or name.rpartition(".")[0] in selected):
                names.append(name)
    return names


@contextlib.contextmanager
def _errors_of_peft(tune: TuneSection) -> Iterator[None]:
    """Inside, a ValueError of PEFT is an error in the recipe's settings."""
    try:
        yield
    except ValueError as error:
        where = next((name for name, tuning in tune.components.items() if tuning.method == tune.method), "language")
        raise RecipeValueError(f"tune.{where}", str(error).strip()) from error


def _wrap(
    model: PreTrainedModel, config: PeftConfig, tune: TuneSection, batches: Iterable[Mapping[str, torch.Tensor]]
) -> PeftModel:
    """Wrap a model, and initialize the adapter from data where the method does."""
    method = None if tune.method is None else METHODS[tune.method]
    on_device = (move_batch(model, batch) for batch in batches)
    if method is not None:
        method.before_wrapping(model, config, on_device)
    tuned = get_peft_model(model, config)
    if method is not None and method.initializes_from_data(config):
        with gathered_forward(tuned):
            method.after_wrapping(tuned, on_device)
    base = tuned.get_base_model()
    if not any(isinstance(each, BaseTunerLayer) for each in (base.get_input_embeddings(), base.get_output_embeddings())):
        # The vocabulary is the base's. PEFT would request the base's config from the hub at every save to compare them.
        tuned.save_pretrained = functools.partial(tuned.save_pretrained, save_embedding_layers=False)
    return tuned


def count_parameters(model: nn.Module, components: Components, tune: TuneSection, learning_rate: float) -> list[ComponentCount]:
    """Parameters by component of a model from `apply_tuning`; the frozen copy of a saved module is not counted.

    Args:
        learning_rate: the run's own rate, for components that name none.
    """
    totals: dict[str, list[int]] = {}
    stored: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        owner = component_of(name, components)
        count = totals.setdefault("language" if owner == "lm_head" else owner, [0, 0])
        size = parameter_count(parameter)
        count[0] += size
        count[1] += size if parameter.requires_grad else 0
        if not parameter.requires_grad:
            stored.setdefault(owner, set()).add(storage_of(parameter))
    stored.setdefault("language", set()).update(f"head {kind}" for kind in stored.pop("lm_head", ()))
    tunings = tune.components
    return [
        ComponentCount(
            name,
            tunings[name].method if name in tunings else "frozen",
            ", ".join(sorted(stored.get(name, ()))),
            total,
            trainable,
            (tunings[name].learning_rate or learning_rate) if trainable else None,
        )
        for name, (total, trainable) in totals.items()
    ]


def parameter_count(parameter: nn.Parameter) -> int:
    """Weights in a parameter; a 4-bit one is stored packed, two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return full_size(parameter) if state is None else math.prod(state.shape)


def storage_of(parameter: nn.Parameter) -> str:
    """How a parameter is stored: nf4, int8, or its dtype."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return str(state.quant_type)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return short.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))


def learning_rates(model: nn.Module, components: Components, tune: TuneSection, learning_rate: float) -> dict[str, float]:
    """Learning rate by parameter name, for the parameters that do not take the run's own.

    Args:
        learning_rate: the run's own.
    """
    rates = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = component_of(name, components)
        tuning = tune.components["language" if owner == "lm_head" else owner]
        rate = tuning.learning_rate or learning_rate
        if tuning.method in METHODS:
            rate *= METHODS[tuning.method].rate_factor(name, tuning.settings)
        if rate != learning_rate:
            rates[name] = rate
    return rates


def trained_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Adapted modules by full path in the base, repeated layers as one (`layers.*`): numbers of modules and of parameters."""
    wrappers = {name for name, module in model.named_modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")[:-1]
            inside = (".".join(parts[:end]) for end in range(1, len(parts)))
            owner = next((path for path in inside if path in wrappers), ".".join(parts))
            sizes[owner] = sizes.get(owner, 0) + full_size(parameter)
    by_path: dict[str, tuple[int, int]] = {}
    for owner, size in sizes.items():
        path = re.sub(r"\.\d+(?=\.|$)", ".*", owner.removeprefix("base_model.model."))
        modules, total = by_path.get(path, (0, 0))
        by_path[path] = modules + 1, total + size
    return by_path


def modules_record(tuned: TunedModel) -> dict[str, Any]:
    """Trainable parameters by component, with the adapted modules and sentences on what stays frozen."""
    return {
        "class": type(tuned.model.get_base_model() if isinstance(tuned.model, PeftModel) else tuned.model).__name__,
        "components": [asdict(count) for count in tuned.counts],
        "modules": trained_modules(tuned.model),
        "lines": tuned.notes,
    }


def describe_frozen_experts(
    stacks: Sequence[ExpertStack], tuned: nn.Module, components: Components, tune: TuneSection
) -> Iterator[str]:
    """A line for each component whose method leaves its stacked experts frozen; selectors of modules do not reach them.

    Args:
        stacks: of the base.
        tuned: from `apply_tuning`.
        components: of the base.
    """
    trained = {name.removeprefix(PEFT_PREFIX).replace(BASE_LAYER, "") for name, p in tuned.named_parameters() if p.requires_grad}
    frozen = [stack for stack in stacks if not any(name.startswith(f"{stack.module}.") for name in trained)]
    for component, tuning in tune.components.items():
        own = [stack for stack in frozen if component_of(stack.module, components) == component]
        if not own or tuning.method not in METHODS or METHODS[tuning.method].targets is None:
            continue
        paths = ", ".join(without_layer_numbers(path for stack in own for path in stack.paths))
        takes_parameters = "target_parameters" in METHODS[tuning.method].selectors
        method = "" if takes_parameters else f"method: {DEFAULT_METHOD} and "
        yield (
            f"tune.{component}: the experts stay frozen, {sum(stack.stored for stack in own):,} weights that are stacked and not "
            f"linear layers: {paths}; to tune them, write {method}target_parameters: {ALL_EXPERTS}"
        )


def print_trained_modules(modules: Mapping[str, tuple[int, int]]) -> None:
    """Print the table of adapted modules, from `trained_modules`."""
    table = Table(title="Adapted modules", title_justify="left")
    table.add_column("module", overflow="fold")
    for name in ("modules", "trainable"):
        table.add_column(name, justify="right")
    for path, (count, size) in modules.items():
        table.add_row(path, f"{count:,}", f"{size:,}")
    StyledConsole().print_table(table)


def print_parameters(counts: Sequence[ComponentCount]) -> None:
    """Print the table of trainable parameters by component."""
    table = Table(title="Trainable parameters", title_justify="left")
    for name in ("component", "method", "frozen weights"):
        table.add_column(name)
    for name in ("parameters", "trainable", "learning rate"):
        table.add_column(name, justify="right")
    for count in counts:
        rate = "" if count.learning_rate is None else f"{count.learning_rate:g}"
        table.add_row(count.component, count.method, count.weights, f"{count.total:,}", f"{count.trainable:,}", rate)
    total, trainable = sum(c.total for c in counts), sum(c.trainable for c in counts)
    table.add_section()
    table.add_row("all", "", "", f"{total:,}", f"{trainable:,} ({trainable / total:.2%})", "")
    StyledConsole().print_table(table)
