"""DeepSeek-VL with a second vision tower, and Janus, which also generates images."""

from __future__ import annotations

from mmtune.families.family import Family

DEEPSEEK_VL_HYBRID = Family(
    "deepseek_vl_hybrid",
    model_types=("deepseek_vl_hybrid",),
    # The aligner joins the features of both towers; the others bring those of the second tower to the size of the first's.
    projector=(
        "model.aligner",
        "model.high_res_vision_proj",
        "model.high_res_vision_neck",
        "model.high_res_vision_alpha",
    ),
    encoder_extras=("model.high_res_vision_model",),
)
JANUS = Family(
    "janus",
    model_types=("janus",),
    projector=("model.aligner",),
    # These write images; text is generated without them.
    others=("model.vqmodel", "model.generation_embeddings", "model.generation_aligner", "model.generation_head"),
)
