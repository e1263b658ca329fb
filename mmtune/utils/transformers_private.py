"""Private members of transformers, outside of its Trainer, that mmtune uses: one function or name for each.

No other module touches a private member of transformers; those of the Trainer are in `mmtune.training.trainer_private`. A test
compares each with the installed version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from transformers.utils.chat_template_utils import (
    _CONTROL_TOKEN_END,
    _CONTROL_TOKEN_START,
    _compile_jinja_template,
    _plain_template_data,
)

if TYPE_CHECKING:  # a module that reads chat templates must not import torch
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from transformers.core_model_loading import WeightTransform

ESCAPE_START, ESCAPE_END = _CONTROL_TOKEN_START, _CONTROL_TOKEN_END
"""Characters around a control token that a text spells, with `sanitize_control_tokens`."""


def control_tokens_of(tokenizer: PreTrainedTokenizerBase, template: str) -> Sequence[str]:
    """The tokens that `sanitize_control_tokens` escapes: special tokens, and added tokens that are in the chat template."""
    tokens: Sequence[str] = tokenizer._get_control_tokens(template)
    return tokens


def encode_without_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text in which spellings of added tokens are ordinary text."""
    ids: list[int] = tokenizer._encode_without_added_tokens(text)
    return ids


def template_environment() -> Environment:
    """The Jinja environment in which transformers compiles chat templates."""
    environment: Environment = _compile_jinja_template("").environment
    return environment


def plain_template_data(value: Any) -> Any:
    """Template variables with plain strings, lists and dictionaries in place of their subclasses."""
    return _plain_template_data(value)


def processor_call_kwargs(processor: ProcessorMixin) -> dict[str, dict[str, Any]]:
    """The keyword arguments that a processor passes on when it is called with none: `text_kwargs`, `images_kwargs`, ..."""
    kwargs: dict[str, dict[str, Any]] = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
    return kwargs


def image_token_counts(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that a processor writes for images of these sizes, (height, width) in pixels."""
    counts: list[int] = processor._get_num_multimodal_tokens(image_sizes=list(sizes))["num_image_tokens"]
    return counts


def layer_class_names(model: PreTrainedModel) -> set[str]:
    """Names of the classes that must stay on one device: the model's layers."""
    return set(model._no_split_modules or ())


def tied_weight_names(model: PreTrainedModel) -> set[str]:
    """Names of weights that are saved once because another one is tied to them."""
    return set(model._tied_weights_keys or ())


def weight_conversions(model: PreTrainedModel) -> Sequence[WeightTransform] | None:
    """The renamings that transformers recorded when it loaded the model, and undoes when it saves it; None if built in memory."""
    conversions: Sequence[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return conversions


def set_weight_conversions(model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
    """Replace what `weight_conversions` returns."""
    model._weight_conversions = list(conversions)


def sample_tokens(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The loop of `generate`, which may begin with a cache of all tokens but the last; the form of `custom_generate`."""
    tokens: torch.Tensor = model._sample(input_ids, **inputs)
    return tokens


def inputs_of_next_tokens(model: PreTrainedModel, outputs: Any, inputs: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The inputs of `generate`'s loop after a forward pass: cache, masks and positions for this many more tokens."""
    following: dict[str, Any] = model._update_model_kwargs_for_generation(
        outputs, dict(inputs), is_encoder_decoder=False, num_new_tokens=tokens
    )
    return following


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation of a config; None until a model is built from it."""
    name: str | None = config._attn_implementation
    return name


def own_attention_functions() -> Mapping[str, Callable[..., Any]]:
    """The attention functions that transformers registers, by the name for `attn_implementation`."""
    from transformers import AttentionInterface

    functions: Mapping[str, Callable[..., Any]] = AttentionInterface._global_mapping
    return functions


def optimizer_handlers() -> Mapping[Any, Callable[..., Any]]:
    """The functions that make the Trainer's optimizers, by `OptimizerNames`."""
    from transformers import trainer_optimizer

    handlers: Mapping[Any, Callable[..., Any]] = trainer_optimizer._OPTIMIZER_HANDLERS
    return handlers


def makes_bitsandbytes_optimizer(handler: Callable[..., Any]) -> bool:
    """Whether a function of `optimizer_handlers` is the one for all bitsandbytes optimizers."""
    from transformers import trainer_optimizer

    return handler is trainer_optimizer._get_bitsandbytes_optimizer


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `AutoModelForImageTextToText` builds from a config; None for one that only code in a checkpoint has."""
    from transformers import AutoModelForImageTextToText

    mapping: Any = AutoModelForImageTextToText._model_mapping
    return mapping.get(type(config), None)


def without_zero3_init() -> AbstractContextManager[None]:
    """Inside, models are built in full at ZeRO-3 too."""
    from transformers.modeling_utils import set_zero3_state

    context: AbstractContextManager[None] = set_zero3_state()
    return context
