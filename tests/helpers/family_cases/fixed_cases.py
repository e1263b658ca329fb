"""Families with a fixed number of tokens for every image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ProcessorMixin

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import (
    BASES,
    CHATML_TOKENS,
    MERGES,
    TEXTS,
    VISION,
    TinyBase,
    square_sizes,
    text_sizes,
    tiny_tokenizer,
    token_id,
)
from mmtune.models.tiny.tiny_models import IMAGE, PATCH, TOWER, byte_level_tokenizer

SQUARE = {"height": IMAGE, "width": IMAGE}
GRID = IMAGE // PATCH
"""Patches along an edge."""

# Deepseek-VL's system text is shortened; the line ends and roles are those of the release.
_USER_ASSISTANT = (
    "A helpful assistant.\n\n{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' }}{% for b in m.content %}"
    "{{ b.text if b.type == 'text' else 'IMAGE' }}{% endfor %}{{ '\n\n' }}{% else %}{{ 'ASSISTANT: ' + m.content[0].text }}"
    "{{ 'END' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _user_assistant(user: str, assistant: str, image: str, end: str) -> str:
    changes = {"USER": user, "ASSISTANT": assistant, "IMAGE": image, "END": end}
    template = _USER_ASSISTANT
    for old, new in changes.items():
        template = template.replace(old, new)
    return template


# ---- ViP-LLaVA: LLaVA's processor, and features of several layers side by side


def _vipllava_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "vipllava",
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        vision_feature_layer=[-2, -1, 1],
        image_seq_length=GRID**2,
        image_token_index=token_id(processor, "<image>"),
    )


# ---- DeepSeek-VL and Janus

_DEEPSEEK_BOS, _DEEPSEEK_END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
_DEEPSEEK = {"bos": _DEEPSEEK_BOS, "eos": _DEEPSEEK_END, "pad": "<pad>"}


def _deepseek(kind: str) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        import transformers as tf

        tokenizer = tiny_tokenizer(tuple(_DEEPSEEK.values()), {"image_token": "<image_placeholder>"}, **_DEEPSEEK)
        sizes: dict[str, Any] = {"size": SQUARE}
        if kind == "DeepseekVLHybrid":
            sizes["high_res_size"] = {"height": 2 * IMAGE, "width": 2 * IMAGE}
        images = getattr(tf, f"{kind}ImageProcessor")(**sizes)
        processor: ProcessorMixin = getattr(tf, f"{kind}Processor")(images, tokenizer, num_image_tokens=GRID**2)
        return processor

    return build


def _deepseek_config(model_type: str) -> Callable[[Any], PreTrainedConfig]:
    def config(processor: Any) -> PreTrainedConfig:
        settings: dict[str, Any] = {}
        if model_type == "deepseek_vl_hybrid":
            attention = {"num_attention_heads": 2, "window_size": 4, "global_attn_indexes": [1]}
            sizes = {"hidden_size": 32, "mlp_dim": 64, "output_channels": 16, "image_size": 2 * IMAGE, "patch_size": 7}
            settings["high_res_vision_config"] = {"num_hidden_layers": 2, **attention, **sizes}
        return AutoConfig.for_model(
            model_type,
            text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
            vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
            image_token_id=token_id(processor, "<image_placeholder>"),
            tie_word_embeddings=False,
            **settings,
        )

    return config


def _janus() -> ProcessorMixin:
    from transformers import JanusImageProcessor, JanusProcessor

    named = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    images = JanusImageProcessor(size=SQUARE)
    processor: ProcessorMixin = JanusProcessor(
        images, tiny_tokenizer(tuple(_DEEPSEEK.values()), named, **_DEEPSEEK), num_image_tokens=GRID**2
    )
    return processor


def _janus_config(processor: Any) -> PreTrainedConfig:
    text = text_sizes(processor.tokenizer)
    width = {"projection_dim": text["hidden_size"]}
    codes = {"embed_dim": 8, "num_embeddings": 16, "image_token_embed_dim": text["hidden_size"]}
    return AutoConfig.for_model(
        "janus",
        text_config={"model_type": "llama", **text},
        vision_config={**VISION, **width, "num_image_tokens": GRID**2},
        vq_config={**codes, **width, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        image_token_id=token_id(processor, "<image_placeholder>"),
        tie_word_embeddings=False,
    )


_CHAT = {"user": "User", "assistant": "Assistant", "end": _DEEPSEEK_END}
_DEEPSEEK_TEMPLATE = _user_assistant(**_CHAT, image="<image_placeholder>")
_JANUS_TEMPLATE = _user_assistant("<|User|>", "<|Assistant|>", "<image_placeholder>\n", _DEEPSEEK_END)

# ---- Gemma 3n and 4: an audio tower beside the vision tower, and embeddings for every layer

_GEMMA: dict[str, Any] = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
_GEMMA4_NAMES = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
_GEMMA4_NAMES |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{% for b in m.content %}{{ (b.text | trim) if b.type == 'text' else '<|image|>' }}{% endfor %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)


def _gemma4(kind: str) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        import transformers as tf

        tokenizer = tiny_tokenizer(
            ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|video|>"), _GEMMA4_NAMES, **_GEMMA
        )
        sizes = {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70}
        extractor = getattr(tf, f"{kind}AudioFeatureExtractor")()
        images, videos = (getattr(tf, f"{kind}{medium}Processor")(**sizes) for medium in ("Image", "Video"))
        processor: ProcessorMixin = getattr(tf, f"{kind}Processor")(extractor, images, tokenizer, videos)
        return processor

    return build


def _gemma4_config(model_type: str, vision: dict[str, Any], audio: dict[str, Any] | None, **text: Any) -> Any:
    def config(processor: Any) -> PreTrainedConfig:
        names = {f"{name.removesuffix('_token')}_token_id": token for name, token in _GEMMA4_NAMES.items()}
        ids = {name: token_id(processor, token) for name, token in names.items()}
        ids["eoa_token_index"] = ids.pop("eoa_token_id")
        sizes = {**text_sizes(processor.tokenizer), "num_hidden_layers": 4, "global_head_dim": 32, "sliding_window": 64}
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
        return AutoConfig.for_model(
            model_type,
            text_config={**sizes, **text, "tie_word_embeddings": True},
            vision_config={**vision, "patch_size": 8, "pooling_kernel_size": 2},
            audio_config=audio,
            video_token_id=token_id(processor, "<|video|>"),
            **ids,
        )

    return config


_GEMMA4_VISION: dict[str, Any] = {**TOWER, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 128}
_GEMMA4_AUDIO = {**TOWER, "num_hidden_layers": 1, "subsampling_conv_channels": [8, 4], "output_proj_dims": 32}
# E2B and E4B: embeddings of every layer, and layers that use the keys and values of others
_GEMMA4_SMALL = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 2}
# 31B: image tokens that see each other, and keys that are values
_GEMMA4_LARGE = {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "attention_k_eq_v": True}
_GEMMA4_LARGE["num_global_key_value_heads"] = 1

# Gemma 3's template with another placeholder
_GEMMA3N_TEMPLATE = str(BASES["gemma3"].template).replace("<start_of_image>", "<image_soft_token>")
# InternVL's writes the same text with another placeholder.
_FAST_VLM_TEMPLATE = str(BASES["internvl"].template).replace("<IMG_CONTEXT>", "<image>")


def _gemma3n() -> ProcessorMixin:
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor, SiglipImageProcessor

    named = {"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>"}
    # After the text tokens: they have embeddings of their own.
    named |= {"eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named |= {"eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *list(named.values())[:2]]
    tokenizer = byte_level_tokenizer({"specials": specials, "named": named, **_GEMMA}, TEXTS, merges=MERGES)
    processor: ProcessorMixin = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), SiglipImageProcessor(size=SQUARE), tokenizer, image_seq_length=4
    )
    return processor


def _gemma3n_config(processor: Any) -> PreTrainedConfig:
    tokens = {"boi": "start_of_image", "eoi": "end_of_image", "image": "image_soft_token"}
    tokens |= {"boa": "start_of_audio", "eoa": "end_of_audio", "audio": "audio_soft_token"}
    ids = {f"{name}_token_id": token_id(processor, f"<{token}>") for name, token in tokens.items()}
    sizes = text_sizes(processor.tokenizer)
    # The last tokens of the vocabulary are those of images, then those of audio.
    images = {"vocab_offset": ids["eoi_token_id"], "vocab_size": 2}
    audio: dict[str, Any] = {"vocab_offset": ids["eoa_token_id"], "vocab_size": sizes["vocab_size"] - ids["eoa_token_id"]}
    audio |= {"hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [8, 4]}
    layers = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    layers |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "sliding_window": 64}
    widths = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": images["vocab_offset"]}
    text = {**sizes, **layers, **widths, "altup_num_inputs": 2, "laurel_rank": 8}
    return AutoConfig.for_model(
        "gemma3n",
        text_config={**text, "tie_word_embeddings": True},
        vision_config={
            "architecture": "mobilenetv5_300m_enc",
            "model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 2},
            **images,
        },
        audio_config=audio,
        vision_soft_tokens_per_image=4,
        **ids,
    )


# ---- FastVLM: a convolutional tower, which halves the image six times


def _fast_vlm() -> ProcessorMixin:
    from transformers import CLIPImageProcessor, LlavaProcessor

    size = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
    tokenizer = tiny_tokenizer(CHATML_TOKENS, {"image_token": "<image>"}, pad="<|endoftext|>", eos="<|im_end|>")
    processor: ProcessorMixin = LlavaProcessor(
        CLIPImageProcessor(**size), tokenizer, patch_size=64, vision_feature_select_strategy="full"
    )
    return processor


def _fast_vlm_config(processor: Any) -> PreTrainedConfig:
    stages = {"layers": [1, 1, 1, 1, 1], "embed_dims": [16, 16, 32, 32, 64]}
    return AutoConfig.for_model(
        "fast_vlm",
        text_config={"model_type": "qwen2", **text_sizes(processor.tokenizer)},
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 128,
            "model_args": {"inference_mode": True, **stages},
        },
        image_token_index=token_id(processor, "<image>"),
        image_seq_length=4,
    )


# ---- HyperCLOVA X Vision, with Qwen2.5-VL's tower, and Video-LLaVA, with a tower for each medium


def _hyperclovax() -> ProcessorMixin:
    from transformers import HyperCLOVAXVisionV2Processor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    images = Qwen2VLImageProcessor(min_pixels=4 * 28**2, max_pixels=64 * 28**2, **sizes)
    tokenizer = tiny_tokenizer((*CHATML_TOKENS, *_HYPERCLOVAX_IMAGE, "<|video_pad|>"), pad="<|endoftext|>", eos="<|im_end|>")
    processor: ProcessorMixin = HyperCLOVAXVisionV2Processor(images, tokenizer, Qwen2VLVideoProcessor(**sizes))
    return processor


def _hyperclovax_config(processor: Any) -> PreTrainedConfig:
    windows = {"window_size": 56, "fullatt_block_indexes": [1], "out_hidden_size": 32}
    return AutoConfig.for_model(
        "hyperclovax_vision_v2",
        text_config={"model_type": "hyperclovax", **text_sizes(processor.tokenizer)},
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            **windows,
        },
        image_token_id=token_id(processor, "<|image_pad|>"),
        video_token_id=token_id(processor, "<|video_pad|>"),
        tie_word_embeddings=False,
    )


_HYPERCLOVAX_IMAGE = ("<|image_start|>", "<|image_pad|>", "<|image_end|>")
_HYPERCLOVAX_TEMPLATE = str(BASES["internvl"].template).replace("<IMG_CONTEXT>", "".join(_HYPERCLOVAX_IMAGE))


def _video_llava() -> ProcessorMixin:
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = tiny_tokenizer(("<unk>", "<s>", "</s>", "<pad>"), named, **names)
    images, videos = (kind(**square_sizes()) for kind in (VideoLlavaImageProcessor, VideoLlavaVideoProcessor))
    processor: ProcessorMixin = VideoLlavaProcessor(images, videos, tokenizer, patch_size=PATCH)
    return processor


def _video_llava_config(processor: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "video_llava",
        text_config={"model_type": "llama", **text_sizes(processor.tokenizer)},
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
        image_token_index=token_id(processor, "<image>"),
        video_token_index=token_id(processor, "<video>"),
        image_seq_length=GRID**2,
        video_seq_length=8 * (GRID**2 + 1),
    )


# ---- Chameleon and Emu3: images become tokens of the vocabulary

_CODES = 16


def _chameleon() -> ProcessorMixin:
    from transformers import ChameleonImageProcessor, ChameleonProcessor

    codes = tuple(f"IMGIMG{chr(ord('A') + code // 10)}{chr(ord('A') + code % 10)}Z" for code in range(_CODES))
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
    named = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = tiny_tokenizer(("<s>", "<pad>", "</s>", "<unk>", "<reserved08706>", *codes), named, **names)
    tokenizer.sep_token = "<reserved08706>"
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor: ProcessorMixin = ChameleonProcessor(ChameleonImageProcessor(**size), tokenizer, image_seq_length=16)
    return processor


def _chameleon_config(processor: Any) -> PreTrainedConfig:
    tokens = processor.tokenizer.get_vocab()
    vq = {"embed_dim": 8, "num_embeddings": _CODES, "latent_channels": 8, "resolution": 32, "base_channels": 32}
    return AutoConfig.for_model(
        "chameleon",
        **text_sizes(processor.tokenizer),
        vq_config={**vq, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1},
        vocabulary_map={token: tokens[token] for token in tokens if token.startswith("IMGIMG") or token == "<image>"},
    )


def _emu3() -> ProcessorMixin:
    from transformers import Emu3ImageProcessor, Emu3Processor

    codes = tuple(f"<|visual token {code:06}|>" for code in range(_CODES))
    names = {"bos": "<|extra_203|>", "eos": "<|extra_204|>", "pad": "<|endoftext|>"}
    named = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    named |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    specials = (*names.values(), "<|extra_200|>", *codes)
    tokenizer = tiny_tokenizer(specials, named, adds_bos=False, **names)
    images = Emu3ImageProcessor(min_pixels=16**2, max_pixels=48**2, spatial_factor=8)
    processor: ProcessorMixin = Emu3Processor(images, tokenizer)
    return processor


def _emu3_config(processor: Any) -> PreTrainedConfig:
    tokens = processor.tokenizer.get_vocab()
    vq = {"codebook_size": _CODES, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1]}
    return AutoConfig.for_model(
        "emu3",
        text_config={**text_sizes(processor.tokenizer), "attention_dropout": 0.0},
        vq_config={**vq, "num_res_blocks": 1, "hidden_size": 32},
        vocabulary_map={
            token: tokens[token] for token in tokens if token.startswith("<|visual") or token in ("<image>", "<|extra_200|>")
        },
    )


_CHAMELEON_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<reserved08706>' }}"
    "{% generation %}{{ m.content[0].text + eos_token }}{% endgeneration %}{% else %}"
    "{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)
_EMU3_TEMPLATE = _user_assistant("USER", "ASSISTANT", "<image>", "<|extra_204|>").replace("\n\n", " ")

# ---- the table

FIXED_CASES: dict[str, FamilyCase] = {
    "vipllava": FamilyCase(
        TinyBase(BASES["llava"].processor, _vipllava_config, template=BASES["llava"].template, required_template="vicuna_v1"),
        end="</s>",
        leading=" ",
    ),
    "deepseek_vl": FamilyCase(
        TinyBase(_deepseek("DeepseekVL"), _deepseek_config("deepseek_vl"), template=_DEEPSEEK_TEMPLATE),
        end=_DEEPSEEK_END,
        leading=" ",
    ),
    "deepseek_vl_hybrid": FamilyCase(
        TinyBase(_deepseek("DeepseekVLHybrid"), _deepseek_config("deepseek_vl_hybrid"), template=_DEEPSEEK_TEMPLATE),
        end=_DEEPSEEK_END,
        leading=" ",
    ),
    "gemma4": FamilyCase(
        TinyBase(
            _gemma4("Gemma4"),
            _gemma4_config("gemma4", _GEMMA4_VISION, _GEMMA4_AUDIO, **_GEMMA4_SMALL),
            template=_GEMMA4_TEMPLATE,
        ),
        end="<turn|>",
    ),
    "gemma4_large": FamilyCase(
        TinyBase(_gemma4("Gemma4"), _gemma4_config("gemma4", _GEMMA4_VISION, None, **_GEMMA4_LARGE), template=_GEMMA4_TEMPLATE),
        end="<turn|>",
    ),
    "gemma4_unified": FamilyCase(
        TinyBase(
            _gemma4("Gemma4Unified"),
            _gemma4_config(
                "gemma4_unified", {"mm_embed_dim": 32, "mm_posemb_size": 128, "output_proj_dims": 32}, {"audio_embed_dim": 640}
            ),
            template=_GEMMA4_TEMPLATE,
        ),
        end="<turn|>",
    ),
    "gemma3n": FamilyCase(TinyBase(_gemma3n, _gemma3n_config, template=_GEMMA3N_TEMPLATE), end="<end_of_turn>"),
    "fast_vlm": FamilyCase(TinyBase(_fast_vlm, _fast_vlm_config, template=_FAST_VLM_TEMPLATE)),
    "hyperclovax_vision_v2": FamilyCase(TinyBase(_hyperclovax, _hyperclovax_config, template=_HYPERCLOVAX_TEMPLATE)),
    "video_llava": FamilyCase(
        TinyBase(_video_llava, _video_llava_config, template=BASES["llava"].template, required_template="vicuna_v1"),
        end="</s>",
        leading=" ",
    ),
    "chameleon": FamilyCase(TinyBase(_chameleon, _chameleon_config, template=_CHAMELEON_TEMPLATE), end="</s>", projector=False),
    # Its processor pads the images of a row to one size, which changes their codes in plain transformers.
    "emu3": FamilyCase(
        TinyBase(_emu3, _emu3_config, template=_EMU3_TEMPLATE),
        end="<|extra_204|>",
        leading=" ",
        one_image=True,
        alone=True,
        projector=False,
    ),
    "janus": FamilyCase(TinyBase(_janus, _janus_config, template=_JANUS_TEMPLATE), end=_DEEPSEEK_END, leading=" "),
}
