"""Pass-through arguments of a recipe: the fields of PEFT's configurations and of TrainingArguments, by their own names.

Names, types and descriptions are those of the installed versions (`library_facts`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from mmtune.methods.method_table import METHODS
from mmtune.recipe.other_toolkits import boolean_hint, value_hint
from mmtune.recipe.pass_through.annotations import annotation_of, choices_of, describe
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import closest_hint, closest_name, nearest

_COUNT, _POSITIVE, _NOT_NEGATIVE = Annotated[int, Ge(1)], Annotated[float, Gt(0)], Annotated[float, Ge(0)]
_TRAIN_BOUNDS: dict[str, Any] = {
    # `data.packing` and `data.plan` balance the batches of processes; the Trainer's batch_rebalance is not supported.
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"), _COUNT),
    **dict.fromkeys(
        ("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb"), _COUNT | None
    ),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon", "logging_steps", "save_steps"), _POSITIVE),
    "eval_steps": _POSITIVE | None,
    "eval_delay": _NOT_NEGATIVE,
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Annotated[float, Ge(0), Lt(1)]),
    "max_steps": Annotated[int, Ge(1)] | Literal[-1],
    "neftune_noise_alpha": _POSITIVE | None,
    "dataloader_num_workers": Annotated[int, Ge(0)],
    "seed": Annotated[int, Ge(0), Lt(2**32)],
    "data_seed": Annotated[int, Ge(0), Lt(2**32)] | None,
    **dict.fromkeys(("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), dict | None),
    "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", None],
    "debug": Literal["", "underflow_overflow"] | list[Literal["underflow_overflow"]],
}
"""Types narrower than TrainingArguments declares."""

_NO_LOGITS = "an evaluation while training adds up losses exactly and keeps no logits"
_STRATEGY = "give eval_strategy"
_UPLOAD = "mmtune does not upload; push the finished directory yourself"
_PRECISION = "give model.precision"
_LAUNCH = "give it to the launcher: accelerate launch --config_file recipes/accelerate/fsdp2.yaml mmtune/train.py RECIPE"
_BATCH_SPLIT = "mmtune divides the batches among the processes, so that every parallelism strategy gives the same result"
_COLUMNS = "mmtune's collator decides what the model receives"
_TRAIN_MANAGED = {
    "output_dir": "give output_dir at the top of the recipe",
    "logging_dir": "logs go into output_dir",
    "resume_from_checkpoint": "give --resume on the command line",
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "local_rank": "the launcher sets it",
    **dict.fromkeys(("average_tokens_across_devices", "accelerator_config"), _BATCH_SPLIT),
    **dict.fromkeys(("fsdp", "fsdp_config"), _LAUNCH),
    "parallelism_config": "mmtune does not support it; use DDP, DeepSpeed ZeRO or FSDP2",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"), _UPLOAD),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _UPLOAD),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _STRATEGY),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"), _NO_LOGITS),
    **dict.fromkeys(("batch_eval_metrics", "include_for_metrics", "prediction_loss_only"), _NO_LOGITS),
    "include_num_input_tokens_seen": "mmtune counts the tokens that are not padding",
    "logging_nan_inf_filter": "mmtune stops at a loss that is not finite, or skips the step: data.max_nonfinite_steps",
    "length_column_name": "mmtune counts lengths itself",
    "label_smoothing_factor": "mmtune computes the loss on exact labels only",
    "per_device_eval_batch_size": "give evaluate.batch_size",
    "save_only_model": "resuming needs the whole checkpoint; adapter/ of a run holds the model only",
    "save_on_each_node": "all machines share output_dir",
    "ignore_data_skip": "a resumed run continues with the next row",
    "enable_jit_checkpoint": "mmtune always writes a checkpoint at SIGTERM",
    "auto_find_batch_size": "the recipe sets the batch size; mmtune plan suggests one that fits",
    "dataloader_in_order": "the order of batches is fixed",
}
_TRAIN_RENAMED = {
    "warmup_ratio": "a float warmup_steps below 1 is the ratio, as in warmup_steps: 0.03",
    "evaluation_strategy": "its name is now eval_strategy",
    "max_length": "give data.max_tokens",
    "max_seq_length": "give data.max_tokens",
    "no_cuda": "its name is now use_cpu",
    "lr": "write learning_rate",
    "epochs": "write num_train_epochs",
    "batch_size": "write per_device_train_batch_size",
}
EARLY_STOPPING: dict[str, Any] = {
    "early_stopping_patience": (
        _COUNT | None,
        None,
        "Stop after this many evaluations in a row without an improvement of metric_for_best_model; null: never.",
    ),
    "early_stopping_threshold": (_NOT_NEGATIVE, 0.0, "An improvement of metric_for_best_model counts if it is larger than this."),
}
"""Keys of `train` that are arguments of transformers' EarlyStoppingCallback: type, default and description."""
_PYTHON_OBJECT = "its value is a Python object, which a recipe cannot contain"


@dataclasses.dataclass(frozen=True)
class Argument:
    """One pass-through argument."""

    annotation: Any
    default: Any
    description: str

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Validates values and generates their JSON schema."""
        return TypeAdapter(self.annotation)

    def error_message(self, name: str, value: object) -> str | None:
        """What is wrong with a plain value of the argument of that name; None if it is valid."""
        try:
            if not _is_finite(value):
                return f"expected a finite number, got {format_value(value)}"
            self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            for detail in error.errors():
                if detail["type"] == ERROR:
                    return detail["msg"]
            expected = describe(self.annotation, format_value)
            hint = value_hint(name, value) or (boolean_hint(value) if "true or false" in expected else "")
            choices = choices_of(self.annotation)
            if not hint and choices and isinstance(value, str):
                hint = (nearest if len(choices) > 12 else closest_hint)(value, choices)
            return f"expected {expected}, got {format_value(value)}{hint}"
        except TypeError:
            return f"expected {describe(self.annotation, format_value)}, got {format_value(value)}"
        return None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The pass-through arguments of one dataclass.

    Attributes:
        arguments: by name.
        managed: names that mmtune sets, and why or how the recipe gives them.
        renamed: names of earlier versions or other toolkits, and what to write instead.
        defaults: mmtune's, which go before the dataclass's.
    """

    arguments: dict[str, Argument]
    managed: dict[str, str]
    renamed: dict[str, str]
    defaults: dict[str, Any]

    def check(self, values: Mapping[str, Any], also_valid: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """The values over mmtune's defaults, in the dataclass's order, and an error for each that is invalid.

        Args:
            values: by name, as in the recipe.
            also_valid: keys beside the arguments, for suggestions.
        """
        errors = []
        for name, value in values.items():
            if name in self.managed:
                errors.append(error_at(name, f"not supported in a recipe: {self.managed[name]}"))
            elif name not in self.arguments:
                valid = {*self.arguments, *also_valid}
                reason = self.renamed.get(name)
                errors.append(error_at(name, f"unknown key; {reason}") if reason else unknown_key_at((name,), valid))
            elif (message := self.arguments[name].error_message(name, value)) is not None:
                errors.append(error_at(name, message))
        settings = {**self.defaults, **values}
        return {name: settings[name] for name in self.arguments if name in settings}, errors

    def json_schema(self) -> dict[str, Any]:
        """JSON schemas of the arguments, by name."""
        return {
            name: {
                "description": argument.description,
                **argument.adapter.json_schema(),
                **({"default": self.defaults.get(name, argument.default)} if _is_plain(argument.default) else {}),
            }
            for name, argument in self.arguments.items()
        }


ErrorKind = Literal["recipe", "unknown_key", "missing_key"]
ERROR: ErrorKind = "recipe"
UNKNOWN: ErrorKind = "unknown_key"
MISSING: ErrorKind = "missing_key"


def error_at(
    key: str | tuple[str | int, ...], message: str, kind: ErrorKind = ERROR, closest: str | None = None
) -> InitErrorDetails:
    """A pydantic error at a key, with a message for the user.

    Args:
        key: one key, or the path to it.
        closest: for an unknown key, the valid key that it is closest to.
    """
    # PydanticCustomError fills {names} of its template from the context, so the text is passed through the context.
    error = PydanticCustomError(kind, "{text}", {"text": message, "closest": closest})
    return {"type": error, "loc": (key,) if isinstance(key, str) else key, "input": None}


def unknown_key_at(path: tuple[str | int, ...], valid: Collection[str]) -> InitErrorDetails:
    """The error of an unknown key; `valid` are the keys of the same mapping."""
    name = str(path[-1])
    return error_at(path, f"unknown key{nearest(name, valid)}", kind=UNKNOWN, closest=closest_name(name, valid))


def copied_error(detail: ErrorDetails) -> InitErrorDetails:
    """An error made by `error_at`, from the details of the ValidationError that holds it."""
    context = detail["ctx"]
    return error_at(detail["loc"], context["text"], kind=detail["type"], closest=context["closest"])  # type: ignore[arg-type]


def format_value(value: object) -> str:
    """A value as it is written in a recipe, shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = repr(value)
    text = f"'{value}'" if isinstance(value, str) else text
    return text if len(text) <= 60 else f"{text[:56]} ..."


@functools.cache
def method_arguments(name: str) -> Arguments:
    """The arguments beside `method: NAME`: the fields of the PEFT configuration, without those that mmtune manages."""
    method = METHODS[name]
    fields = library_fact("peft_configurations")[method.config]
    arguments = _arguments(fields, dict(method.managed), {}, method.default_settings(), method.narrow_types())
    for extra, setting in method.extra_settings.items():
        arguments.arguments[extra] = Argument(setting.annotation, None, setting.description)
    return arguments


@functools.cache
def train_arguments() -> Arguments:
    """The arguments of `train`: the fields of TrainingArguments without those that mmtune manages, and `EARLY_STOPPING`."""
    names = ("none", "all", *library_fact("reporters"))
    backends = tuple(library_fact("compile_backends"))
    bounds = {
        **_TRAIN_BOUNDS,
        "report_to": Literal[names] | list[Literal[names]],  # type: ignore[valid-type]
        "torch_compile_backend": Literal[backends] | None,
    }
    arguments = _arguments(library_fact("training_arguments"), _TRAIN_MANAGED, _TRAIN_RENAMED, {"report_to": "none"}, bounds)
    arguments.arguments.update({name: Argument(*argument) for name, argument in EARLY_STOPPING.items()})
    return arguments


def _arguments(
    fields: Mapping[str, Any], managed: dict[str, str], renamed: dict[str, str], defaults: dict[str, Any], bounds: dict[str, Any]
) -> Arguments:
    arguments: dict[str, Argument] = {}
    managed = dict(managed)
    for name, field in fields.items():
        if name in managed:
            continue
        if name not in bounds and field["type"] in (None, "null"):
            managed[name] = _PYTHON_OBJECT
            continue
        annotation = bounds[name] if name in bounds else annotation_of(field["type"])
        arguments[name] = Argument(annotation, field.get("default", dataclasses.MISSING), field["help"])
    return Arguments(arguments, managed, renamed, defaults)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_plain(value: Any) -> bool:
    return value is not dataclasses.MISSING and (value is None or isinstance(value, (bool, int, float, str)))


class Settings(Mapping[str, Any]):
    """Pass-through arguments by name. Frozen: reading a value returns a copy."""

    __slots__ = ("_values",)
    _values: dict[str, Any]

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_values", deepcopy(dict(values or {})))

    def __getitem__(self, name: str) -> Any:
        return deepcopy(self._values[name])

    def __iter__(self) -> typing.Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("the arguments of a recipe are frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("the arguments of a recipe are frozen")

    def __hash__(self) -> int:
        return hash(json.dumps(self._values, sort_keys=True))

    def __repr__(self) -> str:
        return repr(self._values)

    def __reduce__(self) -> tuple[type[Settings], tuple[dict[str, Any]]]:
        return Settings, (self._values,)
