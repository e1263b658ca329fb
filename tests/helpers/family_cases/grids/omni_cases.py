"""Families with grids, experts and attention of their own."""

from __future__ import annotations

from transformers import ProcessorMixin

from family_cases.family_case import FamilyCase
from family_cases.grids.grid_bases import PARTS, chatml, grid_config, grid_processor
from mmtune.models.tiny.tiny_bases import TinyBase, tiny_tokenizer

DOTS_TOKENS = (
    *("<|endoftext|>", "<|system|>", "<|endofsystem|>", "<|userprompt|>", "<|endofuserprompt|>", "<|response|>"),
    *("<|endofresponse|>", "<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>"),
)
DOTS_TEMPLATE = (
    "{% for m in messages %}{% set n = {'system': 'system', 'user': 'userprompt', 'assistant': 'response'}[m.role] %}"
    "{{ '<|' + n + '|>' }}"
    + PARTS.replace("IMAGE", "'<|img|><|imgpad|><|endofimg|>'")
    + "{{ '<|endof' + n + '|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|response|>' }}{% endif %}"
)
MINIMAX_TOKENS = (
    *("]~!b[", "]~b]", "[e~[", "]!p~[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
    *("<think>", "</think>"),
)
MINIMAX_TEMPLATE = (
    "]~!b[{% for m in messages %}{{ ']~b]' + ('ai' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}"
    + PARTS.replace("IMAGE", "']<]image[>['")
    + "{{ '[e~[\n' }}{% endfor %}{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n\n</think>\n\n' }}{% endif %}"
)
INKLING_TOKENS = (
    *("<|begin|>", "<|pad|>", "<|end_message|>", "<|message_user|>", "<|message_model|>", "<|message_system|>"),
    *("<|content_text|>", "<|content_image|>", "<|content_audio_input|>", "<|unused_200054|>", "<|unused_200053|>"),
)
INKLING_TEMPLATE = (
    "{% for m in messages %}{{ '<|message_' + ('model' if m.role == 'assistant' else m.role) + '|>' }}"
    "{% for b in m.content %}{{ '<|content_text|>' + b.text if b.type == 'text' else '<|content_image|><|unused_200054|>' }}"
    "{% endfor %}{{ '<|end_message|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|message_model|><|content_text|>' }}{% endif %}"
)
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 16,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
INDEXER = {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2}


def _inkling(version: int) -> ProcessorMixin:
    import transformers as tf

    tokenizer = tiny_tokenizer(INKLING_TOKENS, pad="<|pad|>", bos="<|begin|>", eos="<|end_message|>", adds_bos=False)
    if version == 2:
        return tf.Inkling2Processor(tf.Inkling2ImageProcessor(), tokenizer)
    return tf.InklingProcessor(tf.InklingFeatureExtractor(), tf.InklingImageProcessor(), tokenizer)


INKLING_TEXT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 64,
    "d_rel": 4,
    "rel_extent": 64,
    "layer_types": ["hybrid_sliding", "hybrid"],
    **ROUTED,
}


HUNYUAN_NAMED = {
    "image_token": "<|hy_place_holder_no_102|>",
    "image_start_token": "<|hy_place_holder_no_100|>",
    "image_end_token": "<|hy_place_holder_no_101|>",
}
HUNYUAN_TEMPLATE = (
    "<|hy_begin_of_sentence|>{% for m in messages %}"
    + PARTS.replace("IMAGE", repr("<|hy_place_holder_no_100|><|hy_place_holder_no_102|><|hy_place_holder_no_101|>"))
    + "{{ {'system': '<|hy_place_holder_no_3|>', 'user': '<|hy_User|>', 'assistant': '<|hy_Assistant|>'}[m.role] }}{% endfor %}"
)


def _nemotron() -> ProcessorMixin:
    import transformers as tf

    tokens = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<img>", "</img>")
    media = ("<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>")
    return tf.NemotronH_Omni_Reasoning_V3Processor(
        tf.NemotronH_Omni_Reasoning_V3ImageProcessor(min_num_patches=16, max_num_patches=64),
        tf.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tiny_tokenizer((*tokens, *media), pad="<unk>", bos="<s>", eos="<|im_end|>", unk="<unk>", adds_bos=False),
        tf.ParakeetFeatureExtractor(),
    )


OMNI_CASES: dict[str, FamilyCase] = {
    "dots3_note": FamilyCase(
        TinyBase(
            grid_processor(
                "Dots3NoteProcessor",
                "Qwen2VLImageProcessor",
                DOTS_TOKENS,
                "Qwen2VLVideoProcessor",
                ("Dots3NoteFeatureExtractor", {}),
                frames=1,
                pad="<|endoftext|>",
                eos="<|endofresponse|>",
            ),
            grid_config(
                "dots3_note",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "moe_intermediate_size": 32,
                    "mlp_layer_types": ["dense", "sparse"],
                    "num_local_experts": 4,
                    "adapter_in_dim": 64,
                    "adapter_out_dim": 64,
                },
                {
                    **MLA,
                    **ROUTED,
                    **INDEXER,
                    **{f"swa_{name}": size for name, size in MLA.items() if name != "num_key_value_heads"},
                    "swa_num_attention_heads": 4,
                    "swa_num_key_value_heads": 4,
                    "sliding_window": 64,
                    "layer_types": ["indexed_attention", "sliding_attention"],
                    "shared_experts_intermediate_size": 32,
                },
                {"image_token_id": "<|imgpad|>", "video_token_id": "<|video_pad|>", "audio_token_id": "<|audio_comp_pad|>"},
                audio_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "adapter_input_size": 32,
                    "adapter_out_dim": 64,
                    "downsample_hidden_size": 8,
                },
            ),
            template=DOTS_TEMPLATE,
        ),
        end="<|endofresponse|>",
    ),
    "minimax_m3_vl": FamilyCase(
        TinyBase(
            grid_processor(
                "MiniMaxM3VLProcessor",
                "MiniMaxM3VLImageProcessor",
                MINIMAX_TOKENS,
                "MiniMaxM3VLVideoProcessor",
                pad="]!p~[",
                bos="]~!b[",
                eos="[e~[",
            ),
            grid_config(
                "minimax_m3_vl",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 112,
                },
                {
                    "num_experts_per_tok": 2,
                    "num_local_experts": 4,
                    "intermediate_size": 32,
                    "dense_intermediate_size": 128,
                    "shared_intermediate_size": 32,
                    "rotary_dim": 8,
                    "index_n_heads": 2,
                    "index_head_dim": 16,
                    "mlp_layer_types": ["dense", "sparse"],
                    "layer_types": ["full_attention", "minimax_m3_sparse"],
                },
                {"image_token_index": "]<]image[>[", "video_token_index": "]<]video[>["},
                projector_hidden_size=64,
            ),
            template=MINIMAX_TEMPLATE,
        ),
        end="[e~[",
    ),
    "inkling2": FamilyCase(
        TinyBase(
            lambda: _inkling(2),
            grid_config(
                "inkling2",
                {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "mlp_ratio": 2.0,
                    "posemb_grid_size": 4,
                    "projection_hidden_dim": 64,
                    "text_hidden_size": 64,
                },
                {**INKLING_TEXT, "n_layers_per_attn_res_block": 1},
                {"image_token_id": "<|unused_200054|>"},
            ),
            template=INKLING_TEMPLATE,
        ),
        end="<|end_message|>",
    ),
    "inkling_mm_model": FamilyCase(
        TinyBase(
            lambda: _inkling(1),
            grid_config(
                "inkling_mm_model",
                {"text_hidden_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
                {**INKLING_TEXT, "mlp_layer_types": ["dense", "sparse"], "logits_mup_width_multiplier": 1.0},
                {"image_token_id": "<|unused_200054|>", "audio_token_id": "<|unused_200053|>"},
                audio_config={"text_hidden_size": 64},
            ),
            template=INKLING_TEMPLATE,
        ),
        end="<|end_message|>",
    ),
    "hunyuan_vl": FamilyCase(
        TinyBase(
            grid_processor(
                "HunYuanVLProcessor",
                "HunYuanVLImageProcessor",
                (
                    *("<|hy_begin_of_sentence|>", "<|hy_end_of_sentence|>", "<|hy_pad|>"),
                    *("<|hy_place_holder_no_3|>", "<|hy_User|>", "<|hy_Assistant|>"),
                ),
                patch=16,
                frames=1,
                named=HUNYUAN_NAMED,
                pad="<|hy_pad|>",
                bos="<|hy_begin_of_sentence|>",
                eos="<|hy_Assistant|>",
            ),
            grid_config(
                "hunyuan_vl",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "out_hidden_size": 64,
                    "text_hidden_size": 64,
                    "max_image_size": 256,
                    "img_max_token_num": 64,
                },
                {
                    "rope_parameters": {
                        "rope_type": "dynamic",
                        "alpha": 1000.0,
                        "factor": 1.0,
                        "rope_theta": 1e4,
                        "mrope_section": [2, 2, 2, 2],
                    },
                    "tie_word_embeddings": True,
                },
                {"image_token_id": HUNYUAN_NAMED["image_token"], "im_start_id": HUNYUAN_NAMED["image_start_token"]},
                tie_word_embeddings=True,
            ),
            template=HUNYUAN_TEMPLATE,
        ),
        end="<|hy_Assistant|>",
        idle=r"\.image_sep$",  # no code of its class reads it
    ),
    "nemotron_h_omni": FamilyCase(
        TinyBase(
            _nemotron,
            grid_config(
                "nemotron_h_omni",
                {
                    "model_type": "radio",
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "mlp_ratio": 2.0,
                    "image_size": 64,
                    "max_img_size": 128,
                    "video_temporal_patch_size": 2,
                },
                {
                    "model_type": "nemotron_h",
                    "layers_block_type": ["mamba", "full_attention", "mlp", "moe"],
                    "ssm_state_size": 16,
                    "mamba_num_heads": 4,
                    "mamba_head_dim": 16,
                    "n_groups": 2,
                    "chunk_size": 64,
                    "n_routed_experts": 4,
                    "moe_intermediate_size": 32,
                    "moe_shared_expert_intermediate_size": 32,
                },
                {"image_token_id": "<image>", "video_token_id": "<video>", "audio_token_id": "<so_embedding>"},
                projector_hidden_size=64,
                vision_hidden_size=64,
                audio_config={
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "subsampling_conv_channels": 8,
                    "projection_hidden_size": 32,
                    "projection_bias": False,
                },
            ),
            template=chatml("<image>", "<think></think>"),
        )
    ),
}
