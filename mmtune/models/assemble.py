"""Assembly of a vision encoder and a language model into one LlavaForConditionalGeneration."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    AddedToken,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from mmtune.chat_templates.resolving import end_of_turn_ids, resolve_chat_template, set_chat_template, use_chat_template
from mmtune.distributed.sharded_parameters import gathered, gathered_forward, meta_init
from mmtune.models.checkpoints.checkpoint_files import LOADING_INFO, check_weights_loaded, load_projector, save_checkpoint
from mmtune.models.checkpoints.remote_code import reject_unsafe_pickles
from mmtune.models.checkpoints.unread_tensors import describe_unread_tensors, find_unread_tensors
from mmtune.models.compatibility import (
    VisionTower,
    choose_feature_select_strategy,
    locate_component,
    read_image_processor,
    read_language_config,
    read_tokenizer,
    read_vision_tower,
)
from mmtune.models.generation import read_generation_config
from mmtune.utils.errors import RecipeValueError, UserError
from mmtune.utils.transformers_private import image_token_counts

__all__ = ["assemble", "load_projector", "resolve_chat_template", "save_checkpoint"]

IMAGE_TOKEN = "<image>"
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
PROBE_SIZES = ((640, 480), (100, 333), (31, 17), (224, 224))

ASSEMBLED_CLASS = LlavaForConditionalGeneration
"""The class of assembled models, and of the built-in one."""


def assemble(
    vision: str,
    language: str,
    *,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Assemble a vision-language model from a vision encoder and a language model, and verify it.

    Weights of both components are unchanged. New weights are the projector and, if the tokenizer lacks these tokens, embedding
    rows for `<image>` and padding (the mean of the other rows; the row of `<image>` is never read, because image features
    replace it). The projector is LLaVA-1.5's two-layer MLP (arXiv 2310.03744, section 3.2) with PyTorch's default
    initialization, as in the published code.

    The check runs real forward passes: the number of image tokens must equal the number of image features, and logits on text
    must equal those of the language model alone.

    Args:
        vision: directory or hub id of a CLIP, SigLIP, DINOv2 or ViT encoder; it may also contain a text tower.
        language: directory or hub id of a causal language model.
        vision_feature_layer: index into the encoder's hidden states; 0 is the embeddings.
        vision_feature_select_strategy: "default" drops the class token, "full" keeps all tokens. None: "default" if the encoder
            has a class token, else "full".
        chat_template: see `resolve_chat_template`.
        dtype: the dtype of all weights.
        seed: the seed of the projector's initialization.
        trust_remote_code: whether code in the checkpoints may be executed.

    Returns:
        The model in eval mode, on the CPU, and its processor.

    Raises:
        UserError: the components are incompatible; raised before weights are loaded if the configs show it.
    """
    tower = read_vision_tower(vision, trust_remote_code)
    if not -tower.layers - 1 <= vision_feature_layer <= tower.layers:
        raise UserError(
            f"vision_feature_layer: expected {-tower.layers - 1} to {tower.layers} ({vision} has {tower.layers} layers), got "
            f"{vision_feature_layer}"
        )
    language = locate_component(language, "language")
    text_config = read_language_config(language, trust_remote_code)
    vocab_size = len(read_tokenizer(language, trust_remote_code))
    processor = assemble_processor(vision, language, vision_feature_select_strategy, chat_template, trust_remote_code)
    tokenizer, template = processor.tokenizer, str(processor.chat_template)

    encoder = _load(AutoModel, vision, tower.config, dtype, seed, trust_remote_code)
    generation_config, dropped = read_generation_config(language, text_config)
    causal = _load(AutoModelForCausalLM, language, text_config, dtype, seed, trust_remote_code, generation_config)
    if dropped:
        print(f"{language}: {dropped}")
    if unread := find_unread_tensors(causal, language):
        print(describe_unread_tensors(causal, unread, f"dropped from {language}"))
    sample = tokenizer("A cat sat on the mat.", return_tensors="pt")["input_ids"]
    with torch.no_grad(), gathered_forward(causal):
        text_logits = causal(sample.to(causal.device)).logits

    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=causal.config,
        image_token_index=processor.image_token_id,
        image_seq_length=image_token_counts(processor, [(1, 1)])[0],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        dtype=dtype,
    )
    model = _compose(config, encoder, causal, dtype, seed)
    _resize_embeddings(model, tokenizer, vocab_size)
    model.generation_config = causal.generation_config
    use_chat_template(model, processor, template)
    for target in (model.config, model.config.text_config):
        target.pad_token_id, target.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        target.eos_token_id = tokenizer.eos_token_id
    with gathered_forward(model):
        _verify(model, processor, tower, language, sample.to(model.device), text_logits)
    return model, processor


def assemble_processor(
    vision: str,
    language: str,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> LlavaProcessor:
    """The processor of an assembled model, created from configs and the tokenizer without weights.

    Raises:
        UserError: as `assemble`.
    """
    tower = read_vision_tower(vision, trust_remote_code)
    strategy = choose_feature_select_strategy(tower, vision_feature_select_strategy)
    text_config = read_language_config(language, trust_remote_code)
    tokenizer = read_tokenizer(language, trust_remote_code)
    template = resolve_chat_template(chat_template, tokenizer, model_type=text_config.model_type, image_token=IMAGE_TOKEN)
    image_processor = read_image_processor(tower, trust_remote_code)
    _add_tokens(tokenizer, template)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=tower.prefix_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )
    set_chat_template(processor, template)
    return processor


def _add_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Add `<image>`, and a padding token if there is none or if it also ends a turn (otherwise the end would not be learned)."""
    end_tokens = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_tokens:
        vocabulary = tokenizer.get_vocab()
        names = [name for name in PAD_NAMES if name in vocabulary and vocabulary[name] not in end_tokens]
        tokenizer.add_special_tokens({"pad_token": names[0] if names else "<pad>"})
    if IMAGE_TOKEN not in tokenizer.all_special_tokens:
        image = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [image]}, replace_extra_special_tokens=False)


def _load(
    auto: Any,
    checkpoint: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    seed: int,
    trust: bool,
    generation_config: GenerationConfig | None = None,
) -> Any:
    """Load a vision encoder or language model; every weight must be in the checkpoint."""
    verbosity = logging.get_verbosity()
    if auto is AutoModel:
        logging.set_verbosity_error()  # no warning about the unused weights of a text tower
    try:
        with torch.random.fork_rng(devices=[]), reject_unsafe_pickles(checkpoint):
            torch.manual_seed(seed)
            model, report = auto.from_pretrained(
                checkpoint,
                config=config,
                dtype=dtype,
                trust_remote_code=trust,
                generation_config=generation_config,
                **LOADING_INFO,
            )
    except OSError as error:
        raise UserError(f"{checkpoint}: cannot load its weights: {str(error).strip().splitlines()[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
    check_weights_loaded(checkpoint, model, report)
    return model.eval()


def _compose(config: LlavaConfig, encoder: Any, causal: Any, dtype: torch.dtype, seed: int) -> LlavaForConditionalGeneration:
    with meta_init():
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    decoder, head = causal.get_decoder(), causal.get_output_embeddings()
    for expected, actual in (
        (model.model.vision_tower, encoder),
        (model.model.language_model, decoder),
        (model.lm_head, head),
    ):
        if type(expected) is not type(actual):
            raise RecipeValueError(
                "model", f"LlavaForConditionalGeneration needs {type(expected).__name__}, got {type(actual).__name__}"
            )
    if head.bias is not None:
        raise UserError(
            f"language: {type(causal).__name__}: its output layer has a bias, which LlavaForConditionalGeneration lacks"
        )
    model.model.vision_tower = encoder
    model.model.multi_modal_projector = projector.to(encoder.device, dtype)  # under ZeRO-3 the encoder is on its device already
    model.model.language_model = decoder
    model.lm_head = head
    model.config.vision_config, model.config.text_config = encoder.config, decoder.config
    return model.eval()


def _resize_embeddings(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Add embedding rows for new tokens; unused rows of a padded checkpoint are used first.

    Args:
        vocab_size: the number of tokens of the original tokenizer.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        padded = rows > vocab_size
        multiple = next((size for size in (128, 64, 32, 16, 8) if rows % size == 0), None) if padded else None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                weight = layer.weight
                with gathered([weight], changed=True):
                    weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)


@torch.no_grad()
def _verify(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    tower: VisionTower,
    language: str,
    sample: torch.Tensor,
    text_logits: torch.Tensor,
) -> None:
    """Compare image tokens with image features, and text logits with `text_logits` of the language model alone.

    Raises:
        UserError: a difference.
    """
    name = f"vision: {tower.checkpoint} ({tower.config.model_type})"
    images = [Image.new("RGB", size, "red") for size in PROBE_SIZES] + [Image.new("L", (50, 40))]
    try:
        batch = processor(images=images, text=[IMAGE_TOKEN] * len(images), return_tensors="pt", padding=True)
        features = model.get_image_features(pixel_values=batch["pixel_values"].to(model.device, model.dtype)).pooler_output
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name}: the model cannot process the output of its image processor: {error}") from error
    sizes = [(image.height, image.width) for image in images]
    predicted = image_token_counts(processor, sizes)
    for number, image in enumerate(images):
        tokens = int((batch["input_ids"][number] == model.config.image_token_id).sum())
        count = features[number].shape[0]
        if not tokens == count == predicted[number]:
            raise UserError(
                f"{name}: for an image of {image.width} x {image.height} pixels the processor writes {tokens} image tokens (it "
                f"predicts {predicted[number]}), and the model gives {count} image features; expected equal numbers"
            )
    inputs = processor(images=images[0], text=f"{IMAGE_TOKEN} A cat", return_tensors="pt").to(model.device)
    logits = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"{name}: expected finite logits of a forward pass with an image, got NaN or infinity")
    difference = (model(sample).logits[..., : text_logits.shape[-1]].float() - text_logits.float()).abs().max().item()
    if (limit := 1e-3 * max(1.0, text_logits.abs().max().item())) < difference:
        raise UserError(
            f"language: {language}: its logits on text inside LlavaForConditionalGeneration differ from those of the model alone "
            f"by {difference:.3g}, limit {limit:.3g}; use another language model"
        )
