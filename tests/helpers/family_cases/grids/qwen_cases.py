"""Qwen's families, and those with its processors."""

from __future__ import annotations

from family_cases.family_case import FamilyCase
from family_cases.grids.grid_bases import QWEN_IDS, QWEN_IMAGE, QWEN_NAMES, QWEN_VISION, chatml, grid_config, grid_processor
from mmtune.models.tiny.tiny_bases import CHATML_TOKENS, MROPE_PARAMETERS, TinyBase

NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN3_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "patch_size": 16,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
QWEN3_PROCESSOR = grid_processor(
    "Qwen3VLProcessor",
    "Qwen2VLImageProcessor",
    (*CHATML_TOKENS, *QWEN_VISION, "<think>", "</think>"),
    "Qwen3VLVideoProcessor",
    patch=16,
    **QWEN_NAMES,
)
QWEN3_5_TEXT = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # a quarter of the head is rotated
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


OMNI_NAMED = {
    "image_token": "<|image_pad|>",
    "audio_token": "<|audio_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
WHISPER = ("WhisperFeatureExtractor", {"feature_size": 16})


QWEN_CASES: dict[str, FamilyCase] = {
    "qwen3_5": FamilyCase(
        TinyBase(
            QWEN3_PROCESSOR,
            grid_config("qwen3_5", QWEN3_TOWER, QWEN3_5_TEXT, QWEN_IDS),
            template=chatml(QWEN_IMAGE, NO_THOUGHT),
        )
    ),
    "qwen3_5_moe": FamilyCase(
        TinyBase(
            QWEN3_PROCESSOR,
            grid_config("qwen3_5_moe", QWEN3_TOWER, {**QWEN3_5_TEXT, **EXPERTS, "shared_expert_intermediate_size": 32}, QWEN_IDS),
            template=chatml(QWEN_IMAGE, NO_THOUGHT),
        )
    ),
    "qwen3_vl_moe": FamilyCase(
        TinyBase(
            QWEN3_PROCESSOR,
            grid_config(
                "qwen3_vl_moe",
                {**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
                {**EXPERTS, "rope_parameters": {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]}},
                QWEN_IDS,
            ),
            template=chatml(QWEN_IMAGE),
        )
    ),
    "cosmos3_omni": FamilyCase(
        TinyBase(
            QWEN3_PROCESSOR,
            grid_config(
                "cosmos3_omni",
                {**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
                {"rope_parameters": {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]}},
                QWEN_IDS,
            ),
            template=chatml(QWEN_IMAGE),
        )
    ),
    "cosmos3_edge": FamilyCase(
        TinyBase(
            grid_processor(
                "Cosmos3EdgeProcessor",
                "Cosmos3EdgeImageProcessor",
                (*CHATML_TOKENS, *QWEN_VISION, "<think>", "</think>"),
                "Cosmos3EdgeVideoProcessor",
                patch=16,
                frames=1,
                **QWEN_NAMES,
            ),
            grid_config(
                "cosmos3_edge",
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "patch_size": 16,
                    "num_patches": 16,
                },
                {"rope_parameters": {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]}},
                QWEN_IDS,
                projector_hidden_size=64,
            ),
            template=chatml(QWEN_IMAGE, NO_THOUGHT),
        ),
        plain_call={"return_mm_token_type_ids": True},  # its processor returns them on request only, and its model needs them
    ),
    "qwen2_5_omni_thinker": FamilyCase(
        TinyBase(
            grid_processor(
                "Qwen2_5OmniProcessor",
                "Qwen2VLImageProcessor",
                CHATML_TOKENS,
                "Qwen2VLVideoProcessor",
                WHISPER,
                named=OMNI_NAMED,
                **QWEN_NAMES,
            ),
            grid_config(
                "qwen2_5_omni_thinker",
                {
                    "depth": 2,
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_heads": 2,
                    "out_hidden_size": 64,
                    "window_size": 56,
                    "fullatt_block_indexes": [1],
                },
                {"rope_parameters": MROPE_PARAMETERS},
                {
                    "image_token_index": "<|image_pad|>",
                    "audio_token_index": "<|audio_pad|>",
                    "video_token_index": "<|video_pad|>",
                    "audio_start_token_id": "<|audio_start|>",
                    "vision_start_token_id": "<|vision_start|>",
                    "vision_end_token_id": "<|vision_end|>",
                    "audio_end_token_id": "<|audio_end|>",
                },
                audio_config={
                    "num_mel_bins": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "d_model": 32,
                    "n_window": 10,
                    "output_dim": 64,
                },
            ),
            template=chatml(QWEN_IMAGE),
        )
    ),
    "qwen3_omni_moe_thinker": FamilyCase(
        TinyBase(
            grid_processor(
                "Qwen3OmniMoeProcessor",
                "Qwen2VLImageProcessor",
                CHATML_TOKENS,
                "Qwen2VLVideoProcessor",
                WHISPER,
                patch=16,
                named=OMNI_NAMED,
                **QWEN_NAMES,
            ),
            grid_config(
                "qwen3_omni_moe_thinker",
                {**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
                {**EXPERTS, "rope_parameters": {**MROPE_PARAMETERS, "mrope_section": [3, 3, 2]}},
                {
                    "image_token_id": "<|image_pad|>",
                    "audio_token_id": "<|audio_pad|>",
                    "video_token_id": "<|video_pad|>",
                    "audio_start_token_id": "<|audio_start|>",
                    "vision_start_token_id": "<|vision_start|>",
                    "vision_end_token_id": "<|vision_end|>",
                },
                audio_config={
                    "num_mel_bins": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "d_model": 32,
                    "n_window": 10,
                    "output_dim": 64,
                    "downsample_hidden_size": 8,
                },
            ),
            template=chatml(QWEN_IMAGE),
        )
    ),
    "qwen4_exp": FamilyCase(
        TinyBase(
            QWEN3_PROCESSOR,
            grid_config(
                "qwen4_exp",
                QWEN3_TOWER,
                {
                    **QWEN3_5_TEXT,
                    **EXPERTS,
                    "layer_types": ["linear_attention", "indexed_attention"],
                    "shared_expert_intermediate_size": 32,
                    "hc_count": 2,
                    "hc_lowrank": 8,
                    "indexer_n_heads": 2,
                    "indexer_kv_heads": 1,
                    "indexer_head_dim": 16,
                    "indexer_budget": 512,
                    "indexer_compress_ratio": 64,  # the class loops over tokens that have this many before them
                    "ple_layer_ids": [1],
                    "ple_embed_dim": 64,
                    "heads_per_ngram": 2,
                    "ngram_vocab_size_base": 64,
                    "make_ngram_vocab_size_divisible_by": 8,
                    "split_ngram_parts": 1,
                },
                QWEN_IDS,
            ),
            template=chatml(QWEN_IMAGE, NO_THOUGHT),
        )
    ),
}
