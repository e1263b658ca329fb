"""Rules of a recipe's `train` section that TrainingArguments' types do not say, and the libraries that its values need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from pydantic_core import InitErrorDetails

from mmtune.recipe.pass_through.arguments import error_at, format_value, train_arguments
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import nearest

OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu": ("torch_npu", "torch_npu"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "galore": ("galore_torch", "galore-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "stable_adamw": ("optimi", "torch-optimi"),
}
"""By the beginning of `optim`: the module that it needs, and what pip calls it. The others come with torch or bitsandbytes."""

REPORTERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "clearml": (("clearml",), "clearml"),
    "dagshub": (("dagshub",), "dagshub"),
    "flyte": (("flytekit",), "flytekit"),
    "dvclive": (("dvclive",), "dvclive"),
    "swanlab": (("swanlab",), "swanlab"),
}
"""By a name of `report_to`: the modules of which it needs one, and what pip calls the first."""

ATTENTION: Mapping[str, tuple[tuple[str, ...], str]] = {
    "flash_attention_2": (("flash_attn", "kernels", "torch_npu"), "flash-attn"),
    "flash_attention_3": (("flash_attn_interface", "kernels", "torch_npu"), "flash-attn-3"),
    "flash_attention_4": (("flash_attn", "kernels", "torch_npu"), "flash-attn-4"),
}
"""By a name of `attn_implementation`: as `REPORTERS`. Where the first is missing, transformers takes it from the others."""

SHAPES = ("linear", "cosine", "1-sqrt")
"""Of the warm-up and the decay of warmup_stable_decay."""
LOWEST = {"num_decay_steps": 1, "num_stable_steps": 0, "timescale": 1}
"""By a name of `lr_scheduler_kwargs`: the lowest value that it may have."""

POLYNOMIAL_END = 1e-7
"""What `lr_end` is by default."""


def training_errors(train: Mapping[str, Any]) -> list[InitErrorDetails]:
    """What is wrong between the settings of `train`, each of which has the right type; what the Trainer would find out after the
    model is loaded."""
    errors = _scheduler_errors(train)
    for name in ("logging_steps", "save_steps"):
        steps = train.get(name, 1)
        if steps > 1 and steps != int(steps):
            errors.append(error_at(name, f"expected an integer, or a share of the run below 1, got {format_value(steps)}"))
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if train.get(name) and not train.get("dataloader_num_workers"):
            errors.append(error_at(name, "means nothing without workers: give dataloader_num_workers"))
    if train.get("save_strategy") == "best":
        errors.append(error_at("save_strategy", "mmtune evaluates before and after tuning, not during it; give steps or epoch"))
    optimizer = str(train.get("optim", ""))
    low_rank = optimizer.startswith(("galore", "apollo"))
    if low_rank and train.get("optim_target_modules") is None:
        errors.append(error_at("optim", f"{optimizer} needs the layers that it works on: give optim_target_modules: all-linear"))
    if not low_rank and train.get("optim_target_modules") is not None:
        errors.append(error_at("optim_target_modules", f"means nothing with optim: {optimizer or 'its default'}; leave it out"))
    if optimizer.endswith("layerwise") and train.get("gradient_accumulation_steps", 1) != 1:
        errors.append(error_at("optim", f"{optimizer} takes no gradient_accumulation_steps; leave them out"))
    written = train.get("optim_args")
    if written and not all(part.count("=") == 1 for part in written.split(",")):
        errors.append(error_at("optim_args", f"expected name=value, with commas between several, got {format_value(written)}"))
    elif written:
        errors += _optimizer_errors(optimizer or str(train_arguments().arguments["optim"].default), written)
    if train.get("torch_compile") is False:
        for name in ("torch_compile_mode", "torch_compile_backend"):
            if train.get(name) is not None:
                errors.append(error_at(name, "compiles, and torch_compile is false; leave it out, or give torch_compile: true"))
    return errors


def _optimizer_errors(optimizer: str, written: str) -> list[InitErrorDetails]:
    """What the Trainer would leave unread of `optim_args`."""
    valid = library_fact("optimizer_arguments")[optimizer]
    if not valid:
        return [error_at("optim_args", f"{optimizer} takes none; leave them out")]
    names = [part.partition("=")[0].strip() for part in written.split(",")]
    return [
        error_at("optim_args", f"unknown name '{n}' for {optimizer}{nearest(n, set(valid))}") for n in names if n not in valid
    ]


def _scheduler_errors(train: Mapping[str, Any]) -> list[InitErrorDetails]:
    """What is wrong with `lr_scheduler_type` and its `lr_scheduler_kwargs`."""
    kind, given = train.get("lr_scheduler_type", "linear"), train.get("lr_scheduler_kwargs") or {}
    if kind in ("reduce_lr_on_plateau", "greedy"):
        told = f"{kind} follows the scores of an evaluation during training, which mmtune does not make; use cosine or linear"
        return [error_at("lr_scheduler_type", told)]
    if kind == "constant" and train.get("warmup_steps"):
        return [error_at("lr_scheduler_type", "constant takes no warmup_steps; use constant_with_warmup, or leave them out")]
    valid = library_fact("schedulers")[kind]
    unknown = [name for name in given if name not in valid]
    if unknown and not valid:
        return [error_at("lr_scheduler_kwargs", f"{kind} takes none; leave them out")]
    errors = []
    for name in unknown:
        hint = "; lr_scheduler_type: cosine_with_min_lr takes min_lr" if name in ("min_lr", "min_lr_rate", "eta_min") else ""
        errors.append(error_at(("lr_scheduler_kwargs", name), f"unknown key of {kind}{hint or nearest(name, set(valid))}"))
    for name, value in given.items():
        if name in ("warmup_type", "decay_type"):
            if value not in SHAPES:
                errors.append(error_at(("lr_scheduler_kwargs", name), f"expected {', '.join(SHAPES)}, got {format_value(value)}"))
        elif name not in unknown and value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            errors.append(error_at(("lr_scheduler_kwargs", name), f"expected a number, got {format_value(value)}"))
        elif value is not None and name in LOWEST and value < LOWEST[name]:
            errors.append(error_at(("lr_scheduler_kwargs", name), f"expected at least {LOWEST[name]}, got {format_value(value)}"))
    if errors:
        return errors
    if "min_lr_rate" in valid:
        lowest = [name for name in ("min_lr", "min_lr_rate") if given.get(name) is not None]
        if len(lowest) != 1:
            told = "needs its lowest rate" if not lowest else "takes one of min_lr and min_lr_rate"
            return [error_at("lr_scheduler_type", f"{kind} {told}: give lr_scheduler_kwargs: {{min_lr_rate: 0.1}}")]
    errors = _lowest_rate_errors(train, given)
    if kind == "polynomial" and given.get("lr_end") is None and train.get("learning_rate", 1) <= POLYNOMIAL_END:
        told = f"polynomial ends at {POLYNOMIAL_END:g}: give a higher rate, or lr_scheduler_kwargs: {{lr_end: 0}}"
        errors.append(error_at("learning_rate", told))
    if errors:
        return errors
    if kind == "warmup_stable_decay" and given.get("num_decay_steps") is None:
        told = f"{kind} needs the length of its decay: give lr_scheduler_kwargs: {{num_decay_steps: 100}}"
        return [error_at("lr_scheduler_type", told)]
    return _phase_errors(train, given)


def _lowest_rate_errors(train: Mapping[str, Any], given: Mapping[str, Any]) -> list[InitErrorDetails]:
    """A lowest rate that is not below the highest. It scales every component's rate by its quotient with `learning_rate`."""
    errors = []
    for name, advice in (("lr_end", "0 is always valid"), ("min_lr", "min_lr_rate: 0.1 is a tenth of each component's rate")):
        lowest, rate = given.get(name), train.get("learning_rate")
        if lowest and rate is None:
            told = f"is relative to train.learning_rate, which is not given: give it too; {advice}"
            errors.append(error_at(("lr_scheduler_kwargs", name), told))
        elif lowest and lowest >= rate:
            told = f"expected less than train.learning_rate ({rate:g}), got {format_value(lowest)}; {advice}"
            errors.append(error_at(("lr_scheduler_kwargs", name), told))
    return errors


def _phase_errors(train: Mapping[str, Any], given: Mapping[str, Any]) -> list[InitErrorDetails]:
    """Phases of a schedule that together take more steps than the run has."""
    steps, warmup = train.get("max_steps") or -1, train.get("warmup_steps") or 0
    warmup = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    stable, decay = given.get("num_stable_steps") or 0, given.get("num_decay_steps") or 0
    if not decay or steps < 1 or warmup + stable + decay <= steps:
        return []
    phases = [f"warmup_steps {warmup}"] * bool(warmup) + [f"num_stable_steps {stable}"] * bool(stable)
    beside = f" with {' and '.join(phases)}" if phases else ""
    told = f"expected at most {max(0, steps - warmup - stable)}{beside}: train.max_steps is {steps}; got {format_value(decay)}"
    return [error_at(("lr_scheduler_kwargs", "num_decay_steps"), told)]


def missing_libraries(train: Mapping[str, Any], attention: str | None = None) -> Iterator[tuple[str, str]]:
    """A key and a message for each value whose library is not installed on this machine; `attention` is the model's."""
    modules, package = (("kernels",), "kernels") if "/" in (attention or "") else ATTENTION.get(attention or "", ((), ""))
    if modules and not any(map(find_spec, modules)):
        yield "model.attn_implementation", f"not installed: pip install {package}; or give sdpa"
    optimizer = str(train.get("optim", ""))
    for beginning, (module, package) in OPTIMIZERS.items():
        if optimizer.startswith(beginning) and find_spec(module) is None:
            yield "train.optim", f"{optimizer} needs a library that is not installed: pip install {package}; or give adamw_torch"
    if train.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        yield "train.use_liger_kernel", "needs a library that is not installed: pip install liger-kernel; or give false"
    asked = train.get("report_to", "none")
    for name in [asked] if isinstance(asked, str) else asked:
        modules, package = REPORTERS.get(name, ((), ""))
        if modules and not any(map(find_spec, modules)):
            yield "train.report_to", f"{name}: not installed: pip install {package}; or give none"
