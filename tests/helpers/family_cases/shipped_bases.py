"""The families whose tiny checkpoints the package ships for rehearsals."""

from __future__ import annotations

from family_cases.family_case import FamilyCase
from mmtune.models.tiny.tiny_bases import BASES

_ENDS = {"idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>", "paligemma": "<eos>"}
_ENDS |= dict.fromkeys(("llava", "llava_pixtral", "llava_next", "mistral3"), "</s>")
_LEADING = dict.fromkeys(("llava", "llava_next", "idefics3", "smolvlm"), " ")

SHIPPED: dict[str, FamilyCase] = {
    name: FamilyCase(base, _ENDS.get(name, "<|im_end|>"), _LEADING.get(name, ""), needs_image=name == "paligemma")
    for name, base in BASES.items()
}
