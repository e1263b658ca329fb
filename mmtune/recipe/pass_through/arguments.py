"""The settings that a recipe borrows: LoraConfig's and TrainingArguments' own names, types and descriptions.

Both are those of the installed versions, as `library_facts` knows them, so a recipe accepts what the libraries accept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmtune.methods.method_table import METHODS
from mmtune.recipe.other_toolkits import boolean_hint, value_hint
from mmtune.recipe.pass_through.annotations import annotation_of, choices_of, describe, numbered
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import nearest

_BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("r", "init_r", "target_r", "oft_block_size", "boft_block_size", "bottleneck_size"), Annotated[int, Ge(1)]),
    **dict.fromkeys(("num_virtual_tokens", "adapter_len", "encoder_hidden_size"), Annotated[int, Ge(1)]),
    **dict.fromkeys(("lora_alpha", "alpha"), Annotated[int, Gt(0)]),
    **dict.fromkeys(("lora_dropout", "bottleneck_dropout", "module_dropout", "boft_dropout"), Annotated[float, Ge(0), Lt(1)]),
    **dict.fromkeys(("vera_dropout", "rank_dropout", "miss_dropout", "encoder_dropout"), Annotated[float, Ge(0), Lt(1)]),
    **dict.fromkeys(("target_modules", "feedforward_modules"), list[str] | str),
    "init_lora_weights": bool | Literal["gaussian", "eva", "olora", "pissa", "lora_ga"] | numbered("pissa_niter_"),
}
"""Tighter than the dataclasses say. OFT's `r` of 0 means "by block size", and is what it is when not given."""

_COUNT, _POSITIVE, _NOT_NEGATIVE = Annotated[int, Ge(1)], Annotated[float, Gt(0)], Annotated[float, Ge(0)]
_TRAIN_BOUNDS: dict[str, Any] = {
    # Rows of similar lengths come together with `data.tokens_per_batch`, not by the Trainer's other strategies.
    "train_sampling_strategy": Literal["random", "sequential"],
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"), _COUNT),
    **dict.fromkeys(
        ("save_total_limit", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_bucket_cap_mb"), _COUNT | None
    ),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon", "logging_steps", "save_steps"), _POSITIVE),
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
"""Tighter than TrainingArguments says."""

_EVALUATE = "mmtune evaluates before and after tuning, not during it; give the evaluate section"
_UPLOAD = "mmtune does not upload; push the finished directory yourself"
_PRECISION = "give model.precision"
_LAUNCH = "the launcher is asked for it: accelerate launch --config_file recipes/accelerate/fsdp2.yaml mmtune/train.py RECIPE"
_BATCH_SPLIT = "mmtune decides how batches are divided, so that every layout trains the same"
_COLUMNS = "mmtune's own collator decides what reaches the model"
_TRAIN_MANAGED = {
    "output_dir": "give output_dir at the top of the recipe",
    "logging_dir": "logs go into output_dir",
    "resume_from_checkpoint": "give --resume on the command line",
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "local_rank": "the launcher sets it",
    **dict.fromkeys(("average_tokens_across_devices", "accelerator_config"), _BATCH_SPLIT),
    **dict.fromkeys(("fsdp", "fsdp_config"), _LAUNCH),
    "parallelism_config": "mmtune does not train with it; DDP, DeepSpeed ZeRO or FSDP2 is right",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"), _UPLOAD),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _UPLOAD),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay"), _EVALUATE),
    **dict.fromkeys(("eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches"), _EVALUATE),
    **dict.fromkeys(("eval_use_gather_object", "batch_eval_metrics", "include_for_metrics"), _EVALUATE),
    **dict.fromkeys(("prediction_loss_only", "load_best_model_at_end", "metric_for_best_model"), _EVALUATE),
    "greater_is_better": _EVALUATE,
    "include_num_input_tokens_seen": "mmtune counts the tokens that are no padding",
    "logging_nan_inf_filter": "mmtune stops at a loss that is not finite",
    "length_column_name": "mmtune counts lengths itself: data.tokens_per_batch",
    "label_smoothing_factor": "mmtune scores exact labels only",
    "per_device_eval_batch_size": "give evaluate.batch_size",
    "save_only_model": "a run goes on from all that a checkpoint holds; adapter/ is the model alone",
    "save_on_each_node": "all machines share output_dir",
    "ignore_data_skip": "a run goes on with the row that it stopped at",
    "enable_jit_checkpoint": "mmtune writes a checkpoint at SIGTERM by itself",
    "auto_find_batch_size": "the batch is a part of the recipe; mmtune plan finds the largest that fits",
    "dataloader_in_order": "batches come in one order",
}
_TRAIN_RENAMED = {
    "warmup_ratio": "a float warmup_steps below 1 is the ratio, as in warmup_steps: 0.03",
    "evaluation_strategy": _EVALUATE,
    "max_length": "give data.max_tokens",
    "max_seq_length": "give data.max_tokens",
    "no_cuda": "its name is now use_cpu",
    "lr": "write learning_rate",
    "epochs": "write num_train_epochs",
    "batch_size": "write per_device_train_batch_size",
    "group_by_length": "give data.tokens_per_batch, which puts similar lengths together",
}
_PYTHON_OBJECT = "it takes a Python object, which a recipe cannot hold"


@dataclasses.dataclass(frozen=True)
class Argument:
    """One borrowed setting."""

    annotation: Any
    default: Any
    description: str

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """Validates values, and makes their JSON schema."""
        return TypeAdapter(self.annotation)

    def error_message(self, name: str, value: object) -> str | None:
        """What is wrong with a plain value of the setting of that name, or None."""
        try:
            if not _is_finite(value):
                return f"expected a finite number, got {format_value(value)}"
            self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            own = [e for e in error.errors() if e["type"] == "recipe"]
            hint = own[0]["msg"] if own else f"expected {describe(self.annotation, format_value)}, got {format_value(value)}"
            if told := value_hint(name, value) or (boolean_hint(value) if "true or false" in hint else ""):
                return hint + told
            names = choices_of(self.annotation)
            near = nearest(value, names) if names and isinstance(value, str) else ""
            return hint + (near if len(names) > 12 or "did you mean" in near else "")
        except TypeError:
            return f"expected {describe(self.annotation, format_value)}, got {format_value(value)}"
        return None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The settings borrowed from one dataclass, by name, and those refused, with the reason."""

    arguments: dict[str, Argument]
    managed: dict[str, str]
    renamed: dict[str, str]
    defaults: dict[str, Any]

    def check(self, given: Mapping[str, Any], also_valid: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[InitErrorDetails]]:
        """The given settings over mmtune's defaults, in the dataclass's order, and a fault for each that is wrong."""
        errors = []
        for name, value in given.items():
            if name in self.managed:
                errors.append(error_at(name, f"not a recipe's to set: {self.managed[name]}"))
            elif name not in self.arguments:
                hint = f"; {self.renamed[name]}" if name in self.renamed else nearest(name, {*self.arguments, *also_valid})
                errors.append(error_at(name, f"unknown key{hint}"))
            elif (message := self.arguments[name].error_message(name, value)) is not None:
                errors.append(error_at(name, message))
        settings = {**self.defaults, **given}
        return {name: settings[name] for name in self.arguments if name in settings}, errors

    def json_schema(self) -> dict[str, Any]:
        """JSON schemas of the settings, by name."""
        return {
            name: {
                "description": argument.description,
                **argument.adapter.json_schema(),
                **({"default": self.defaults.get(name, argument.default)} if _is_plain(argument.default) else {}),
            }
            for name, argument in self.arguments.items()
        }


def error_at(key: str | tuple[str | int, ...], message: str) -> InitErrorDetails:
    """A pydantic error at a key whose message is already meant for the reader."""
    # The custom error fills {names} in its template from the context alone, so the text goes through the context.
    error = PydanticCustomError("recipe", "{text}", {"text": message})
    return {"type": error, "loc": (key,) if isinstance(key, str) else key, "input": None}


def format_value(value: object) -> str:
    """A value as the reader would write it, short."""
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
    """What a component may hold beside `method: NAME`: the PEFT configuration's fields, less what mmtune owns."""
    method = METHODS[name]
    fields = library_fact("peft_configurations")[method.config]
    return _arguments(fields, dict(method.refused), {}, method.settings(), _BOUNDS)


@functools.cache
def train_arguments() -> Arguments:
    """What `train` may hold: transformers' TrainingArguments, less what mmtune owns."""
    names = ("none", "all", *library_fact("reporters"))
    backends = tuple(library_fact("compile_backends"))
    bounds = {
        **_TRAIN_BOUNDS,
        "report_to": Literal[names] | list[Literal[names]],  # type: ignore[valid-type]
        "torch_compile_backend": Literal[backends] | None,
    }
    return _arguments(library_fact("training_arguments"), _TRAIN_MANAGED, _TRAIN_RENAMED, {"report_to": "none"}, bounds)


def _arguments(
    fields: Mapping[str, Any], managed: dict[str, str], renamed: dict[str, str], defaults: dict[str, Any], bounds: dict[str, Any]
) -> Arguments:
    arguments: dict[str, Argument] = {}
    refused = dict(managed)
    for name, field in fields.items():
        if name in managed:
            continue
        if name not in bounds and field["type"] in (None, "null"):
            refused[name] = _PYTHON_OBJECT
            continue
        annotation = bounds[name] if name in bounds else annotation_of(field["type"])
        arguments[name] = Argument(annotation, field.get("default", dataclasses.MISSING), field["help"])
    return Arguments(arguments, refused, renamed, defaults)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _is_plain(value: Any) -> bool:
    return value is not dataclasses.MISSING and (value is None or isinstance(value, (bool, int, float, str)))


class Settings(Mapping[str, Any]):
    """Borrowed settings by name. Frozen: what it hands out is a copy."""

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
        raise AttributeError("a recipe's settings are frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a recipe's settings are frozen")

    def __hash__(self) -> int:
        return hash(json.dumps(self._values, sort_keys=True))

    def __repr__(self) -> str:
        return repr(self._values)

    def __reduce__(self) -> tuple[type[Settings], tuple[dict[str, Any]]]:
        return Settings, (self._values,)
