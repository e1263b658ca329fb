"""What must be true of a vision encoder and a language model before they become one LLaVA, read from configs alone."""

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
from mmtune.models.checkpoints.remote_code import first_line
from mmtune.utils.errors import UserError
from mmtune.utils.hub import locate_checkpoint

PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "vit": 1,
}
"""Tokens that a tower puts before its patches, registers not counted: the class token, or none."""

INTERPOLATES_POSITIONS = {"dinov2", "dinov2_with_registers", "dinov3_vit"}
"""Towers whose plain forward fits its positions to any image size; the others take their own `image_size` only."""


@dataclass(frozen=True)
class VisionTower:
    """A vision encoder, from its config.

    Attributes:
        checkpoint: where it comes from.
        config: the encoder's own config, also where the checkpoint holds a text tower beside it.
        patch_size: pixels along the side of a patch.
        prefix_tokens: tokens before the patches (class token and registers).
        layers: its hidden layers; `hidden_states` has one more entry.
    """

    checkpoint: str
    config: PreTrainedConfig
    patch_size: int
    prefix_tokens: int
    layers: int


def read_vision_tower(checkpoint: str, trust_remote_code: bool = False) -> VisionTower:
    """Read a vision encoder's config and refuse what LLaVA cannot carry.

    Raises:
        UserError: with the reason.
    """
    checkpoint = locate_component(checkpoint, "vision")
    whole = _read_config(checkpoint, "vision", trust_remote_code)
    if whole.model_type in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"vision: {checkpoint} is a NaFlex SigLIP2 (model_type siglip2): it takes pre-cut patches with their shapes, which "
            "LlavaForConditionalGeneration does not pass on; take a fixed-resolution SigLIP2 checkpoint (model_type siglip)"
        )
    config = whole.vision_config if whole.model_type in ("clip", "siglip") else whole
    if config.model_type not in PREFIX_TOKENS:
        raise UserError(
            f"vision: {checkpoint} has model_type {config.model_type!r}, whose hidden states are not known to be a sequence of "
            f"patches, which LLaVA's projector reads; these are: {', '.join(sorted(PREFIX_TOKENS))}"
        )
    patch = config.patch_size
    if not isinstance(patch, int):
        if len(set(patch)) != 1:
            raise UserError(f"vision: {checkpoint} has patches of {patch} pixels, and LlavaProcessor counts square ones only")
        patch = patch[0]
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # LLaVA reads a hidden layer; the pooling head would be dead weight
    extra = PREFIX_TOKENS[config.model_type] + (getattr(config, "num_register_tokens", 0) or 0)
    return VisionTower(checkpoint, config, patch, extra, config.num_hidden_layers)


def choose_feature_select_strategy(tower: VisionTower, asked: str | None) -> str:
    """`vision_feature_select_strategy`: "default" drops the first token, which must be the class token; "full" keeps all.

    Raises:
        UserError: for an unknown one, and for "default" on a tower without a class token.
    """
    if asked is None:
        return "default" if tower.prefix_tokens else "full"
    if asked not in ("default", "full"):
        raise UserError(f"vision_feature_select_strategy: {asked!r} is neither 'default' nor 'full'")
    if asked == "default" and not tower.prefix_tokens:
        raise UserError(
            f"vision_feature_select_strategy: 'default' drops the first token, and {tower.checkpoint} "
            f"({tower.config.model_type}) has no class token there: a real patch would be lost; say 'full' or leave it out"
        )
    return asked


def read_language_config(checkpoint: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a language model's config and refuse what LLaVA cannot carry.

    Raises:
        UserError: with the reason.
    """
    config = _read_config(locate_component(checkpoint, "language"), "language", trust_remote_code)
    kind = f"language: {checkpoint} (model_type {config.model_type!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder-decoder model; LLaVA needs a decoder that continues text")
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"{kind} is an encoder; LLaVA needs a decoder that continues text")
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "vision_config"):
        raise UserError(f"{kind} already is a vision-language model; give it as model.base")
    remote = trust_remote_code and hasattr(config, "auto_map")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise UserError(f"{kind} is not a causal language model that transformers knows")
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap"):
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise UserError(
                f"{kind} computes its logits with {field} {value}, which LlavaForConditionalGeneration's head leaves out: the "
                "probabilities would not be the language model's own"
            )
    with meta_init():
        decoder: Any = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    if not hasattr(decoder, "embed_tokens"):
        raise UserError(
            f"{kind}: {type(decoder).__name__} has no embed_tokens module, where LlavaForConditionalGeneration looks for the "
            "token embeddings (GPT-2 and its relatives name them otherwise)"
        )
    return config


def read_image_processor(tower: VisionTower, trust_remote_code: bool = False) -> Any:
    """The tower's image processor, set so that its output is what the tower takes and LlavaProcessor can count it.

    Changes, where needed: the size becomes the tower's (unless the tower fits its positions to any size, as DINOv2
    does: then the published crop stays); `crop_size` is stated also where nothing is cropped, because
    `LlavaProcessor._get_num_multimodal_tokens` reads it; images are converted to RGB, which ViT's processor leaves to
    the caller.

    Raises:
        UserError: when there is none, when it needs torchvision and that is missing, or when its size settings are
            unknown.
    """
    name = f"vision: the image processor of {tower.checkpoint}"
    try:
        processor: Any = AutoImageProcessor.from_pretrained(tower.checkpoint, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise UserError(f"{name} needs a package that is missing here: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{name} does not load from preprocessor_config.json: {first_line(error)}") from error
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if size is None or not (size["shortest_edge"] or size["height"]):
        raise UserError(f"{name} resizes by {size}; only a shortest edge, or height and width, gives a known number of patches")
    published = _output_size(processor)
    if tower.config.model_type in INTERPOLATES_POSITIONS and published is not None:
        wanted = published
    else:
        image = tower.config.image_size
        wanted = (image, image) if isinstance(image, int) else (image[0], image[1])
    if wanted != published:
        if size["shortest_edge"]:
            processor.size = (
                {"shortest_edge": min(wanted)} if wanted[0] == wanted[1] else {"height": wanted[0], "width": wanted[1]}
            )
            processor.do_center_crop = True
        else:
            processor.size = {"height": wanted[0], "width": wanted[1]}
    processor.do_resize = True
    if wanted != published or not crop:
        processor.crop_size = {"height": wanted[0], "width": wanted[1]}
        processor.do_center_crop = bool(processor.do_center_crop)
    processor.do_convert_rgb = True
    return processor


def read_tokenizer(checkpoint: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The language model's tokenizer.

    Raises:
        UserError: when there is none, or none that keeps offsets, which exact labels need.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            locate_component(checkpoint, "language"), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"language: the tokenizer of {checkpoint} does not load: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"language: the tokenizer of {checkpoint} has no tokenizer.json; exact labels need its offsets")
    return tokenizer


def _output_size(processor: Any) -> tuple[int, int] | None:
    """Height and width that the processor gives every image, or None when they vary."""
    size, crop = processor.size, getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", False) and crop:
        return crop["height"], crop["width"]
    return (size["height"], size["width"]) if size["height"] and processor.do_resize else None


def _read_config(checkpoint: str, part: str, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{part}: {checkpoint}: its config.json cannot be read: {first_line(error)}") from error


def locate_component(checkpoint: str, part: str) -> str:
    """The directory or hub id of a part; of a hub that cannot be reached, the cached copy.

    Raises:
        UserError: it is neither here nor on the hub, or holds no configuration.
    """
    if Path(checkpoint).exists() and not Path(checkpoint, "config.json").is_file():
        raise UserError(f"{part}: {checkpoint} is here but holds no config.json; give a checkpoint directory or a hub id")
    try:
        return locate_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{part}: {error}") from error
