"""Families whose image is a grid of patches that keeps its aspect ratio."""

from __future__ import annotations

from transformers import ProcessorMixin

from family_cases.family_case import FamilyCase
from family_cases.grids.glm_cases import GLM_CASES
from family_cases.grids.grid_bases import PARTS, QWEN_NAMES, QWEN_VISION, chatml, grid_config, grid_processor
from family_cases.grids.omni_cases import OMNI_CASES
from family_cases.grids.qwen_cases import QWEN_CASES
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, MROPE_PARAMETERS, SENTENCEPIECE, TinyBase, tiny_tokenizer

PADDLE_TOKENS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>")
PADDLE_TEMPLATE = (
    "<|begin_of_sentence|>{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' }}"
    "{% for b in m.content if b.type == 'image' %}{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endfor %}"
    "{% for b in m.content if b.type == 'text' %}{{ b.text }}{% endfor %}{{ '\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant:\n' }}{{ m.content[0].text }}{{ '</s>' }}"
    "{% else %}{{ m.content[0].text + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
EXAONE_TEMPLATE = (
    "{% for m in messages %}{{ '[|' + m.role + '|]\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') }}"
    + PARTS.replace("IMAGE", "'<vision><|image_pad|></vision>'")
    + "{{ '[|endofturn|]\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]\n<think>\n\n</think>\n\n' }}{% endif %}"
)
KIMI_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}"
    "{{ '<think></think>' if m.role == 'assistant' else '' }}"
    + PARTS.replace("IMAGE", "'<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n'")
    + "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|><think></think>' }}{% endif %}"
)
KIMI_VISION = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>")
KIMI_TURNS = ("[BOS]", "[EOS]", "[PAD]", "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
ERNIE_NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
ERNIE_TEMPLATE = (
    "<|begin_of_sentence|>{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' }}"
    + PARTS.replace("IMAGE", "'Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>'")
    + "{{ '\n' }}{% elif m.role == 'assistant' %}{{ 'Assistant: \n<think>\n\n</think>\n\n' }}"
    "{{ m.content[0].text + '<|end_of_sentence|>' }}"
    "{% else %}{{ m.content[0].text + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: \n<think>\n\n</think>\n\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}{{ '[INST]' }}"
    + PARTS.replace("IMAGE", "'[IMG]'")
    + "{{ '[/INST]' }}{% else %}{{ m.content[0].text + eos_token }}{% endif %}{% endfor %}"
)
PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "image_size": 128,
    "patch_size": 8,
}


def _kimi() -> ProcessorMixin:
    from transformers import Kimi_K25ImageProcessor, Kimi_K25Processor, Kimi_K25VideoProcessor

    tokenizer = tiny_tokenizer((*KIMI_TURNS, *KIMI_VISION, "<think>", "</think>"), pad="[PAD]", eos="<|im_end|>", bos="[BOS]")
    images = Kimi_K25ImageProcessor(size={"max_height": 8, "max_width": 8}, max_patches=64)
    processor: ProcessorMixin = Kimi_K25Processor(images, tokenizer, Kimi_K25VideoProcessor())
    return processor


def _lighton() -> ProcessorMixin:
    from transformers import LightOnOcrProcessor, PixtralImageProcessor

    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    images = PixtralImageProcessor(size={"longest_edge": 128}, patch_size=16)
    tokenizer = tiny_tokenizer(CHATML_TOKENS, named, **QWEN_NAMES)
    processor: ProcessorMixin = LightOnOcrProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2)
    return processor


def _mistral_large() -> ProcessorMixin:
    from transformers import PixtralImageProcessor, PixtralProcessor

    turns = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = tiny_tokenizer(("<unk>", "<s>", "</s>", *turns), pad="<pad>", **SENTENCEPIECE)
    images = PixtralImageProcessor(size={"longest_edge": 128}, patch_size={"height": 8, "width": 8})
    processor: ProcessorMixin = PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2)
    return processor


GRID_CASES: dict[str, FamilyCase] = {
    **QWEN_CASES,
    **GLM_CASES,
    **OMNI_CASES,
    "paddleocr_vl": FamilyCase(
        TinyBase(
            grid_processor(
                "PaddleOCRVLProcessor",
                "PaddleOCRVLImageProcessor",
                PADDLE_TOKENS,
                frames=1,
                named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
                pad="<unk>",
                **SENTENCEPIECE,
            ),
            grid_config(
                "paddleocr_vl",
                {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56},
                {"rope_parameters": MROPE_PARAMETERS},
                {
                    "image_token_id": "<|IMAGE_PLACEHOLDER|>",
                    "video_token_id": "<unk>",
                    "vision_start_token_id": "<|IMAGE_START|>",
                    "vision_end_token_id": "<|IMAGE_END|>",
                },
            ),
            template=PADDLE_TEMPLATE,
        ),
        end="</s>",
    ),
    "exaone4_5": FamilyCase(
        TinyBase(
            grid_processor(
                "Exaone4_5_Processor",
                "Qwen2VLImageProcessor",
                (
                    *("[BOS]", "[PAD]", "[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]", "<think>", "</think>"),
                    *("<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"),
                ),
                "Qwen2VLVideoProcessor",
                pad="[PAD]",
                bos="[BOS]",
                eos="[|endofturn|]",
                adds_bos=False,
            ),
            grid_config(
                "exaone4_5",
                {
                    "depth": 2,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_heads": 4,
                    "num_key_value_heads": 2,
                    "out_hidden_size": 64,
                    "window_size": 56,
                    "fullatt_block_indexes": [1],
                },
                {"model_type": "exaone4", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
                {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
            ),
            template=EXAONE_TEMPLATE,
        ),
        end="[|endofturn|]",
    ),
    "lighton_ocr": FamilyCase(
        TinyBase(
            _lighton,
            grid_config("lighton_ocr", PIXTRAL_TOWER, {"model_type": "qwen3"}, {"image_token_id": "<|image_pad|>"}),
            template=chatml("<|image_pad|>"),
        )
    ),
    "kimi_k25": FamilyCase(
        TinyBase(
            _kimi,
            grid_config(
                "kimi_k25",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "pos_emb_height": 8,
                    "pos_emb_width": 8,
                },
                {
                    "model_type": "deepseek_v3",
                    "num_key_value_heads": 4,
                    "q_lora_rank": 16,
                    "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 16,
                    "v_head_dim": 16,
                    "head_dim": 8,
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2,
                    "n_group": 1,
                    "topk_group": 1,
                    "moe_intermediate_size": 32,
                    "n_shared_experts": 1,
                    "first_k_dense_replace": 1,
                },
                {
                    "image_token_id": "<|media_pad|>",
                    "video_token_id": "<|kimi_k25_video_placeholder|>",
                    "vision_start_token_id": "<|media_begin|>",
                    "vision_end_token_id": "<|media_end|>",
                },
                projection_hidden_size=64,
            ),
            template=KIMI_TEMPLATE,
        )
    ),
    "video_llama_3": FamilyCase(
        TinyBase(
            grid_processor(
                "VideoLlama3Processor",
                "VideoLlama3ImageProcessor",
                (*CHATML_TOKENS, *QWEN_VISION),
                "VideoLlama3VideoProcessor",
                merge=1,
                frames=1,
                **QWEN_NAMES,
            ),
            grid_config(
                "video_llama_3",
                {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14},
                {"model_type": "qwen2"},
                {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
            ),
            template=chatml("<|image_pad|>"),
        )
    ),
    "mistral_large4": FamilyCase(
        TinyBase(
            _mistral_large,
            grid_config(
                "mistral_large4",
                PIXTRAL_TOWER,
                {
                    "num_key_value_heads": 4,
                    "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 8,
                    "v_head_dim": 16,
                    "head_dim": 8,
                    "n_routed_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": 32,
                    "index_topk": 512,
                    "index_head_dim": 16,
                    "index_n_heads": 2,
                },
                {"image_token_index": "[IMG]"},
            ),
            template=MISTRAL_TEMPLATE,
        ),
        end="</s>",
    ),
    "ernie4_5_vl_moe": FamilyCase(
        TinyBase(
            grid_processor(
                "Ernie4_5_VLMoeProcessor",
                "Ernie4_5_VLMoeImageProcessor",
                ("<unk>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</think>"),
                "Ernie4_5_VLMoeVideoProcessor",
                named=ERNIE_NAMED,
                frames=1,
                video_settings={"temporal_patch_size": 2, "draw_on_frames": False},  # drawing needs a font file
                pad="<unk>",
                bos="<|begin_of_sentence|>",
                eos="<|end_of_sentence|>",
            ),
            grid_config(
                "ernie4_5_vl_moe",
                {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2},
                {
                    "rope_parameters": {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]},
                    "moe_intermediate_size": [32, 32],
                    "moe_k": 2,
                    "moe_num_experts": 4,
                    "moe_num_shared_experts": 1,
                },
                {name.replace("token", "token_id"): token for name, token in ERNIE_NAMED.items()},
            ),
            template=ERNIE_TEMPLATE,
        ),
        end="<|end_of_sentence|>",
    ),
}
