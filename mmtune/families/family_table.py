"""The model families that differ from most, and the image-text models that cannot be tuned; available without torch.

A model of any other `model_type` is handled by `Family`, which finds everything in the structure of model and processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from mmtune.families.family import Family
from mmtune.families.fixed.deepseek import DEEPSEEK_VL_HYBRID, JANUS
from mmtune.families.fixed.encoder_free import CHAMELEON, EMU3, GEMMA4_UNIFIED
from mmtune.families.fixed.gemma3 import GEMMA3, GEMMA3N
from mmtune.families.fixed.llava import LLAVA, VIDEO_LLAVA
from mmtune.families.fixed.paligemma import PALIGEMMA
from mmtune.families.grids.cosmos3_edge import COSMOS3_EDGE
from mmtune.families.grids.ernie_vl import ERNIE_VL
from mmtune.families.grids.hunyuan_vl import HUNYUAN_VL
from mmtune.families.grids.inkling import INKLING
from mmtune.families.grids.nemotron_omni import NEMOTRON_OMNI
from mmtune.families.grids.pixtral import PIXTRAL
from mmtune.families.grids.qwen_vl import QWEN_VL
from mmtune.families.separate.blip2 import BLIP2, INSTRUCT_BLIP
from mmtune.families.separate.florence2 import FLORENCE2
from mmtune.families.separate.idefics2 import IDEFICS2
from mmtune.families.separate.kosmos2 import KOSMOS2
from mmtune.families.separate.mllama import MLLAMA
from mmtune.families.tiles.got_ocr import GOT_OCR2
from mmtune.families.tiles.granite_vision import GRANITE4_VISION
from mmtune.families.tiles.idefics3 import IDEFICS3
from mmtune.families.tiles.internvl import INTERNVL, QIANFAN_OCR
from mmtune.families.tiles.llama4 import LLAMA4
from mmtune.families.tiles.llava_next import LLAVA_NEXT, LLAVA_ONEVISION
from mmtune.families.tiles.minicpm import MINICPM
from mmtune.families.tiles.molmo2 import MOLMO2
from mmtune.families.tiles.perception_lm import PERCEPTION_LM
from mmtune.families.tiles.unlimited_ocr import UNLIMITED_OCR

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        *(LLAVA, VIDEO_LLAVA, GEMMA3, GEMMA3N, PALIGEMMA, DEEPSEEK_VL_HYBRID, JANUS),
        *(GEMMA4_UNIFIED, CHAMELEON, EMU3),
        *(LLAVA_NEXT, LLAVA_ONEVISION, IDEFICS3, INTERNVL, LLAMA4, GRANITE4_VISION),
        *(GOT_OCR2, QIANFAN_OCR, MOLMO2, PERCEPTION_LM, MINICPM, UNLIMITED_OCR),
        *(QWEN_VL, PIXTRAL, COSMOS3_EDGE, ERNIE_VL, HUNYUAN_VL, INKLING, NEMOTRON_OMNI),
        *(IDEFICS2, MLLAMA, BLIP2, INSTRUCT_BLIP, FLORENCE2, KOSMOS2),
    )
}
"""The families with an entry of their own, by name."""

PLAIN = Family("plain")
"""Every other family."""

ASSEMBLED_TYPE = LLAVA.model_types[0]
"""`model_type` of models that are assembled from a vision tower and a language model, and of the built-in one."""

OUT_OF_SCOPE: Mapping[str, str] = {
    "evolla": "it reads proteins",
    "pi0": "it is a robot policy",
    "mistral4": "it is a language model without a vision tower",
    "diffusion_gemma": "it generates text by diffusion, without a next-token loss",
}
"""Types of transformers' image-text mapping that are no image-text chat models, with what they are."""

NOT_SUPPORTED: Mapping[str, str] = {
    "blip": "its class gives no access to its output head and mixes label smoothing into its loss; it is a captioning model",
    "fuyu": "its processor moves the one image before the text, and neither it nor its release has a chat template",
    "git": "it puts image features before the tokens inside its class, so that logits and labels have different lengths",
    "instructblipvideo": "its processor takes videos and no images",
    "pix2struct": "a question is drawn into the image, and its decoder reads no prompt",
    "pp_chart2table": "its processor expands no image: the chat template writes the tokens of one image of one size",
    "pp_formulanet": "it reads formulas: its processor takes an image and no text",
    "shieldgemma2": "its processor takes no text: it asks about an image its own questions about policies",
    "udop": "it reads words with their boxes, which a row of questions and answers does not have",
    "vision-encoder-decoder": "its encoder reads an image and no text, so that there is no place for a question",
}
"""Types of image-text chat models that cannot be tuned, with the reason."""


def family_of(model_type: str) -> Family:
    """The family of a model by the `model_type` of its config."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), PLAIN)


def family_of_processor(processor: Any) -> Family:
    """The family of a processor by its class, or the nearest parent class that an entry names."""
    processor_class: Any = type(processor)
    return _family_of_class(processor_class)


@lru_cache
def _family_of_class(processor_class: type[Any]) -> Family:
    for name in (each.__name__ for each in processor_class.__mro__):
        for family in FAMILIES.values():
            if name in family.processors:
                return family
    return PLAIN
