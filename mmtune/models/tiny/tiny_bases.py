"""Tiny bases: small random vision-language checkpoints of every supported family, with the files of its releases.

Each has the processor class and files of its family, the key names of the family's hub checkpoints, a generation config like the
published one, and a chat template that renders the same text. Tests run over all of them, and `mmtune train --rehearse` uses the
one that replaces the recipe's base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedTokenizerFast, ProcessorMixin

from mmtune.models.tiny.tiny_models import DECODER, IMAGE, PATCH, TOWER, byte_level_tokenizer
from mmtune.models.tiny.tiny_templates import REQUIRED_TEMPLATES, TEMPLATES
from mmtune.utils.transformers_private import tied_weight_names

TEXTS = ["\n\n\n    the cat is on the mat, what is it?\n\n yes no a photo of two dogs and a bird."] * 20
"""Training texts of the tokenizers."""
MERGES = 60

# ---- settings shared by several families

TEXT: dict[str, Any] = {
    **DECODER,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {**TOWER, "hidden_size": 64, "intermediate_size": 128, "image_size": IMAGE, "patch_size": PATCH}
MROPE_PARAMETERS = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
_QWEN_VISION_CONFIG = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SENTENCEPIECE: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}


def tiny_tokenizer(specials: tuple[str, ...], named: dict[str, str] | None = None, **names: Any) -> PreTrainedTokenizerFast:
    others = [token for token in specials if token not in names.values()]
    settings = {"specials": list(dict.fromkeys([*specials, *(named or {}).values()])), "named": named or others, **names}
    return byte_level_tokenizer(settings, TEXTS, merges=MERGES)


def text_sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Text config fields that depend on the tokenizer; the vocabulary size is padded, as in most releases."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**TEXT, "vocab_size": -(-len(tokenizer) // 64) * 64, **ids}


def token_id(processor: Any, token: str) -> int:
    return int(processor.tokenizer.convert_tokens_to_ids(token))


def _llava_processor(kind: Any, images: Any, specials: tuple[str, ...], **settings: Any) -> ProcessorMixin:
    processor: ProcessorMixin = kind(
        images,
        tiny_tokenizer(
            ("<unk>", "<s>", "</s>", *specials, "<pad>", "<image>"), {"image_token": "<image>"}, pad="<pad>", **SENTENCEPIECE
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **settings,
    )
    return processor


def _llava_config(processor: Any, text: str, model_type: str = "llava", **settings: Any) -> PreTrainedConfig:
    defaults = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": (IMAGE // PATCH) ** 2,
    }
    defaults["vision_config"] = {"model_type": "clip_vision_model", **VISION, "projection_dim": 32}
    return AutoConfig.for_model(
        model_type,
        text_config={"model_type": text, **text_sizes(processor.tokenizer)},
        image_token_index=token_id(processor, "<image>"),
        tie_word_embeddings=False,
        **(defaults | settings),
    )


def square_sizes() -> dict[str, Any]:
    return {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}}


# ---- two functions per family: the processor, and the config for that processor


def _llava(**_: Any) -> ProcessorMixin:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return _llava_processor(LlavaProcessor, CLIPImageProcessor(**square_sizes()), ())


def _llava_next() -> ProcessorMixin:
    from transformers import LlavaNextImageProcessor, LlavaNextProcessor

    tiles = [[IMAGE * h, IMAGE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    images = LlavaNextImageProcessor(**square_sizes(), image_grid_pinpoints=tiles)
    return _llava_processor(LlavaNextProcessor, images, ("[INST]", "[/INST]"))


def _llava_next_config(processor: Any) -> PreTrainedConfig:
    tiles = processor.image_processor.image_grid_pinpoints
    return _llava_config(processor, "mistral", "llava_next", image_grid_pinpoints=tiles)


def _onevision() -> ProcessorMixin:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    tiles = [[IMAGE * h, IMAGE * w] for h in range(1, 7) for w in range(1, 7)]
    size = {"height": IMAGE, "width": IMAGE}
    named = {"image_token": "<image>", "video_token": "<video>"}
    processor: ProcessorMixin = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        tiny_tokenizer(CHATML_TOKENS, named, pad="<|endoftext|>", eos="<|im_end|>"),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(IMAGE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return processor


def _onevision_config(processor: Any) -> PreTrainedConfig:
    return _llava_config(
        processor,
        "qwen2",
        "llava_onevision",
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        video_token_index=token_id(processor, "<video>"),
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _qwen(kind: str, patch: int, video: str) -> ProcessorMixin:
    import transformers as tf

    pixels = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 64 * (2 * patch) ** 2}
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    processor: ProcessorMixin = getattr(tf, kind)(
        tf.Qwen2VLImageProcessor(**pixels, **sizes),
        tiny_tokenizer((*CHATML_TOKENS, *_QWEN_VISION), pad="<|endoftext|>", eos="<|im_end|>"),
        getattr(tf, video)(**sizes),
    )
    return processor


def _qwen_config(
    model_type: str, vision: dict[str, Any], rope: dict[str, Any] = MROPE_PARAMETERS
) -> Callable[[Any], PreTrainedConfig]:
    names = ("vision_start", "vision_end", "image", "video")

    def config(processor: Any) -> PreTrainedConfig:
        ids = {f"{name}_token_id": token_id(processor, token) for name, token in zip(names, _QWEN_VISION, strict=True)}
        text = {**text_sizes(processor.tokenizer), "rope_parameters": rope}
        return AutoConfig.for_model(
            model_type, vision_config={**_QWEN_VISION_CONFIG, **vision}, text_config=text, tie_word_embeddings=False, **ids
        )

    return config


def _idefics(kind: str, images: str, video: str | None) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        import transformers as tf

        grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
        markers = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *grid)
        names: dict[str, Any] = {"bos": "<|im_start|>", "eos": "<end_of_utterance>", "pad": "<|im_end|>", "adds_bos": False}
        size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
        components = [getattr(tf, images)(**size), tiny_tokenizer((*CHATML_TOKENS, *markers), **names)]
        components += [getattr(tf, video)(**size)] if video else []
        processor: ProcessorMixin = getattr(tf, kind)(*components, image_seq_len=4)
        return processor

    return build


def _idefics_config(model_type: str) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        vision = {**VISION, "image_size": 28, "patch_size": 7}
        text = {"model_type": "llama", **text_sizes(processor.tokenizer)}
        tokens = {"image_token_id": token_id(processor, "<image>"), "pad_token_id": processor.tokenizer.pad_token_id}
        return AutoConfig.for_model(
            model_type, vision_config=vision, text_config=text, scale_factor=2, tie_word_embeddings=False, **tokens
        )

    return config


def _internvl() -> ProcessorMixin:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named |= {"video_token": "<video>"}
    size = {"height": 28, "width": 28}
    processor: ProcessorMixin = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        tiny_tokenizer(CHATML_TOKENS, named, pad="<|endoftext|>", eos="<|im_end|>"),
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    return processor


def _internvl_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "internvl",
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": False},
        text_config={"model_type": "qwen2", **text_sizes(processor.tokenizer)},
        image_token_id=token_id(processor, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _gemma3() -> ProcessorMixin:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = tiny_tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), named, bos="<bos>", eos="<eos>", pad="<pad>"
    )
    processor: ProcessorMixin = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": IMAGE, "width": IMAGE}), tokenizer, image_seq_length=4
    )
    return processor


def _gemma3_config(processor: Any) -> PreTrainedConfig:
    tokenizer = processor.tokenizer
    return AutoConfig.for_model(
        "gemma3",
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        text_config={
            "model_type": "gemma3_text",
            **text_sizes(tokenizer),
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
        mm_tokens_per_image=4,
        boi_token_index=token_id(processor, "<start_of_image>"),
        eoi_token_index=token_id(processor, "<end_of_image>"),
        image_token_index=token_id(processor, "<image_soft_token>"),
        tie_word_embeddings=True,
    )


def _paligemma() -> ProcessorMixin:
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE})
    images.image_seq_length = (IMAGE // PATCH) ** 2
    tokenizer = tiny_tokenizer(("<pad>", "<eos>", "<bos>", "<unk>", "<image>"), bos="<bos>", eos="<eos>", pad="<pad>")
    processor: ProcessorMixin = PaliGemmaProcessor(images, tokenizer)
    return processor


def _paligemma_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "paligemma",
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False, "projection_dim": 64},
        text_config={"model_type": "gemma", **text_sizes(processor.tokenizer), "tie_word_embeddings": True},
        image_token_index=token_id(processor, "<image>"),
        projection_dim=64,
        tie_word_embeddings=True,
    )


def _pixtral(merge: int) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        from transformers import PixtralImageProcessor, PixtralProcessor

        specials = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>")
        tokenizer = tiny_tokenizer((*specials, "[IMG]", "[IMG_BREAK]", "[IMG_END]"), pad="<pad>", **SENTENCEPIECE)
        images = PixtralImageProcessor(size={"longest_edge": 128}, patch_size=8 if merge == 1 else {"height": 8, "width": 8})
        processor: ProcessorMixin = PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=merge)
        return processor

    return build


def _pixtral_config(model_type: str) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        vision = {key: value for key, value in VISION.items() if key not in ("image_size", "patch_size")}
        settings = {"spatial_merge_size": 2} if model_type == "mistral3" else {"vision_feature_select_strategy": "full"}
        return AutoConfig.for_model(
            model_type,
            vision_config={"model_type": "pixtral", **vision, "head_dim": 32, "image_size": 128, "patch_size": 8},
            text_config={"model_type": "mistral", **text_sizes(processor.tokenizer)},
            image_token_index=token_id(processor, "[IMG]"),
            vision_feature_layer=-1,
            tie_word_embeddings=False,
            **settings,
        )

    return config


# ---- the table

_HEAD = (r"^lm_head\.", "language_model.lm_head.")
_LLAVA_KEYS = (
    _HEAD,
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(multi_modal_projector|image_newline)", r"\1"),
)
_CLIP_KEYS = (*_LLAVA_KEYS, (r"^model\.vision_tower\.", "vision_tower.vision_model."))
_FLAT_KEYS = (*_LLAVA_KEYS, (r"^model\.vision_tower\.", "vision_tower."))
_QWEN_KEYS = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))


@dataclass(frozen=True)
class TinyBase:
    """The contents of a family's tiny checkpoint.

    Attributes:
        processor: builds the processor.
        config: builds the model's config for that processor.
        keys: regular expressions and replacements that map module names to the key names of hub checkpoints.
        generation: generation settings of the release, without its token ids.
        template: the chat template of the release, or one that renders the same text; None if it has none.
        required_template: the `model.chat_template` that a recipe must set, because the release has no template, or one without
            an end-of-turn token.
    """

    processor: Callable[[], ProcessorMixin]
    config: Callable[[Any], PreTrainedConfig]
    keys: tuple[tuple[str, str], ...] = ()
    generation: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    required_template: str | None = None


_NUCLEUS = {"do_sample": True, "temperature": 0.1, "top_p": 0.001, "repetition_penalty": 1.05}
_BASES: dict[str, TinyBase] = {
    "llava": TinyBase(_llava, lambda p: _llava_config(p, "llama"), _CLIP_KEYS),
    "llava_pixtral": TinyBase(_pixtral(1), _pixtral_config("llava"), _FLAT_KEYS),
    "llava_next": TinyBase(_llava_next, _llava_next_config, _CLIP_KEYS),
    "llava_onevision": TinyBase(
        _onevision, _onevision_config, _CLIP_KEYS, {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    ),
    "qwen2_vl": TinyBase(
        lambda: _qwen("Qwen2VLProcessor", 14, "Qwen2VLVideoProcessor"),
        _qwen_config("qwen2_vl", {"embed_dim": 64, "mlp_ratio": 2}),
        _QWEN_KEYS,
        {**_NUCLEUS, "repetition_penalty": 1.0},
    ),
    "qwen2_5_vl": TinyBase(
        lambda: _qwen("Qwen2_5_VLProcessor", 14, "Qwen2VLVideoProcessor"),
        # one layer with window attention (windows of two merged patches), and one with full attention
        _qwen_config(
            "qwen2_5_vl", {"intermediate_size": 128, "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]}
        ),
        _QWEN_KEYS,
        _NUCLEUS,
    ),
    "qwen3_vl": TinyBase(
        lambda: _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
        _qwen_config(
            "qwen3_vl",
            {
                "intermediate_size": 128,
                "out_hidden_size": 64,
                "patch_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]},
        ),
        generation={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    ),
    "idefics3": TinyBase(
        _idefics("Idefics3Processor", "Idefics3ImageProcessor", None),
        _idefics_config("idefics3"),
    ),
    "smolvlm": TinyBase(
        _idefics("SmolVLMProcessor", "SmolVLMImageProcessor", "SmolVLMVideoProcessor"),
        _idefics_config("smolvlm"),
    ),
    "internvl": TinyBase(_internvl, _internvl_config, _FLAT_KEYS),
    "gemma3": TinyBase(
        _gemma3,
        _gemma3_config,
        _CLIP_KEYS,
        {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    ),
    "paligemma": TinyBase(_paligemma, _paligemma_config, _CLIP_KEYS),
    "mistral3": TinyBase(_pixtral(2), _pixtral_config("mistral3"), _FLAT_KEYS),
}
BASES = {
    name: replace(base, template=TEMPLATES[name], required_template=REQUIRED_TEMPLATES.get(name)) for name, base in _BASES.items()
}
"""Tiny bases by name: the `model_type` of the family, with the vision tower appended if a class has several variants."""


def write_tiny_base(base: TinyBase, out: Path, seed: int = 0) -> Path:
    """Write a tiny checkpoint, such as one of `BASES`.

    Args:
        out: the directory to write.
        seed: the seed of the weights.

    Raises:
        ImportError: the processor needs an optional library that is not installed.
    """
    processor = base.processor()
    processor.chat_template = base.template
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(base.config(processor), trust_remote_code=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # A projection (Gemma 3), weight (DeepSeek-VL, Gemma 3n) or gate (Mllama) of zeros would ignore images.
                if not parameter.any() and not name.endswith("bias") and "norm" not in name:
                    parameter.normal_(std=0.02)
    out.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(out)
    _split_processor_config(out)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {name: token for name, token in ids.items() if token is not None} | base.generation
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(_hub_tensors(model, base.keys), out / "model.safetensors", metadata={"format": "pt"})
    return out


def _hub_tensors(model: Any, keys: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    tensors = {}
    tied = tied_weight_names(model) if getattr(model.config, "tie_word_embeddings", False) else set()
    written: set[int] = set()  # the embeddings of T5's and BART's encoder and decoder are one tensor
    for name, tensor in model.state_dict().items():
        if name not in tied and tensor.data_ptr() not in written:
            written.add(tensor.data_ptr())
            renamed = name
            for pattern, replacement in keys:
                renamed, changes = re.subn(pattern, replacement, name)
                if changes:
                    break
            tensors[renamed] = tensor.contiguous()
    return tensors


def _split_processor_config(folder: Path) -> None:
    """Move image and video processor settings into separate files, as in releases; transformers writes one file for all."""
    file = folder / "processor_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file_names = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
    for key, name in file_names.items():
        if key in config:
            settings = config.pop(key) | {"processor_class": config["processor_class"]}
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
