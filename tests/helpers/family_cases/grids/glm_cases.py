"""GLM's families, whose answers end with the token of the next turn."""

from __future__ import annotations

from typing import Any

from family_cases.family_case import FamilyCase
from family_cases.grids.grid_bases import PARTS, grid_config, grid_processor
from mmtune.models.tiny.tiny_bases import MROPE_PARAMETERS, TinyBase

GLM_TOKENS = (
    *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
    *("<think>", "</think>"),
)
GLM_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GLM_NAMES = {"pad": "<|endoftext|>", "eos": "<|endoftext|>"}
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    + PARTS.replace("IMAGE", "'<|begin_of_image|><|image|><|end_of_image|>'")
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GLM_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "image_size": 56,
    "intermediate_size": 128,
    "out_hidden_size": 64,
}
GLM_TEXT = {"rope_parameters": {**MROPE_PARAMETERS, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}}


def glm_case(
    family: str,
    kind: str = "Glm4vProcessor",
    images: str = "Glm4vImageProcessor",
    video: str = "Glm4vVideoProcessor",
    **text: Any,
) -> FamilyCase:
    base = TinyBase(
        grid_processor(kind, images, GLM_TOKENS, video, **GLM_NAMES),
        grid_config(family, GLM_TOWER, {**GLM_TEXT, **text}, GLM_IDS),
        template=GLM_TEMPLATE,
        required_template="glm",
    )
    return FamilyCase(base, end="<|user|>")


GLM_CASES: dict[str, FamilyCase] = {
    "glm4v": glm_case("glm4v"),
    "glm46v": glm_case("glm46v", "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor", model_type="glm4v_text"),
    "glm_ocr": FamilyCase(
        TinyBase(
            grid_processor("Glm46VProcessor", "Glm46VImageProcessor", GLM_TOKENS, "Glm46VVideoProcessor", **GLM_NAMES),
            grid_config("glm_ocr", GLM_TOWER, {"rope_parameters": MROPE_PARAMETERS}, GLM_IDS),
            template=GLM_TEMPLATE,
            required_template="glm",
        ),
        end="<|user|>",
    ),
    "glmga": glm_case("glmga", "Glm46VProcessor", "GlmgaImageProcessor", "GlmgaVideoProcessor", model_type="glm4v_text"),
    "glm4v_moe": glm_case(
        "glm4v_moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
}
