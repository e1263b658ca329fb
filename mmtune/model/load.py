"""Models and processors from where a recipe or a run says they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from mmtune.builtin import tiny
from mmtune.errors import UserError, nearest
from mmtune.model.assemble import assemble
from mmtune.model.chat_template import own_chat_template, resolve_chat_template, use_chat_template
from mmtune.model.checkpoint import load_projector
from mmtune.recipe import ModelSection

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNTRAINED = "builtin:tiny-llava-untrained"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
BUILTIN = {"builtin:tiny-llava": tiny.TRAINED}


def resolve_base(base: str) -> str:
    """A hub id or directory that transformers loads, for a recipe's `model.base`.

    Raises:
        UserError: an unknown built-in name, or a path that looks local and is not there.
    """
    if base.startswith("builtin:"):
        if base not in BUILTIN:
            raise UserError(f"model.base: '{base}' is not built in{nearest(base, {*BUILTIN, UNTRAINED})}")
        return str(BUILTIN[base])
    path = Path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.base: {base} holds no config.json, so it is no model checkpoint")
        return str(path.resolve())
    if not HUB_ID.fullmatch(base):
        raise UserError(f"model.base: no such directory: {base}")
    return base


def load_base(section: ModelSection, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and processor that a recipe starts from, assembled from parts if it says so.

    The processor is loaded and its chat template settled before any weight is read.

    Args:
        section: the recipe's `model` section.
        seed: draws what has no trained weights: a fresh projector, or the whole untrained built-in model.

    Raises:
        UserError: parts that do not fit, a base without a chat template, or a checkpoint that is not there.
    """
    dtype = DTYPES[section.precision]
    if section.base == UNTRAINED:
        return tiny.build_untrained(seed)
    if section.base is None:
        assert section.vision is not None and section.language is not None  # the recipe holds this
        model, processor = assemble(
            section.vision,
            section.language,
            vision_feature_layer=section.vision_feature_layer,
            vision_feature_select_strategy=section.vision_feature_select_strategy,
            chat_template=section.chat_template,
            dtype=dtype,
            seed=seed,
            trust_remote_code=section.trust_remote_code,
        )
        if section.projector is not None and section.projector.weights:
            load_projector(model, Path(section.projector.weights))
        return model, processor
    name = resolve_base(section.base)
    processor, template = load_processor(name, section)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=section.trust_remote_code,
            attn_implementation=section.attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: cannot load {section.base}: {_reason(name, error)}") from error
    use_chat_template(model, processor, template)
    return model, processor


def load_processor(name: str, section: ModelSection) -> tuple[ProcessorMixin, str]:
    """The processor of a ready base, and the chat template that it will train and serve with.

    Raises:
        UserError: no processor, or a chat template that is missing or cannot mark what the assistant says.
    """
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model.base: cannot load a processor from {name}: {_reason(name, error)}") from error
    if section.chat_template is None:
        return processor, own_chat_template(processor)
    return processor, resolve_chat_template(section.chat_template, processor.tokenizer, image_token=processor.image_token)


def load_trained(path: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model to ask: from a run directory, a PEFT adapter directory, or an ordinary checkpoint or hub id.

    Args:
        path: the run, the adapter, or the model.
        dtype: of the weights; None takes the checkpoint's own.

    Returns:
        The model in eval mode, and its processor.
    """
    where = trained_part(path)
    try:
        model = AutoModelForImageTextToText.from_pretrained(str(where), dtype=dtype or "auto")
        processor = AutoProcessor.from_pretrained(str(where))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a model from {path}: {_reason(str(where), error)}") from error
    return model.eval(), processor


def trained_part(path: Path) -> Path:
    """Where a run keeps what it trained: `adapter/` or `model/`; any other path is taken as it is.

    Raises:
        UserError: a directory that holds none of these.
    """
    builtin = BUILTIN.get(str(path))
    if builtin is not None:
        return builtin
    for part in (path / "adapter", path / "model", path):
        if (part / "adapter_config.json").is_file() or (part / "config.json").is_file():
            return part
    if path.is_dir():
        raise UserError(f"{path}: neither a finished run (no adapter/ or model/) nor a model (no config.json)")
    if not HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path}: no such run or model")
    return path


def base_of_adapter(adapter: Path) -> str:
    """The base that an adapter directory names.

    Raises:
        UserError: a directory without a readable `adapter_config.json`.
    """
    file = adapter / "adapter_config.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{file}: not a readable adapter configuration: {error}") from error


def _reason(name: str, error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if Path(name).is_dir() else f"there is no such directory, and as a hub id it cannot be had: {line}"
