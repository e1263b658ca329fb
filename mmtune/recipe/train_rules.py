"""Rules of the `train` section beyond the types of TrainingArguments, and the optional libraries that a recipe needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import EARLY_STOPPING, error_at, format_value, train_arguments
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import nearest

if TYPE_CHECKING:
    from mmtune.recipe.sections import Recipe

HUB_KERNEL = "owner/name"
"""Stands for every `attn_implementation` that is a kernel on the hub."""


@dataclass(frozen=True)
class OptionalLibrary:
    """A library that a value of a recipe needs.

    Attributes:
        package: its name for pip.
        modules: any one of them is enough.
    """

    package: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class LibraryKey:
    """A key of a recipe whose values need optional libraries.

    Attributes:
        libraries: by value of the key, or by the beginning of the value. Other values need none.
        other: a value to use instead.
        by_prefix: whether the names of `libraries` are beginnings of values.
    """

    libraries: Mapping[str, OptionalLibrary]
    other: str
    by_prefix: bool = False

    def library(self, value: str) -> OptionalLibrary | None:
        """The library that a value needs, if any."""
        value = HUB_KERNEL if "/" in value else value
        if not self.by_prefix:
            return self.libraries.get(value)
        return next((library for prefix, library in self.libraries.items() if value.startswith(prefix)), None)


LIBRARY_KEYS: Mapping[str, LibraryKey] = {
    # transformers loads the attention functions from a hub kernel (`kernels`) or from torch_npu if the package is missing.
    "model.attn_implementation": LibraryKey(
        {
            "flash_attention_2": OptionalLibrary("flash-attn", ("flash_attn", "kernels", "torch_npu")),
            "flash_attention_3": OptionalLibrary("flash-attn-3", ("flash_attn_interface", "kernels", "torch_npu")),
            "flash_attention_4": OptionalLibrary("flash-attn-4", ("flash_attn", "kernels", "torch_npu")),
            HUB_KERNEL: OptionalLibrary("kernels", ("kernels",)),
        },
        other="sdpa",
    ),
    # The other optimizers come with torch or bitsandbytes.
    "train.optim": LibraryKey(
        {
            "adamw_torch_xla": OptionalLibrary("torch_xla", ("torch_xla",)),
            "adamw_torch_npu": OptionalLibrary("torch_npu", ("torch_npu",)),
            "adamw_torch_4bit": OptionalLibrary("torchao", ("torchao",)),
            "adamw_torch_8bit": OptionalLibrary("torchao", ("torchao",)),
            "adamw_anyprecision": OptionalLibrary("torchdistx", ("torchdistx",)),
            "galore": OptionalLibrary("galore-torch", ("galore_torch",)),
            "lomo": OptionalLibrary("lomo-optim", ("lomo_optim",)),
            "adalomo": OptionalLibrary("lomo-optim", ("lomo_optim",)),
            "grokadamw": OptionalLibrary("grokadamw", ("grokadamw",)),
            "schedule_free": OptionalLibrary("schedulefree", ("schedulefree",)),
            "apollo": OptionalLibrary("apollo-torch", ("apollo_torch",)),
            "stable_adamw": OptionalLibrary("torch-optimi", ("optimi",)),
        },
        other="adamw_torch",
        by_prefix=True,
    ),
    "train.use_liger_kernel": LibraryKey({"true": OptionalLibrary("liger-kernel", ("liger_kernel",))}, other="false"),
    "train.report_to": LibraryKey(
        {
            "azure_ml": OptionalLibrary("azureml-sdk", ("azureml",)),
            "comet_ml": OptionalLibrary("comet-ml", ("comet_ml",)),
            "mlflow": OptionalLibrary("mlflow", ("mlflow",)),
            "neptune": OptionalLibrary("neptune", ("neptune",)),
            "tensorboard": OptionalLibrary("tensorboard", ("tensorboard", "tensorboardX")),
            "trackio": OptionalLibrary("trackio", ("trackio",)),
            "wandb": OptionalLibrary("wandb", ("wandb",)),
            "codecarbon": OptionalLibrary("codecarbon", ("codecarbon",)),
            "clearml": OptionalLibrary("clearml", ("clearml",)),
            "dagshub": OptionalLibrary("dagshub", ("dagshub",)),
            "flyte": OptionalLibrary("flytekit", ("flytekit",)),
            "dvclive": OptionalLibrary("dvclive", ("dvclive",)),
            "swanlab": OptionalLibrary("swanlab", ("swanlab",)),
        },
        other="none",
    ),
}
"""The keys whose values need optional libraries."""

DECAY_TYPES = ("linear", "cosine", "1-sqrt")
"""Values of warmup_type and decay_type of warmup_stable_decay."""
MINIMUM = {"num_decay_steps": 1, "num_stable_steps": 0, "timescale": 1}
"""The lowest values of keys of `lr_scheduler_kwargs`."""

LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
"""Keys of `liger_kernel_config` that replace the loss. Liger's default, a fused one, takes no mask of the scored positions."""

LOGGING_STEPS = 10
"""mmtune's default of `logging_steps`."""
EVALUATION_KEYS = (
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
)
"""Arguments of TrainingArguments that have an effect only with `eval_strategy`."""

POLYNOMIAL_END = 1e-7
"""The default of `lr_end`."""


def training_errors(train: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Errors in the values of `train`, each of which has the right type. The Trainer would report them only after loading."""
    errors = _scheduler_errors(train)
    for name in ("logging_steps", "save_steps", "eval_steps"):
        steps = train.get(name) or 1
        if steps > 1 and steps != int(steps):
            errors.append(error_at(name, f"expected an integer, or a fraction of the run below 1, got {format_value(steps)}"))
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if train.get(name) and not train.get("dataloader_num_workers"):
            errors.append(error_at(name, "needs worker processes: give dataloader_num_workers, or leave it out"))
    optimizer = str(train.get("optim", ""))
    low_rank = optimizer.startswith(("galore", "apollo"))
    if low_rank and train.get("optim_target_modules") is None:
        errors.append(error_at("optim", f"{optimizer} needs optim_target_modules: give optim_target_modules: all-linear"))
    if not low_rank and train.get("optim_target_modules") is not None:
        errors.append(error_at("optim_target_modules", f"not supported with optim: {optimizer or 'its default'}; leave it out"))
    if optimizer.endswith("layerwise") and train.get("gradient_accumulation_steps", 1) != 1:
        errors.append(
            error_at("optim", f"{optimizer} does not support gradient_accumulation_steps; leave gradient_accumulation_steps out")
        )
    arguments = train.get("optim_args")
    if arguments and not all(part.count("=") == 1 for part in arguments.split(",")):
        errors.append(error_at("optim_args", f"expected name=value, separated by commas, got {format_value(arguments)}"))
    elif arguments:
        errors += _optimizer_errors(optimizer or str(train_arguments().arguments["optim"].default), arguments)
    if (liger := train.get("liger_kernel_config")) is not None:
        if not train.get("use_liger_kernel"):
            errors.append(error_at("liger_kernel_config", "needs use_liger_kernel: true; give it too, or leave this out"))
        for name in LIGER_LOSSES:
            if liger.get(name):
                message = "not supported: mmtune computes the loss of supervised tokens in parts itself; leave it out"
                errors.append(error_at(("liger_kernel_config", name), message))
    if train.get("torch_compile") is False:
        for name in ("torch_compile_mode", "torch_compile_backend"):
            if train.get(name) is not None:
                errors.append(
                    error_at(name, "not supported with torch_compile: false; leave it out, or give torch_compile: true")
                )
    return errors


def evaluation_errors(train: Mapping[str, Any], has_held_out: bool, stream: bool) -> Iterator[tuple[str, str]]:
    """Errors in the keys of `train` about the evaluation while training: a key and a message for each.

    Args:
        train: the section, each value of the right type.
        has_held_out: whether the recipe names held-out rows.
        stream: the recipe's `data.stream`.
    """
    strategy = train.get("eval_strategy", "no")
    if strategy == "no":
        for name in (*EVALUATION_KEYS, *EARLY_STOPPING):
            if train.get(name):
                yield name, "needs an evaluation while training: give eval_strategy: steps or epoch, or leave it out"
        if train.get("save_strategy") == "best":
            yield "save_strategy", "best needs an evaluation while training: give eval_strategy: steps or epoch"
        return
    if not has_held_out:
        rows = "evaluate: {data: [{path: held_out.json, template: llava}]}, or held_out: 0.1 in a source of data.train"
        yield "eval_strategy", f"needs held-out rows: give {rows}"
    if strategy == "epoch" and train.get("eval_steps") is not None:
        yield "eval_steps", "needs eval_strategy: steps; leave it out, or change eval_strategy"
    if strategy == "epoch" and stream:
        yield "eval_strategy", "epoch is not supported with data.stream: true: a stream has no epochs; give steps"
    if train.get("early_stopping_threshold") and train.get("early_stopping_patience") is None:
        yield "early_stopping_threshold", "needs early_stopping_patience: give it too, or leave this out"
    if train.get("load_best_model_at_end") and (message := _best_checkpoint_error(train, strategy)) is not None:
        yield "load_best_model_at_end", message


def feature_cache_errors(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What `data.cache_features` excludes in the rest of a recipe: a key of `data` and a message for each."""
    if recipe.data.cache_features is None:
        return
    key = ("cache_features",)
    if recipe.tune.vision.method != "frozen":
        yield key, f"needs a frozen vision tower, got tune.vision: {recipe.tune.vision.method}; leave it out, or freeze the tower"
    for number, source in enumerate(recipe.data.train):
        if source.augment is not None and source.augment.is_random:
            message = "random changes are not supported with data.cache_features, which keeps the features of one picture"
            yield ("train", number, "augment"), f"{message}; keep only resize, or leave one of the two out"
    if recipe.objective.models:
        models = ", ".join(f"objective.{name}" for name in recipe.objective.models)
        yield key, f"not supported with {models}, which reads the pixels of every image; leave it out"
    if recipe.train.get("torch_compile"):
        yield key, "not supported with train.torch_compile; leave one of the two out"


def _best_checkpoint_error(train: Mapping[str, Any], strategy: str) -> str | None:
    """transformers' rules of `load_best_model_at_end`: steps are saved as they are evaluated."""
    save = train.get("save_strategy", "no")
    if save == "best":
        return None
    if save != strategy:
        return (
            f"expected save_strategy: {strategy}, as eval_strategy, or best, got {save}: the best weights are read from a "
            f"checkpoint; give save_strategy: {strategy}"
        )
    every = train.get("eval_steps") or train.get("logging_steps", LOGGING_STEPS)
    saves = train.get("save_steps", train_arguments().arguments["save_steps"].default)
    is_multiple = (every < 1) == (saves < 1) and saves >= every and math.isclose(saves / every, round(saves / every))
    if strategy != "steps" or is_multiple:
        return None
    return f"expected save_steps to be a multiple of eval_steps ({every:g}), got {saves:g}; give save_steps: {every:g}"


def _optimizer_errors(optimizer: str, arguments: str) -> list[InitErrorDetails]:
    """Names in `optim_args` that the Trainer would not read."""
    valid = library_fact("optimizer_arguments")[optimizer]
    if not valid:
        return [error_at("optim_args", f"{optimizer} has no arguments; leave optim_args out")]
    unknown = [name for part in arguments.split(",") if (name := part.partition("=")[0].strip()) not in valid]
    return [error_at("optim_args", f"unknown name '{name}' for {optimizer}{nearest(name, valid)}") for name in unknown]


def _scheduler_errors(train: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Errors in `lr_scheduler_type` and `lr_scheduler_kwargs`."""
    kind, kwargs = train.get("lr_scheduler_type", "linear"), train.get("lr_scheduler_kwargs") or {}
    if kind in ("reduce_lr_on_plateau", "greedy"):
        return [error_at("lr_scheduler_type", f"{kind} is not supported: its rates depend on a metric; use cosine or linear")]
    if kind == "constant" and train.get("warmup_steps"):
        return [
            error_at(
                "lr_scheduler_type", "constant does not support warmup_steps; use constant_with_warmup, or leave warmup_steps out"
            )
        ]
    valid = library_fact("schedulers")[kind]
    unknown = [name for name in kwargs if name not in valid]
    if unknown and not valid:
        return [error_at("lr_scheduler_kwargs", f"{kind} has no arguments; leave lr_scheduler_kwargs out")]
    errors = []
    for name in unknown:
        hint = "; use min_lr with lr_scheduler_type: cosine_with_min_lr" if name in ("min_lr", "min_lr_rate", "eta_min") else ""
        errors.append(error_at(("lr_scheduler_kwargs", name), f"unknown key for {kind}{hint or nearest(name, valid)}"))
    for name, value in kwargs.items():
        if name in ("warmup_type", "decay_type"):
            if value not in DECAY_TYPES:
                errors.append(
                    error_at(("lr_scheduler_kwargs", name), f"expected {', '.join(DECAY_TYPES)}, got {format_value(value)}")
                )
        elif name not in unknown and value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            errors.append(error_at(("lr_scheduler_kwargs", name), f"expected a number, got {format_value(value)}"))
        elif value is not None and name in MINIMUM and value < MINIMUM[name]:
            errors.append(
                error_at(("lr_scheduler_kwargs", name), f"expected at least {MINIMUM[name]}, got {format_value(value)}")
            )
    if errors:
        return errors
    if "min_lr_rate" in valid:
        lowest = [name for name in ("min_lr", "min_lr_rate") if kwargs.get(name) is not None]
        if len(lowest) != 1:
            message = f"{kind} needs one of min_lr and min_lr_rate, got {'both' if lowest else 'neither'}"
            return [error_at("lr_scheduler_type", f"{message}: give lr_scheduler_kwargs: {{min_lr_rate: 0.1}}")]
    errors = _lowest_rate_errors(train, kwargs)
    if kind == "polynomial" and kwargs.get("lr_end") is None and train.get("learning_rate", 1) <= POLYNOMIAL_END:
        message = f"expected more than {POLYNOMIAL_END:g}, the last learning rate of polynomial, got {train['learning_rate']:g}"
        errors.append(error_at("learning_rate", f"{message}; give a higher rate, or lr_scheduler_kwargs: {{lr_end: 0}}"))
    if errors:
        return errors
    if kind == "warmup_stable_decay" and kwargs.get("num_decay_steps") is None:
        message = f"{kind} needs num_decay_steps: give lr_scheduler_kwargs: {{num_decay_steps: 100}}"
        return [error_at("lr_scheduler_type", message)]
    return _phase_errors(train, kwargs)


def _lowest_rate_errors(train: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Errors of a final rate that is not below `learning_rate`. Their ratio scales the learning rates of all components."""
    errors = []
    for name, advice in (("lr_end", "0 is always valid"), ("min_lr", "min_lr_rate: 0.1 is a tenth of each component's rate")):
        lowest, rate = kwargs.get(name), train.get("learning_rate")
        if lowest and rate is None:
            message = f"needs train.learning_rate, which it is relative to: give it too; {advice}"
            errors.append(error_at(("lr_scheduler_kwargs", name), message))
        elif lowest and lowest >= rate:
            message = f"expected less than train.learning_rate ({rate:g}), got {format_value(lowest)}; {advice}"
            errors.append(error_at(("lr_scheduler_kwargs", name), message))
    return errors


def _phase_errors(train: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Errors of phases of a schedule that together have more steps than the run."""
    steps, warmup = train.get("max_steps") or -1, train.get("warmup_steps") or 0
    warmup = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    stable, decay = kwargs.get("num_stable_steps") or 0, kwargs.get("num_decay_steps") or 0
    if not decay or steps < 1 or warmup + stable + decay <= steps:
        return []
    phases = [f"warmup_steps {warmup}"] * bool(warmup) + [f"num_stable_steps {stable}"] * bool(stable)
    others = " and ".join([*phases, f"train.max_steps {steps}"])
    limit = f"at most {max(0, steps - warmup - stable)} with {others}"
    return [error_at(("lr_scheduler_kwargs", "num_decay_steps"), f"expected {limit}, got {format_value(decay)}")]


def missing_libraries(train: Mapping[str, Any], attention: str | None = None) -> Iterator[tuple[str, str]]:
    """A key and a message for each value whose library is not installed.

    Args:
        train: the recipe's section.
        attention: the recipe's model.attn_implementation.
    """
    trackers = train.get("report_to", "none")
    values = {
        "model.attn_implementation": [attention],
        "train.optim": [train.get("optim")],
        "train.use_liger_kernel": ["true" if train.get("use_liger_kernel") else None],
        "train.report_to": [trackers] if isinstance(trackers, str) else trackers,
    }
    for key, names in values.items():
        for name in names:
            library = LIBRARY_KEYS[key].library(str(name))
            if library is not None and not any(map(find_spec, library.modules)):
                message = f"{name} needs a library that is not installed: pip install {library.package}"
                yield key, f"{message}; or give {LIBRARY_KEYS[key].other}"
