"""Compatibility checks for assembly: vision encoder, language model, image processor and tokenizer, from their configs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from mmtune.distributed.sharded_parameters import meta_init
from mmtune.families.image_geometry import PREFIX_TOKENS
from mmtune.models.checkpoints.remote_code import first_line
from mmtune.utils.errors import UserError
from mmtune.utils.hub import locate_checkpoint

INTERPOLATES_POSITIONS = {"dinov2", "dinov2_with_registers", "dinov3_vit"}
"""Vision towers that interpolate position embeddings to any image size by default; others accept only their `image_size`."""


@dataclass(frozen=True)
class VisionTower:
    """The config of a vision tower.

    Attributes:
        checkpoint: the directory or hub id.
        config: the config of the vision encoder, without that of a text tower.
        patch_size: the side of a patch in pixels.
        prefix_tokens: the number of tokens before the patches (class and register tokens).
        layers: the number of hidden layers; `hidden_states` has one more entry.
    """

    checkpoint: str
    config: PreTrainedConfig
    patch_size: int
    prefix_tokens: int
    layers: int


def read_vision_tower(checkpoint: str, trust_remote_code: bool = False) -> VisionTower:
    """Read the config of a vision tower and check that LlavaForConditionalGeneration can use it.

    Raises:
        UserError: an incompatible vision tower.
    """
    checkpoint = locate_component(checkpoint, "vision")
    full_config = _read_config(checkpoint, "vision", trust_remote_code)
    if full_config.model_type in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"vision: {checkpoint} is a NaFlex SigLIP2 model (model_type siglip2), whose input is patches with their shapes; "
            "LlavaForConditionalGeneration does not support this; use a fixed-resolution SigLIP2 checkpoint (model_type siglip)"
        )
    config = full_config.vision_config if full_config.model_type in ("clip", "siglip") else full_config
    if config.model_type not in PREFIX_TOKENS:
        raise UserError(
            f"vision: {checkpoint}: model_type {config.model_type!r} is not supported as a vision tower; supported: "
            f"{', '.join(sorted(PREFIX_TOKENS))}"
        )
    patch = config.patch_size
    if not isinstance(patch, int):
        if len(set(patch)) != 1:
            raise UserError(f"vision: {checkpoint}: patch_size: LlavaProcessor needs square patches, got {patch} pixels")
        patch = patch[0]
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # LLaVA reads a hidden layer, so the pooling head is not used
    prefix_tokens = PREFIX_TOKENS[config.model_type] + (getattr(config, "num_register_tokens", 0) or 0)
    return VisionTower(checkpoint, config, patch, prefix_tokens, config.num_hidden_layers)


def choose_feature_select_strategy(tower: VisionTower, strategy: str | None) -> str:
    """Check `vision_feature_select_strategy`, or choose it if it is None.

    "default" drops the first token, which must be the class token; "full" keeps all tokens.

    Raises:
        UserError: an unknown strategy, or "default" for a vision tower without a class token.
    """
    if strategy is None:
        return "default" if tower.prefix_tokens else "full"
    if strategy not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy: expected 'default' or 'full', got {strategy!r}")
    if strategy == "default" and not tower.prefix_tokens:
        raise UserError(
            f"vision_feature_select_strategy: 'default' drops the class token, but {tower.checkpoint} "
            f"({tower.config.model_type}) has no class token and would lose a patch; use 'full' or omit the key"
        )
    return strategy


def read_language_config(checkpoint: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read the config of a language model and check that LlavaForConditionalGeneration can use it.

    Raises:
        UserError: an incompatible language model.
    """
    config = _read_config(locate_component(checkpoint, "language"), "language", trust_remote_code)
    name = f"language: {checkpoint} (model_type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: expected a decoder-only language model, got an encoder-decoder model")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"{name}: expected a decoder-only language model, got an encoder")
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config"):
        raise UserError(f"{name}: expected a language model, got a vision-language model; set model.base to it instead")
    has_own_code = trust_remote_code and hasattr(config, "auto_map")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not has_own_code:
        raise UserError(f"{name}: it is not a causal language model in transformers")
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap"):
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise UserError(
                f"{name}: its logits use {field} {value}, which LlavaForConditionalGeneration ignores: probabilities would be "
                "wrong; use another language model"
            )
    with meta_init():
        decoder: Any = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    if not hasattr(decoder, "embed_tokens"):
        raise UserError(
            f"{name}: {type(decoder).__name__} has no `embed_tokens` module, which LlavaForConditionalGeneration needs for the "
            "token embeddings (GPT-2 and similar models use another name)"
        )
    return config


def read_image_processor(tower: VisionTower, trust_remote_code: bool = False) -> Any:
    """The image processor of a vision tower, configured for the tower's image size and for LlavaProcessor.

    Changes, if needed: the size is set to the tower's `image_size`, except for towers that interpolate positions (DINOv2), which
    keep their crop; `crop_size` is always set, because `LlavaProcessor._get_num_multimodal_tokens` reads it; images are converted
    to RGB, which ViT's processor does not do.

    Raises:
        UserError: no image processor, a missing library, or unsupported size settings.
    """
    name = f"vision: the image processor of {tower.checkpoint}"
    try:
        processor: Any = AutoImageProcessor.from_pretrained(tower.checkpoint, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise UserError(f"{name} needs a library that is not installed: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot load preprocessor_config.json: {first_line(error)}") from error
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if size is None or not (size["shortest_edge"] or size["height"]):
        raise UserError(f"{name}: size: expected shortest_edge, or height and width, got {size}")
    published = _output_size(processor)
    if tower.config.model_type in INTERPOLATES_POSITIONS and published is not None:
        target = published
    else:
        image = tower.config.image_size
        target = (image, image) if isinstance(image, int) else (image[0], image[1])
    if target != published:
        if size["shortest_edge"]:
            processor.size = (
                {"shortest_edge": min(target)} if target[0] == target[1] else {"height": target[0], "width": target[1]}
            )
            processor.do_center_crop = True
        else:
            processor.size = {"height": target[0], "width": target[1]}
    processor.do_resize = True
    if target != published or not crop:
        processor.crop_size = {"height": target[0], "width": target[1]}
        processor.do_center_crop = bool(processor.do_center_crop)
    processor.do_convert_rgb = True
    return processor


def read_tokenizer(checkpoint: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a language model.

    Raises:
        UserError: no tokenizer, or a slow one: exact labels need token offsets.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            locate_component(checkpoint, "language"), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"language: cannot load the tokenizer of {checkpoint}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(
            f"language: the tokenizer of {checkpoint}: expected a fast tokenizer (tokenizer.json): labels need its token offsets"
        )
    return tokenizer


def _output_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of all processed images, or None if they vary."""
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", False) and crop:
        return crop["height"], crop["width"]
    return (size["height"], size["width"]) if size["height"] and processor.do_resize else None


def _read_config(checkpoint: str, component: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{component}: {checkpoint}: cannot read config.json: {first_line(error)}") from error


def locate_component(checkpoint: str, component: str) -> str:
    """The directory or hub id of a component's checkpoint; the cached copy if the hub cannot be reached.

    Args:
        checkpoint: the directory or hub id as the recipe names it.
        component: vision or language, for messages.

    Raises:
        UserError: it exists neither on this machine nor on the hub, or has no config.json.
    """
    if Path(checkpoint).exists() and not Path(checkpoint, "config.json").is_file():
        raise UserError(
            f"{component}: {checkpoint}: expected a checkpoint directory with config.json or a hub id, found no config.json"
        )
    try:
        return locate_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{component}: {error}") from error
