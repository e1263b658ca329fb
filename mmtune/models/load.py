"""Loading of models and processors: bases of recipes, trained runs, checkpoints and adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME

from mmtune.builtin import tiny_checkpoint as tiny
from mmtune.chat_templates.resolving import resolve_chat_template, set_chat_template, training_chat_template, use_chat_template
from mmtune.distributed.sharded_parameters import is_sharded
from mmtune.families.family_table import ASSEMBLED_TYPE, family_of_processor
from mmtune.methods.method_table import METHODS, method_of_peft_type
from mmtune.methods.tuners.peft_private import adapter_keys_as_stored
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
from mmtune.models.checkpoints.model_type import check_model_type, local_model_type
from mmtune.models.checkpoints.remote_code import CODE_NOT_ALLOWED, auto_class, first_line, has_remote_code, reject_unsafe_pickles
from mmtune.models.checkpoints.stored_layout import keep_stored_layout
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
from mmtune.models.compute import prepare_computation
from mmtune.models.experts.expert_stacks import find_experts
from mmtune.models.generation import read_generation_config
from mmtune.models.processors.ready_processor import load_completed_processor, prepare_processor
from mmtune.models.quantize import QUANTIZED, describe_unquantized_experts, prepare_quantized, quantization_config
from mmtune.recipe.recipe import ModelSection, load_recipe
from mmtune.utils.errors import UserError, errors_at_key, reason_of
from mmtune.utils.hub import locate_checkpoint
from mmtune.utils.transformers_private import set_weight_conversions, weight_conversions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "nf4": torch.bfloat16}
"""Dtype of unquantized weights by `model.precision`."""


@dataclass(frozen=True)
class ResolvedBase:
    """The base of a recipe, resolved once per run: nothing reads its config or its processor a second time.

    Attributes:
        section: the recipe's `model` section.
        location: the directory or hub id that transformers loads; None for a model that is built here.
        config: its config; None for a model that is built here.
        processor: the processor, with the chat template for training and inference.
    """

    section: ModelSection
    location: str | None
    config: PreTrainedConfig | None
    processor: ProcessorMixin

    @property
    def model_type(self) -> str:
        """The `model_type` of its family."""
        return ASSEMBLED_TYPE if self.config is None else str(self.config.model_type)


def resolve_model(section: ModelSection) -> ResolvedBase:
    """Locate the base of a recipe, and read its config and processor, without loading weights.

    Raises:
        UserError: a base that cannot be located, an unsupported family, no processor, incompatible components, or a chat template
            that is missing or cannot mark assistant text.
    """
    if section.base is None:
        assert section.vision is not None and section.language is not None  # checked by the recipe
        strategy, remote = section.vision_feature_select_strategy, section.trust_remote_code
        processor = assemble_processor(section.vision, section.language, strategy, section.chat_template, remote)
        return ResolvedBase(section, None, None, processor)
    if section.base == UNTRAINED:
        processor = tiny.build_processor()
        template = str(processor.chat_template)
        if section.chat_template is not None:
            template = resolve_chat_template(section.chat_template, processor.tokenizer)
        set_chat_template(processor, template)
        return ResolvedBase(section, None, None, processor)
    location = locate_base(section.base)
    config = base_config(section, location)
    with errors_at_key("model.base"):
        processor, template = _ready_processor(location, section.base, config, section.chat_template, section.trust_remote_code)
    set_chat_template(processor, template, _has_encoder(processor))
    return ResolvedBase(section, location, config, processor)


def load_base(base: ResolvedBase, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load or assemble the model of a base.

    Args:
        seed: the seed of untrained weights: a new projector, or the untrained built-in model.

    Returns:
        The model, and `base.processor`; a model that is built here has a new processor.

    Raises:
        UserError: incompatible components, or weights that cannot be loaded.
    """
    section = base.section
    if base.location is None:
        model, processor = _build_base(section, seed, DTYPES[section.precision])
        set_hub_key_mapping(model)
        if section.attn_implementation is not None:
            model.set_attn_implementation(section.attn_implementation)
        return model, processor
    model = load_weights(base.location, section, base.config)
    use_chat_template(model, base.processor, str(base.processor.chat_template))
    return model, base.processor


def load_weights(name: str, section: ModelSection, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Load the model of a checkpoint in the recipe's precision.

    Args:
        name: a directory or hub id.
        section: the recipe's `model` section.
        config: the checkpoint's config; read from its files by default.

    Raises:
        UserError: files that cannot be read, or missing or mismatched weights.
    """
    with errors_at_key("model.base") if section.base else nullcontext():
        config = config or AutoConfig.from_pretrained(name, trust_remote_code=section.trust_remote_code)
        model = load_strictly(name, section.base or name, config=config, **loading_arguments(config, section))
    if (line := describe_unquantized_experts(find_experts(model).values(), section.precision)) is not None:
        print(line)
    if is_sharded(model):  # transformers then stores all conversions of the class; saving must invert only those that were used
        set_weight_conversions(model, [conversion for conversion in weight_conversions(model) or () if conversion.was_used()])
    return model


def load_strictly(
    name: str,
    subject: str,
    *,
    config: PreTrainedConfig | None = None,
    quiet: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a model with all its weights from a checkpoint, and its generation config without invalid settings.

    transformers would initialize missing weights at random; here they are an error.

    Args:
        name: a directory or hub id.
        subject: the checkpoint's name in messages.
        config: the checkpoint's config; read from its files by default.
        quiet: do not print dropped generation settings.
        trust_remote_code: whether code in the checkpoint may be executed.
        settings: further arguments of `from_pretrained`.

    Raises:
        UserError: files that cannot be read, or missing or mismatched weights.
    """
    model: PreTrainedModel
    with errors_about(subject):
        try:
            config = config or AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            generation_config, dropped = read_generation_config(name, config)
            with reject_unsafe_pickles("its weights"):
                model, report = auto_class(config).from_pretrained(
                    name,
                    config=config,
                    trust_remote_code=trust_remote_code,
                    generation_config=generation_config,
                    **LOADING_INFO,
                    **settings,
                )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load its weights: {_reason(name, error)}") from error
    check_weights_loaded(subject, model, report)
    keep_stored_layout(model, name)
    if dropped and not quiet:
        print(f"{subject}: {dropped}")
    if getattr(model, "is_quantized", False):
        with errors_about(subject):
            prepare_quantized(model)
    prepare_computation(model)
    return model


@contextmanager
def errors_about(subject: str) -> Iterator[None]:
    """Prefix user errors with a base's name as given in the recipe or on the command line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def loading_arguments(config: PreTrainedConfig, section: ModelSection) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a recipe's `model` section: dtype, quantization, attention, device."""
    settings: dict[str, Any] = {
        "dtype": DTYPES[section.precision],
        "trust_remote_code": section.trust_remote_code,
        "attn_implementation": section.attn_implementation,
    }
    if section.precision in QUANTIZED:
        settings["quantization_config"] = quantization_config(config, section.precision, section.trust_remote_code)
        # bitsandbytes quantizes on the final device of the layers.
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        settings["device_map"] = {
            "": torch.device(accelerator.type, torch.accelerator.current_device_index()) if accelerator else torch.device("cpu")
        }
    return settings


def _build_base(section: ModelSection, seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build a base that is not a checkpoint: an assembled model, or the untrained built-in model."""
    if section.base == UNTRAINED:
        untrained, processor = tiny.build_untrained(seed)
        if section.chat_template is not None:
            use_chat_template(untrained, processor, resolve_chat_template(section.chat_template, processor.tokenizer))
        return untrained.to(dtype), processor
    assert section.vision is not None and section.language is not None  # checked by the recipe
    weights = section.projector and section.projector.weights
    if weights:
        weight_files(Path(weights))  # a wrong directory is an error before weights are loaded
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


def base_config(section: ModelSection, location: str | None = None) -> PreTrainedConfig:
    """The config of a ready base.

    Args:
        location: the result of `locate_base`; located here by default.

    Raises:
        UserError: a base that cannot be located, or an unsupported family.
    """
    name = location or locate_base(str(section.base))
    with errors_at_key("model.base"), errors_about(str(section.base)):
        return supported_config(name, str(section.base), section.trust_remote_code)


def supported_config(name: str, subject: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model of a supported family.

    Args:
        name: a directory or hub id, as located.
        subject: the same, as given in the recipe or on the command line.
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: a missing or invalid config, or an unsupported family.
    """
    if (folder := local_folder(subject)) is not None:
        local_model_type(folder, trust_remote_code)  # raises an error for a model type that transformers does not have
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read its config: {_reason(name, error)}") from error
    check_model_type(str(config.model_type), subject)
    return config


def _ready_processor(
    name: str, subject: str, config: PreTrainedConfig, template_name: str | None, trust_remote_code: bool
) -> tuple[ProcessorMixin, str]:
    """The processor of a full model, checked against its config, and its chat template."""
    processor = load_processor(name, subject, config, trust_remote_code)
    template = _choose_chat_template(processor, subject, template_name)
    with errors_about(subject):
        prepare_processor(name, processor, template, config, trust_remote_code)
    return processor, template


def load_processor(name: str, subject: str, config: PreTrainedConfig, trust_remote_code: bool) -> ProcessorMixin:
    """The processor of a model or adapter, with the chat template as stored.

    Args:
        name: a directory or hub id.
        subject: the same in messages.
        config: the config of the model.
        trust_remote_code: whether code in the directory or repository may be executed.

    Raises:
        UserError: files that are missing or cannot be read, or an unsupported processor.
    """
    with errors_about(subject):
        try:
            return load_completed_processor(name, config, trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load its processor: {_reason(name, error)}") from error


def _choose_chat_template(processor: ProcessorMixin, subject: str, template_name: str | None) -> str:
    """The chat template that a recipe names, otherwise the checkpoint's."""
    family = family_of_processor(processor)
    placeholder = None if family.images_first else family.placeholder(processor)
    if template_name is None:
        with errors_about(subject):
            template = training_chat_template(processor, placeholder)
    else:
        template = resolve_chat_template(template_name, processor.tokenizer, image_token=placeholder)
    if "strftime_now" in template:
        print("chat template: it writes the current date (strftime_now), so tokens and lengths of rows depend on the day")
    return template


def _has_encoder(processor: ProcessorMixin) -> bool:
    return family_of_processor(processor).decoder_start(processor) is not None


def load_trained(
    path: Path | TrainedWeights,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin]:
    """Load a model for inference from a run, a checkpoint of a run, a PEFT adapter, or a full checkpoint.

    A run is loaded with the precision and attention of its recipe; its `trust_remote_code` is ignored.

    Args:
        path: the path of the run, checkpoint, adapter or model, a hub id, or the result of `locate_trained_weights`.
        dtype: the dtype of the base's weights, without quantization; None: the precision of the run, or the checkpoint's dtype.
        chat_template: as `model.chat_template` of a recipe; None: the checkpoint's. A run or adapter accepts only the template
            that it was trained with.
        trust_remote_code: whether code in the run, model or base may be executed.

    Returns:
        The model in eval mode on the CPU, and its processor.

    Raises:
        UserError: a path without weights, a damaged file, an adapter that does not match its base, another chat template, or code
            that is not allowed.
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
    is_of_run = trained.run.recipe.is_file()
    section = _model_section(trained, source, trust_remote_code) if is_of_run else None
    with errors_about(f"{subject}: its base {source}" if trained.is_adapter else subject):
        source = locate_checkpoint(source)
        config = supported_config(source, source, trust_remote_code)
    settings: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    if section is not None:
        if chat_template == section.chat_template:
            chat_template = None
        if dtype is not None:  # unquantized
            section = section.model_copy(update={"precision": "fp32"})
        settings = loading_arguments(config, section) | ({"dtype": dtype} if dtype else {})
    template_name = None if is_of_run or trained.is_adapter else chat_template
    try:
        if trained.is_adapter:  # an adapter's processor is not checked against the base, which load_adapter checks
            processor = load_processor(str(trained.path), subject, config, trust_remote_code)
            template = _choose_chat_template(processor, subject, template_name)
        else:
            processor, template = _ready_processor(source, subject, config, template_name, trust_remote_code)
        if template_name != chat_template and template != _choose_chat_template(processor, subject, chat_template):
            raise UserError(f"{subject}: it was trained with another chat template than {chat_template}; omit the chat template")
        set_chat_template(processor, template, _has_encoder(processor))
        if not trained.is_adapter:
            return load_strictly(source, subject, config=config, **settings).eval(), processor
        if not (trained.path / INITIAL_FACTORS).is_file():
            return load_adapter(trained.path, **settings).eval(), processor
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "adapter"
            export_adapter(trained, processor, plain, base=source)
            return load_adapter(plain, **settings).eval(), processor
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load a model from {trained.path}: {_reason(str(trained.path), error)}") from error


def _model_section(trained: TrainedWeights, source: str, trust_remote_code: bool) -> ModelSection:
    """The `model` section of a run's recipe, with `trust_remote_code` of the caller instead of the recipe's.

    Raises:
        UserError: the run was trained with code that is not allowed to be executed.
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
    """Load a PEFT adapter and its base, with every tensor of the adapter.

    Args:
        adapter: the adapter directory.
        settings: arguments of `from_pretrained` for the base.

    Raises:
        UserError: a base that cannot be located, or an adapter that is damaged, incomplete or made for another base.
    """
    # `adapter_method` rejects configurations for which PEFT fails with a traceback or imports further modules.
    config_class = METHODS[adapter_method(adapter)].config_class()
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{adapter}: expected its weights in {ADAPTER_WEIGHTS}; adapter_model.bin is not supported")
    base = locate_adapter_base(adapter)
    # The adapter's generation config has the stop tokens of the training template.
    has_generation_config = (adapter / GENERATION_CONFIG_NAME).is_file()
    model = load_strictly(base, f"{adapter}: its base {base}", quiet=has_generation_config, **settings)
    try:
        config = config_class.from_pretrained(str(adapter))
        expand_patterns(config, model, adapter / ADAPTER_CONFIG)
        with adapter_keys_as_stored():
            tuned = PeftModel.from_pretrained(model, str(adapter), config=config)
        keys = {key for file in weight_files(adapter) for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{adapter}: cannot load the adapter: {reason_of(error)}") from error
    # PEFT loads the tensors that match and only warns about the others.
    expected = set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    unexpected = {key for key in keys - expected if not any(f".{name}." in f".{key}" for name in EMBEDDING_LAYER_NAMES)}
    mismatches = {"missing": expected - keys, "unexpected": unexpected}
    listing = [f"{len(names)} {kind} ({', '.join(sorted(names)[:3])} ...)" for kind, names in mismatches.items() if names]
    if listing:
        raise UserError(f"{adapter}: its tensors do not match its base: {'; '.join(listing)}")
    if has_generation_config:
        tuned.get_base_model().generation_config = GenerationConfig.from_pretrained(str(adapter))
    return tuned


def adapter_method(adapter: Path) -> str:
    """The name of an adapter's method, from its configuration.

    Raises:
        UserError: a missing or invalid configuration, an unsupported method, or a Megatron configuration, with which PEFT imports
            the modules that it names.
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
    return line if Path(name).is_dir() else f"it is not a local directory, and loading it as a hub id fails: {line}"
