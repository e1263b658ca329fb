"""A vision encoder and a language model become one LlavaForConditionalGeneration."""

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

__all__ = ["assemble", "load_projector", "resolve_chat_template", "save_checkpoint"]

IMAGE_TOKEN = "<image>"
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
PROBE_SIZES = ((640, 480), (100, 333), (31, 17), (224, 224))


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
    """Make one vision-language model of two checkpoints.

    The parts' weights are kept as they are. New are the projector and, where the tokenizer has none, the rows of the
    `<image>` and padding tokens (the mean of the other rows; `<image>` is never read, its place is taken by image
    features). The projector is LLaVA-1.5's two-layer MLP (arXiv 2310.03744, section 3.2) with PyTorch's own
    initialization of a linear layer, as in the published code, drawn from `seed`.

    Args:
        vision: directory or hub id of a CLIP, SigLIP, DINOv2 or ViT encoder; a checkpoint that holds a text tower too
            serves.
        language: directory or hub id of a causal language model.
        vision_feature_layer: index into the encoder's hidden states; 0 is the embeddings.
        vision_feature_select_strategy: "default" leaves the class token out, "full" keeps every token. None: "default"
            where there is a class token, else "full".
        chat_template: see `resolve_chat_template`.
        dtype: of all weights.

    Returns:
        The model in eval mode, on the CPU, and its processor. They have been run together: image tokens were counted
        against the features of real forward passes, and the language model's logits on plain text
        compared with its own.

    Raises:
        UserError: when the parts do not fit, with the reason; before weights are loaded where configs tell.
    """
    tower = read_vision_tower(vision, trust_remote_code)
    if not -tower.layers - 1 <= vision_feature_layer <= tower.layers:
        raise UserError(f"vision_feature_layer: {vision_feature_layer} is out of range; {vision} has {tower.layers} layers")
    language = locate_component(language, "language")
    text_config = read_language_config(language, trust_remote_code)
    known_tokens = len(read_tokenizer(language, trust_remote_code))
    processor = assemble_processor(vision, language, vision_feature_select_strategy, chat_template, trust_remote_code)
    tokenizer, template = processor.tokenizer, str(processor.chat_template)

    encoder = _load(AutoModel, vision, tower.config, dtype, seed, trust_remote_code)
    generation_config, left_out = read_generation_config(language, trust_remote_code)
    causal = _load(AutoModelForCausalLM, language, text_config, dtype, seed, trust_remote_code, generation_config)
    if left_out:
        print(f"{language}: {left_out}")
    if unread := find_unread_tensors(causal, language):
        print(describe_unread_tensors(causal, unread, f"left out of {language}"))
    sample = tokenizer("A cat sat on the mat.", return_tensors="pt")["input_ids"]
    with torch.no_grad(), gathered_forward(causal):
        own_logits = causal(sample.to(causal.device)).logits

    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=causal.config,
        image_token_index=processor.image_token_id,
        image_seq_length=processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])["num_image_tokens"][0],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        dtype=dtype,
    )
    model = _compose(config, encoder, causal, dtype, seed)
    _resize(model, tokenizer, known_tokens)
    model.generation_config = causal.generation_config
    use_chat_template(model, processor, template)
    for part in (model.config, model.config.text_config):
        part.pad_token_id, part.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        part.eos_token_id = tokenizer.eos_token_id
    with gathered_forward(model):
        _verify(model, processor, tower, language, sample.to(model.device), own_logits)
    return model, processor


def assemble_processor(
    vision: str,
    language: str,
    vision_feature_select_strategy: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> LlavaProcessor:
    """The processor of the model that `assemble` makes, from configs and the tokenizer alone.

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
    """Add `<image>`, and a padding token where there is none or where it also ends a turn, so that the end is learnt."""
    ends = {tokenizer.eos_token_id, *end_of_turn_ids(tokenizer, template)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_vocab()
        names = [name for name in PAD_NAMES if name in vocabulary and vocabulary[name] not in ends]
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
    """Load a part, and refuse a checkpoint that leaves some of its weights to chance."""
    verbosity = logging.get_verbosity()
    if auto is AutoModel:
        logging.set_verbosity_error()  # the text tower beside a vision tower is left out on purpose; no page about it
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
        raise UserError(f"{checkpoint}: its weights do not load: {str(error).strip().splitlines()[0]}") from error
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
    for mine, theirs in (
        (model.model.vision_tower, encoder),
        (model.model.language_model, decoder),
        (model.lm_head, head),
    ):
        if type(mine) is not type(theirs):
            raise RecipeValueError(
                "model", f"{type(theirs).__name__} has no place in LLaVA, which builds {type(mine).__name__} there"
            )
    if head.bias is not None:
        raise UserError(f"language: {type(causal).__name__}'s output layer has a bias, which LLaVA's has not")
    model.model.vision_tower = encoder
    model.model.multi_modal_projector = projector.to(encoder.device, dtype)  # at ZeRO-3 the parts are where they stay
    model.model.language_model = decoder
    model.lm_head = head
    model.config.vision_config, model.config.text_config = encoder.config, decoder.config
    return model.eval()


def _resize(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, known_tokens: int) -> None:
    """Grow the embeddings for new tokens; rows that a padded checkpoint has spare are used first."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    rows = embeddings.num_embeddings
    if len(tokenizer) > rows:
        padded = rows > known_tokens
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
    own_logits: torch.Tensor,
) -> None:
    name = f"vision: {tower.checkpoint} ({tower.config.model_type})"
    images = [Image.new("RGB", size, "red") for size in PROBE_SIZES] + [Image.new("L", (50, 40))]
    try:
        batch = processor(images=images, text=[IMAGE_TOKEN] * len(images), return_tensors="pt", padding=True)
        features = model.get_image_features(pixel_values=batch["pixel_values"].to(model.device, model.dtype)).pooler_output
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name} and its image processor do not fit: {error}") from error
    sizes = [(image.height, image.width) for image in images]
    predicted = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    for number, image in enumerate(images):
        tokens = int((batch["input_ids"][number] == model.config.image_token_id).sum())
        given = features[number].shape[0]
        if not tokens == given == predicted[number]:
            raise UserError(
                f"{name}: for an image of {image.width} x {image.height} pixels the processor writes {tokens} tokens (it "
                f"predicts {predicted[number]}), and the model makes {given} features"
            )
    one = processor(images=images[0], text=f"{IMAGE_TOKEN} A cat", return_tensors="pt").to(model.device)
    logits = model(**{**one, "pixel_values": one["pixel_values"].to(model.dtype)}).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError(f"{name}: a forward pass with an image gives logits that are not finite")
    difference = (model(sample).logits[..., : own_logits.shape[-1]].float() - own_logits.float()).abs().max().item()
    if difference > 1e-3 * max(1.0, own_logits.abs().max().item()):
        raise UserError(
            f"language: {language} inside LLaVA gives other logits than alone (by {difference:.3g}): it cannot be used"
        )
