"""Models and processors from where a recipe or a run says they are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME

from mmtune.builtin import tiny_checkpoint as tiny
from mmtune.chat_templates.resolving import resolve_chat_template, set_chat_template, training_chat_template, use_chat_template
from mmtune.distributed.sharded_parameters import is_sharded
from mmtune.families.family_table import check_family, local_model_type
from mmtune.methods.method_table import METHODS, method_of_peft_type
from mmtune.models.assemble import assemble, assemble_processor
from mmtune.models.checkpoints.adapter_export import export_adapter
from mmtune.models.checkpoints.adapter_patterns import expand_patterns
from mmtune.models.checkpoints.checkpoint_files import (
    ADAPTER_WEIGHTS,
    LOADING_INFO,
    check_weights_loaded,
    load_projector,
    set_hub_key_mapping,
    weight_files,
)
from mmtune.models.checkpoints.locate_base import UNTRAINED, local_folder, locate_base
from mmtune.models.checkpoints.remote_code import CODE_NOT_ALLOWED, first_line, has_remote_code, reject_unsafe_pickles
from mmtune.models.checkpoints.trained_weights import (
    ADAPTER_CONFIG,
    INITIAL_FACTORS,
    TrainedWeights,
    locate_adapter_base,
    locate_trained_weights,
    read_adapter_base,
    read_adapter_config,
    report_removed_checkpoint,
)
from mmtune.models.generation import read_generation_config
from mmtune.models.processors.ready_processor import load_completed_processor, prepare_processor
from mmtune.models.quantize import QUANTIZED, prepare_quantized, quantization_config
from mmtune.recipe.recipe import ModelSection, load_recipe
from mmtune.utils.errors import UserError, errors_at_key, reason_of
from mmtune.utils.hub import locate_checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "nf4": torch.bfloat16}
"""Dtype of the weights by `model.precision`; of those that are not quantized."""


def load_base(
    section: ModelSection, seed: int, processor: ProcessorMixin | None = None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model and processor that a recipe starts from, assembled from parts if it says so.

    The processor is loaded and its chat template is chosen before any weight is read.

    Args:
        section: the recipe's `model` section.
        seed: draws what has no trained weights: a fresh projector, or the whole untrained built-in model.
        processor: from `load_bare_processor`, so that a ready base's is not loaded again; a model that is assembled here
            makes its own.

    Raises:
        UserError: parts that do not fit, a base without a chat template, or a checkpoint that is not there.
    """
    dtype = DTYPES[section.precision]
    if section.base in (None, UNTRAINED):
        model, processor = _made_here(section, seed, dtype)
        set_hub_key_mapping(model)
        if section.attn_implementation is not None:
            model.set_attn_implementation(section.attn_implementation)
        return model, processor
    if processor is None:
        processor = load_bare_processor(section)
    model = load_weights(locate_base(str(section.base)), section)
    use_chat_template(model, processor, str(processor.chat_template))
    return model, processor


def load_weights(name: str, section: ModelSection) -> PreTrainedModel:
    """A checkpoint's model in the recipe's precision.

    Args:
        name: a directory or hub id.

    Raises:
        UserError: when it does not load, or lacks weights, which transformers would draw at random.
    """
    with errors_at_key("model.base") if section.base else nullcontext():
        model = load_strictly(name, section.base or name, **loading(name, section))
    if is_sharded(model):  # transformers then notes all renamings of the class, and would undo those that it has not done
        model._weight_conversions = [each for each in model._weight_conversions if each.was_used()]
    return model


def load_strictly(
    name: str, subject: str, *, quiet: bool = False, trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """A checkpoint's model with every weight from its files, and its own generation config, made valid.

    Args:
        name: a directory or hub id.
        subject: what messages call it.
        quiet: do not print which generation settings were left out, where that was said or another config takes their place.
        trust_remote_code: whether code that comes with the checkpoint may run.
        settings: for `from_pretrained`.

    Raises:
        UserError: files that cannot be read, or weights that are missing, which transformers would draw at random, or are of
            another shape.
    """
    model: PreTrainedModel
    with _named(subject):
        try:
            generation_config, left_out = read_generation_config(name, trust_remote_code)
            with reject_unsafe_pickles("its weights"):
                model, report = AutoModelForImageTextToText.from_pretrained(
                    name, trust_remote_code=trust_remote_code, generation_config=generation_config, **LOADING_INFO, **settings
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"its weights do not load: {_reason(name, error)}") from error
    check_weights_loaded(subject, model, report)
    if left_out and not quiet:
        print(f"{subject}: {left_out}")
    if getattr(model, "is_quantized", False):
        prepare_quantized(model)
    return model


@contextmanager
def _named(subject: str) -> Iterator[None]:
    """Put what a reader calls a base before the errors about it: the recipe's key, or the path of a command."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def loading(name: str, section: ModelSection) -> dict[str, Any]:
    """What `from_pretrained` takes to load a checkpoint as the recipe says."""
    settings: dict[str, Any] = {
        "dtype": DTYPES[section.precision],
        "trust_remote_code": section.trust_remote_code,
        "attn_implementation": section.attn_implementation,
    }
    if section.precision in QUANTIZED:
        settings["quantization_config"] = quantization_config(name, section.precision, section.trust_remote_code)
        # bitsandbytes quantizes where the layers will stay.
        here = torch.accelerator.current_accelerator(check_available=True)
        settings["device_map"] = {
            "": torch.device(here.type, torch.accelerator.current_device_index()) if here else torch.device("cpu")
        }
    return settings


def _made_here(section: ModelSection, seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model that is no checkpoint yet: assembled from parts, or the untrained built-in one."""
    if section.base == UNTRAINED:
        untrained, processor = tiny.build_untrained(seed)
        if section.chat_template is not None:
            use_chat_template(untrained, processor, resolve_chat_template(section.chat_template, processor.tokenizer))
        return untrained.to(dtype), processor
    assert section.vision is not None and section.language is not None  # the recipe holds this
    weights = section.projector and section.projector.weights
    if weights:
        weight_files(Path(weights))  # an error for a wrong directory, before the parts are loaded
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
    if weights:
        load_projector(model, Path(weights))
    return model, processor


def base_model_type(section: ModelSection) -> str:
    """`model_type` of what will be tuned, from its configuration alone.

    Raises:
        UserError: when the base cannot be found.
    """
    return "llava" if section.base in (None, UNTRAINED) else str(base_config(section).model_type)


def base_config(section: ModelSection) -> PreTrainedConfig:
    """The configuration of a ready base.

    Raises:
        UserError: when it cannot be found, or is of a family that is not supported.
    """
    name = locate_base(str(section.base))
    with errors_at_key("model.base"), _named(str(section.base)):
        return _supported_config(name, str(section.base), section.trust_remote_code)


def _supported_config(name: str, written: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration of a model of a supported family.

    Args:
        name: a directory or hub id.
        written: the same, as the reader wrote it.

    Raises:
        UserError: no readable configuration, or another family.
    """
    if (folder := local_folder(written)) is not None:
        local_model_type(folder)  # an error for one that transformers does not have
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"its configuration cannot be read: {_reason(name, error)}") from error
    check_family(str(config.model_type), written)
    return config


def load_processor(name: str, section: ModelSection) -> tuple[ProcessorMixin, str]:
    """The processor of a ready base, and the chat template that it will train and serve with.

    Raises:
        UserError: a base of a family that is not supported, no processor, or a chat template that is missing or cannot mark what
            the assistant says.
    """
    config = base_config(section)
    with errors_at_key("model.base"):
        return _ready_processor(name, str(section.base), config, section.chat_template, section.trust_remote_code)


def _ready_processor(
    name: str, subject: str, config: PreTrainedConfig, named: str | None, trust_remote_code: bool
) -> tuple[ProcessorMixin, str]:
    """The processor of a ready model, compared with its configuration, and its chat template."""
    processor = _open(name, subject, config, trust_remote_code)
    template = _chat_template(processor, subject, named)
    with _named(subject):
        prepare_processor(name, processor, template, config, trust_remote_code)
    return processor, template


def _open(name: str, subject: str, config: PreTrainedConfig, trust_remote_code: bool) -> ProcessorMixin:
    with _named(subject):
        try:
            return load_completed_processor(name, config, trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"its processor does not load: {_reason(name, error)}") from error


def _chat_template(processor: ProcessorMixin, subject: str, named: str | None) -> str:
    """The template that a recipe names, or else the checkpoint's own."""
    if named is None:
        with _named(subject):
            template = training_chat_template(processor)
    else:
        template = resolve_chat_template(named, processor.tokenizer, image_token=processor.image_token)
    if "strftime_now" in template:
        print("chat template: it writes the current date (strftime_now), so tokens and lengths of rows depend on the day")
    return template


def load_bare_processor(section: ModelSection) -> ProcessorMixin:
    """The processor that a recipe's model trains with, with its chat template; no weight is read.

    Raises:
        UserError: as `load_base`, where configs and the tokenizer tell.
    """
    if section.base is None:
        assert section.vision is not None and section.language is not None  # the recipe holds this
        strategy = section.vision_feature_select_strategy
        return assemble_processor(section.vision, section.language, strategy, section.chat_template, section.trust_remote_code)
    processor: ProcessorMixin
    if section.base == UNTRAINED:
        processor = tiny.build_processor()
        template = str(processor.chat_template)
        if section.chat_template is not None:
            template = resolve_chat_template(section.chat_template, processor.tokenizer)
    else:
        processor, template = load_processor(locate_base(section.base), section)
    set_chat_template(processor, template)
    return processor


def load_trained(
    path: Path | TrainedWeights,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """A model to ask: from a run, one of its checkpoints, a PEFT adapter directory, or an ordinary checkpoint or hub id.

    A run is loaded as its recipe says: precision and attention. Whether code that it brings may run is not the run's to say.

    Args:
        path: the run, the checkpoint, the adapter, or the model; or what `locate_trained_weights` has found there.
        dtype: of the base's weights, unquantized; None takes the run's precision, or else the checkpoint's own.
        chat_template: as a recipe's `model.chat_template`; None takes the checkpoint's own, which of a run is the one that it was
            trained with; another one is an error.
        trust_remote_code: whether code that comes with the run, the model or the base may run.

    Returns:
        The model in eval mode on the CPU, and its processor.

    Raises:
        UserError: nothing there, a damaged file, an adapter that does not fit its base, or code that may not run.
        CheckFailed: a damaged checkpoint.
    """
    trained = path if isinstance(path, TrainedWeights) else locate_trained_weights(path)
    subject = str(trained.path if isinstance(path, TrainedWeights) or trained.run.recipe.is_file() else path)
    with report_removed_checkpoint(trained):
        return _load_trained(trained, subject, dtype, chat_template, trust_remote_code)


def _load_trained(
    trained: TrainedWeights, subject: str, dtype: torch.dtype | None, chat_template: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    source = read_adapter_base(trained.path) if trained.is_adapter else str(trained.path)
    settings: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    of_run = trained.run.recipe.is_file()
    if of_run:
        section = _model_section(trained, source, trust_remote_code)
        if chat_template == section.chat_template:
            chat_template = None
        if dtype is not None:  # unquantized
            section = section.model_copy(update={"precision": "fp32"})
        settings = loading(source, section) | ({"dtype": dtype} if dtype else {})
    with _named(f"{subject}: its base {source}" if trained.is_adapter else subject):
        source = locate_checkpoint(source)
        config = _supported_config(source, source, trust_remote_code)
    own = None if of_run or trained.is_adapter else chat_template
    try:
        if trained.is_adapter:  # its processor was saved as it was trained with, and its base may turn out to be another one
            processor = _open(str(trained.path), subject, config, trust_remote_code)
            template = _chat_template(processor, subject, own)
        else:
            processor, template = _ready_processor(source, subject, config, own, trust_remote_code)
        if own != chat_template and template != resolve_chat_template(
            str(chat_template), processor.tokenizer, image_token=processor.image_token
        ):
            raise UserError(f"{subject}: it was trained with another chat template than {chat_template}; omit the chat template")
        set_chat_template(processor, template)
        if not trained.is_adapter:
            return load_strictly(source, subject, **settings).eval(), processor
        if not (trained.path / INITIAL_FACTORS).is_file():
            return load_adapter(trained.path, **settings).eval(), processor
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "adapter"
            export_adapter(trained, processor, plain, base=source)
            return load_adapter(plain, **settings).eval(), processor
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {trained.path}: {_reason(str(trained.path), error)}") from error


def _model_section(trained: TrainedWeights, source: str, trust_remote_code: bool) -> ModelSection:
    """The `model` section of a run's recipe, with the permission of whoever loads the run in place of the run's own.

    Raises:
        UserError: it was trained with code that is not allowed to run.
    """
    section = load_recipe(trained.run.recipe).model
    if not trust_remote_code:
        folder = local_folder(source)
        kernel = section.attn_implementation is not None and "/" in section.attn_implementation
        if kernel or (section.trust_remote_code and (folder is None or has_remote_code(folder))):
            code = f"the attention kernel {section.attn_implementation}" if kernel else source
            raise UserError(
                f"{trained.run.path}: the run was trained with code of {code}, which is executed only with --trust-remote-code"
            )
    return section.model_copy(update={"trust_remote_code": trust_remote_code})


def load_adapter(adapter: Path, **settings: Any) -> PeftModel:
    """A PEFT adapter on its base, every tensor of it.

    Args:
        adapter: its directory.
        settings: for the base's `from_pretrained`.

    Raises:
        UserError: a base that is not there, or an adapter that is damaged, incomplete or made for another base.
    """
    # An error here, where PEFT would end with a traceback or load more than the adapter and its base.
    config_class = METHODS[adapter_method(adapter)].config_class()
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{adapter}: expected its weights in {ADAPTER_WEIGHTS}; adapter_model.bin is not read")
    base = locate_adapter_base(adapter)
    own = (adapter / GENERATION_CONFIG_NAME).is_file()  # the base's lacks the stop tokens of the training template
    model = load_strictly(base, f"{adapter}: its base {base}", quiet=own, **settings)
    try:
        config = config_class.from_pretrained(str(adapter))
        expand_patterns(config, model, adapter / ADAPTER_CONFIG)
        tuned = PeftModel.from_pretrained(model, str(adapter), config=config)
        keys = {key for file in weight_files(adapter) for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{adapter}: cannot load the adapter: {reason_of(error)}") from error
    # PEFT loads the tensors that match and only warns about the others.
    expected = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    mismatches = {"missing": expected - keys, "unexpected": {key for key in keys - expected if not _is_embedding(key)}}
    listing = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])} ...)" for kind, names in mismatches.items() if names]
    if listing:
        raise UserError(f"{adapter}: its tensors do not match its base: {'; '.join(listing)}")
    if own:
        tuned.get_base_model().generation_config = GenerationConfig.from_pretrained(str(adapter))
    return tuned


def _is_embedding(key: str) -> bool:
    return any(f".{name}." in f".{key}" for name in EMBEDDING_LAYER_NAMES)


def adapter_method(adapter: Path) -> str:
    """A recipe's name of the method that an adapter directory names.

    Raises:
        UserError: no readable configuration, a method that mmtune does not know, or one that has PEFT import what it names.
    """
    config = read_adapter_config(adapter)
    peft_type = config.get("peft_type")
    method = method_of_peft_type(peft_type)
    if method is None:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: peft_type: expected one of the methods {', '.join(METHODS)}, got {peft_type!r}"
        )
    if config.get("megatron_config") is not None:
        raise UserError(f"{adapter / ADAPTER_CONFIG}: megatron_config: Megatron models are not supported, expected null")
    return method.name


def _reason(name: str, error: Exception) -> str:
    line = first_line(error)
    if line == CODE_NOT_ALLOWED:
        return line
    return line if Path(name).is_dir() else f"there is no such directory, and it does not load as a hub id: {line}"
