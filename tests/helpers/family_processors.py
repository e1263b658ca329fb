"""A small real processor of every family, with a chat template like its family's that marks the answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import transformers as tf

from mmtune.models.tiny.tiny_bases import BASES, MERGES, TEXTS
from mmtune.models.tiny.tiny_models import byte_level_tokenizer

TURNS = (
    "{{%- for m in messages -%}}{{%- set lead = ('assistant' if m.role == 'assistant' else m.role) -%}}"
    "{{{{- '<|im_start|>' ~ lead ~ '\n' -}}}}"
    "{{%- if m.role == 'assistant' -%}}{{%- generation -%}}{{%- for b in m.content -%}}{{{{- b.text -}}}}{{%- endfor -%}}"
    "{{{{- '<|im_end|>' -}}}}{{%- endgeneration -%}}{{{{- '\n' -}}}}"
    "{{%- else -%}}{{%- for b in m.content -%}}{{{{- b.text if b.type == 'text' else '{image}' -}}}}{{%- endfor -%}}"
    "{{{{- '<|im_end|>\n' -}}}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\n' -}}}}{{%- endif -%}}"
)
UTTERANCES = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.role == 'assistant' %}{% generation %} {% for b in m.content %}{{ b.text }}{% endfor %}<end_of_utterance>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ '' if m.content[0].type == 'image' else ' ' }}"
    "{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>' }}{% endfor %}<end_of_utterance>{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else 'user') ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{% for b in m.content %}{{ b.text }}{% endfor %}<end_of_turn>"
    "{% endgeneration %}{{ '\n' }}{% else %}{% for b in m.content %}{{ b.text if b.type == 'text' else '<start_of_image>' }}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# PaliGemma's processor writes <bos> after the last image itself, and a newline at the end of a prompt.
PREFIX = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\n' }}{% generation %}"
    "{% for b in m.content %}{{ b.text }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% for b in m.content %}{{ b.text }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST]' }}{% for b in m.content %}{{ b.text if b.type == 'text' else '[IMG]' }}{% endfor %}{{ '[/INST]' }}"
    "{% endif %}{% endfor %}"
)


def byte_level(specials: tuple[str, ...], named: dict[str, str] | None = None, **names: str) -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges.

    Args:
        specials: special tokens.
        named: special tokens that the tokenizer also has as attributes, such as `image_token`.
        names: which of them are `bos_token` and so on.
    """
    others = [token for token in specials if token not in names.values()]
    traits = {"specials": list(dict.fromkeys([*specials, *(named or {}).values()])), "named": named or others, "adds_bos": False}
    traits |= {name.removesuffix("_token"): token for name, token in names.items()}
    return byte_level_tokenizer(traits, TEXTS, merges=MERGES)


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
MARKED = {
    "llava": "{{ bos_token }}" + UTTERANCES.replace("<|im_start|>", "").replace("<end_of_utterance>", "</s>"),
    "llava_pixtral": INSTRUCTION,
    "llava_next": INSTRUCTION.replace("[IMG]", "<image>\n"),
    "llava_onevision": TURNS.format(image="<image>\n"),
    "qwen2_vl": TURNS.format(image=QWEN),
    "qwen2_5_vl": TURNS.format(image=QWEN),
    "qwen3_vl": TURNS.format(image=QWEN),
    "idefics3": UTTERANCES,
    "smolvlm": UTTERANCES,
    "internvl": TURNS.format(image="<IMG_CONTEXT>\n"),
    "gemma3": GEMMA,
    "paligemma": PREFIX,
    "mistral3": INSTRUCTION,
}
"""A chat template with `{% generation %}` marks for each family."""


@cache
def _marked(family: str) -> tf.ProcessorMixin:
    processor = BASES[family].processor()
    processor.chat_template = MARKED[family]
    return processor


FAMILIES: dict[str, Callable[[], tf.ProcessorMixin]] = {family: partial(_marked, family) for family in BASES}
"""Builds a family's processor by name, once. Shared: leave them as they are, or take a deep copy."""
