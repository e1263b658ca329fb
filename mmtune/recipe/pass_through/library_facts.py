"""Facts about libraries that validate a recipe, stored as data, so that validating a recipe imports no library.

`library_facts.json` holds each fact with the version of the library that it was read from.
`python tests/helpers/write_library_facts.py` writes it. If another version is installed, the fact is read from the imported
library, so that every value which that version accepts is accepted here.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from mmtune.methods.method_table import METHODS
from mmtune.recipe.pass_through.annotations import plain_type
from mmtune.utils.torchvision_support import prepare_torchvision

STORED = Path(__file__).parent / "library_facts.json"


@functools.cache
def library_fact(name: str) -> Any:
    """A fact of `FACTS` about the installed library: plain data, shared by all callers (do not modify it)."""
    library, read = FACTS[name]
    stored = _stored().get(name)
    if stored is not None and stored["version"] == metadata.version(library):
        return stored["value"]
    prepare_torchvision()
    return read()


def is_stored(name: str) -> bool:
    """Whether the fact is stored for the installed version, so that its library is not imported."""
    return name in _stored() and _stored()[name]["version"] == metadata.version(FACTS[name][0])


@functools.cache
def _stored() -> Mapping[str, Any]:
    stored: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return stored


def _training_arguments() -> dict[str, Any]:
    from transformers import TrainingArguments

    return _fields(TrainingArguments, nested=False)


def _peft_configurations() -> dict[str, Any]:
    # LoraConfig builds its nested configurations from mappings.
    fields = {method.config: _fields(method.config_class(), nested=True) for method in METHODS.values()}
    for each in fields.values():
        del each["peft_type"]  # a recipe gives `method` instead
    return fields


def _fields(source: Any, nested: bool) -> dict[str, Any]:
    """The init fields of a dataclass by name: `type` (see `plain_type`), `default` if it is plain data, and `help`."""
    hints = typing.get_type_hints(source, include_extras=True)
    fields = {}
    for field in dataclasses.fields(source):
        if field.init:
            choices = field.metadata.get("choices")
            kind = plain_type(hints[field.name], nested)
            if choices and kind in ("str", {"any_of": ["str", "null"]}):
                kind = {"choices": [*choices, *([] if kind == "str" else [None])]}
            default = field.default.value if isinstance(field.default, Enum) else field.default
            description = field.metadata.get("help") or f"See {source.__name__}."
            fields[field.name] = {"type": kind, "help": " ".join(str(description).split())}
            if default is None or isinstance(default, (bool, int, float, str)):
                fields[field.name]["default"] = default
    return fields


def _reporters() -> list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return list(INTEGRATION_TO_CALLBACK)


def _schedulers() -> dict[str, list[str]]:
    """The keys of `lr_scheduler_kwargs`, by `lr_scheduler_type`."""
    from transformers import optimization

    from_trainer = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
    return {
        kind.value: [name for name in inspect.signature(make).parameters if name not in from_trainer]
        for kind, make in optimization.TYPE_TO_SCHEDULER_FUNCTION.items()
    }


def _optimizer_arguments() -> dict[str, list[str]]:
    """The names that the Trainer reads from `optim_args`, by `optim`: from the source of the functions that create optimizers."""
    from mmtune.utils.transformers_private import makes_bitsandbytes_optimizer, optimizer_handlers

    arguments = {}
    for kind, make in optimizer_handlers().items():
        # One function creates all optimizers of bitsandbytes, and reads arguments for AdEMAMix only.
        reads_none = makes_bitsandbytes_optimizer(make) and "ademamix" not in kind.value
        arguments[kind.value] = [] if reads_none else _names_read(ast.parse(inspect.getsource(make)))
    return arguments


def _names_read(function: ast.AST) -> list[str]:
    """Names in `optim_args.get("NAME")`, `optim_args.pop("NAME")`, `"NAME" in optim_args`, `for key in ("NAME", ...)`."""
    nodes: list[ast.expr] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ctx.optim_args.get", "ctx.optim_args.pop"):
            nodes.append(node.args[0])
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "ctx.optim_args":
            nodes.append(node.left)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            nodes += node.iter.elts
    return sorted({node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)})


def _attention() -> list[str]:
    """Names of `attn_implementation`, without hub kernels and paged attention (which is for serving only)."""
    from mmtune.utils.transformers_private import own_attention_functions

    own = {name for name, function in own_attention_functions().items() if function.__module__.startswith("transformers.")}
    return sorted({"eager", *(name for name in own if "|" not in name)})


def _compile_backends() -> list[str]:
    from accelerate.utils import DynamoBackend

    return [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO]


def _model_types() -> dict[str, str]:
    """The kind of each `model_type` of transformers: image-text, language, vision or other."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    both = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kinds = {}
    for name in sorted(CONFIG_MAPPING):
        if name in both:
            kinds[name] = "image-text"
        elif name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            kinds[name] = "language"
        elif (
            "vision" in name
            or name in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
            or hasattr(CONFIG_MAPPING[name], "patch_size")
        ):
            kinds[name] = "vision"
        else:
            kinds[name] = "other"
    return kinds


FACTS: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "training_arguments": ("transformers", _training_arguments),
    "reporters": ("transformers", _reporters),
    "schedulers": ("transformers", _schedulers),
    "model_types": ("transformers", _model_types),
    "peft_configurations": ("peft", _peft_configurations),
    "optimizer_arguments": ("transformers", _optimizer_arguments),
    "attention": ("transformers", _attention),
    "compile_backends": ("accelerate", _compile_backends),
}
"""By name: the library that a fact is about, and the function that reads it from the library."""
