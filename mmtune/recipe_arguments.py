"""The settings that a recipe borrows: LoraConfig's and TrainingArguments' own names, types and descriptions.

Both are read from the installed dataclasses, so a recipe accepts what the installed versions accept. The imports wait
until a recipe is checked, because they bring torch along.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import re
import types
import typing
from collections.abc import Mapping
from copy import deepcopy
from enum import Enum
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmtune.errors import nearest
from mmtune.methods.table import METHODS


def _family(pattern: str) -> Any:
    stem = pattern.partition("[")[0]

    def check(value: str) -> str:
        if not re.fullmatch(rf"{re.escape(stem)}[0-9]+", value):
            raise ValueError(f"not {stem}N")
        return value

    return Annotated[str, AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^{stem}[0-9]+$"})]


_BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("r", "init_r", "target_r", "oft_block_size", "boft_block_size", "bottleneck_size"), Annotated[int, Ge(1)]),
    **dict.fromkeys(("num_virtual_tokens", "adapter_len", "encoder_hidden_size"), Annotated[int, Ge(1)]),
    **dict.fromkeys(("lora_alpha", "alpha"), Annotated[int, Gt(0)]),
    **dict.fromkeys(("lora_dropout", "bottleneck_dropout", "module_dropout", "boft_dropout"), Annotated[float, Ge(0), Lt(1)]),
    **dict.fromkeys(("vera_dropout", "rank_dropout", "miss_dropout", "encoder_dropout"), Annotated[float, Ge(0), Lt(1)]),
    **dict.fromkeys(("target_modules", "feedforward_modules"), list[str] | str),
    "init_lora_weights": bool | Literal["gaussian", "eva", "olora", "pissa", "lora_ga"] | _family("pissa_niter_[n]"),
}
"""Tighter than the dataclasses say. OFT's `r` of 0 means "by block size", and is what it is when not given."""

_TRAIN_BOUNDS: dict[str, Any] = {"train_sampling_strategy": Literal["random", "sequential"]}
"""Rows of similar lengths come together with `data.tokens_per_batch`, not by the Trainer's other strategies."""

_EVALUATE = "mmtune evaluates before and after tuning, not during it; give the evaluate section"
_UPLOAD = "mmtune does not upload; push the finished directory yourself"
_PRECISION = "give model.precision"
_LAUNCH = "the launcher is asked for it: accelerate launch --config_file recipes/accelerate/fsdp2.yaml mmtune/train.py RECIPE"
_DIVIDED = "mmtune decides how batches are divided, so that every layout trains the same"
_COLUMNS = "mmtune's own collator decides what reaches the model"
_TRAIN_OWNED = {
    "output_dir": "give output_dir at the top of the recipe",
    "logging_dir": "logs go into output_dir",
    "resume_from_checkpoint": "give --resume on the command line",
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "local_rank": "the launcher sets it",
    **dict.fromkeys(("average_tokens_across_devices", "accelerator_config"), _DIVIDED),
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
_TRAIN_GONE = {
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
    adapter: TypeAdapter[Any]
    default: Any
    description: str

    def fault(self, value: object) -> str | None:
        """What is wrong with a plain value, or None."""
        try:
            self.adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            own = [e for e in error.errors() if e["type"] == "recipe"]
            hint = own[0]["msg"] if own else f"expected {_describe(self.annotation)}, got {shown(value)}"
            return hint + (_nearest_value(self.annotation, value) if isinstance(value, str) else "")
        except TypeError:
            return f"expected {_describe(self.annotation)}, got {shown(value)}"
        return None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The settings borrowed from one dataclass, by name, and those refused, with the reason."""

    arguments: dict[str, Argument]
    refused: dict[str, str]
    gone: dict[str, str]
    defaults: dict[str, Any]

    def check(self, given: Mapping[str, Any], also_valid: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[Fault]]:
        """The given settings over mmtune's defaults, in the dataclass's order, and a fault for each that is wrong."""
        faults = []
        for name, value in given.items():
            if name in self.refused:
                faults.append(fault(name, f"not a recipe's to set: {self.refused[name]}"))
            elif name not in self.arguments:
                hint = f"; {self.gone[name]}" if name in self.gone else nearest(name, {*self.arguments, *also_valid})
                faults.append(fault(name, f"unknown key{hint}"))
            elif (message := self.arguments[name].fault(value)) is not None:
                faults.append(fault(name, message))
        settings = {**self.defaults, **given}
        return {name: settings[name] for name in self.arguments if name in settings}, faults

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


Fault = InitErrorDetails


def fault(key: str | tuple[str | int, ...], message: str) -> Fault:
    """A pydantic error at a key whose message is already meant for the reader."""
    # The custom error fills {names} in its template from the context alone, so the text goes through the context.
    error = PydanticCustomError("recipe", "{text}", {"text": message})
    return {"type": error, "loc": (key,) if isinstance(key, str) else key, "input": None}


def shown(value: object) -> str:
    """A value as the reader would write it, short."""
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
    # LoraConfig makes its nested configurations from mappings itself.
    return _arguments(method.config_class(), dict(method.refused), {}, method.settings(), _BOUNDS, nested=True)


@functools.cache
def training_arguments() -> Arguments:
    """What `train` may hold: transformers' TrainingArguments, less what mmtune owns."""
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    bounds = {**_TRAIN_BOUNDS, "report_to": _one_or_more("none", "all", *INTEGRATION_TO_CALLBACK)}
    return _arguments(TrainingArguments, _TRAIN_OWNED, _TRAIN_GONE, {"report_to": "none"}, bounds, nested=False)


def _one_or_more(*names: str) -> Any:
    return Literal[names] | list[Literal[names]]  # type: ignore[valid-type]


def _arguments(
    source: Any,
    owned: dict[str, str],
    gone: dict[str, str],
    defaults: dict[str, Any],
    bounds: dict[str, Any],
    nested: bool,
) -> Arguments:
    hints = typing.get_type_hints(source, include_extras=True)
    arguments: dict[str, Argument] = {}
    refused = dict(owned)
    for field in dataclasses.fields(source):
        if not field.init or field.name in owned:
            continue
        annotation = bounds.get(field.name) or _plain_type(hints[field.name], nested)
        if annotation in (None, types.NoneType):
            refused[field.name] = _PYTHON_OBJECT
            continue
        help_text = field.metadata.get("help") or f"See {source.__name__}."
        default = field.default.value if isinstance(field.default, Enum) else field.default
        arguments[field.name] = Argument(annotation, TypeAdapter(annotation), default, " ".join(str(help_text).split()))
    return Arguments(arguments, refused, gone, defaults)


def _plain_type(annotation: Any, nested: bool) -> Any:
    """The part of an annotation that YAML can express, with enumerations as their values; None when nothing is left."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _mapping_of(annotation) if nested else None
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return Literal[tuple(member.value for member in annotation)]
    if origin is Literal:
        # PEFT writes 'pissa_niter_[number of iters]' for a family of names.
        families = [v for v in inner if isinstance(v, str) and "[" in v]
        return _union(Literal[tuple(v for v in inner if v not in families)], *(_family(v) for v in families))
    if origin in (Union, types.UnionType):
        if any(isinstance(a, type) and issubclass(a, Enum) for a in inner):
            # `SchedulerType | str` is converted to the enumeration later; a name outside it is wrong already here.
            inner = tuple(a for a in inner if a is not str)
        kept = [plain for a in inner if (plain := _plain_type(a, nested)) is not None]
        return _union(*kept) if kept else None
    if origin in (list, dict):
        items = tuple(_plain_type(a, nested) for a in inner)
        return None if None in items else origin[items]
    return annotation


def _union(*members: Any) -> Any:
    return functools.reduce(operator.or_, members)


def _mapping_of(config: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config) if field.init]

    def check(value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in names:
                raise PydanticCustomError("recipe", "{text}", {"text": f"unknown key '{name}'{nearest(name, names)}"})
        return value

    properties = {name: {"description": f"See {config.__name__}."} for name in names}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return Annotated[dict[str, Any], AfterValidator(check), WithJsonSchema(schema)]


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    types.NoneType: "null",
    Any: "a value",
}


def _describe(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = [f">= {m.ge}" for m in inner if isinstance(m, Ge)] + [f"> {m.gt}" for m in inner if isinstance(m, Gt)]
        bounds += [f"< {m.lt}" for m in inner if isinstance(m, Lt)]
        return " ".join([_describe(inner[0]), *([" and ".join(bounds)] if bounds else [])])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(a) for a in inner))
    if origin is Literal:
        return ", ".join(shown(v) for v in inner) if len(inner) <= 12 else f"one of {len(inner)} names"
    if origin is list:
        return f"a list ({_describe(inner[0])} each)"
    if origin is tuple:
        return f"a list of {len(inner)}"
    if annotation is dict or origin is dict:
        return "a mapping"
    return _WORDS.get(annotation, str(annotation))


def _nearest_value(annotation: Any, value: str) -> str:
    inner = typing.get_args(annotation)
    members = inner if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    names = [v for a in members if typing.get_origin(a) is Literal for v in typing.get_args(a) if isinstance(v, str)]
    return nearest(value, names) if names else ""


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
