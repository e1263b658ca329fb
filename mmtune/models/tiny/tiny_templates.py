"""Chat templates of the tiny bases; each renders the same text as the published template of its family."""

from __future__ import annotations

_PARTS = "{% for b in m.content %}{{ b.text if b.type == 'text' else IMAGE }}{% endfor %}"
_CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + _PARTS + "{{ '<|im_end|>\n' }}{% endfor %}"
_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
_ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% for b in m.content if b.type == 'image' %}{{ '<image>' }}"
    "{% endfor %}{% for b in m.content if b.type == 'text' %}{% if m.role == 'assistant' %}{% generation %}{{ '\n' + b.text }}"
    "{% endgeneration %}{% else %}{{ '\n' + b.text }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for b in m.content if b.type == 'image' %}{{ '<image>\n' }}{% endfor %}{% for b in m.content if b.type == 'text' %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ b.text + ' ' }}{% endgeneration %}{% else %}{{ b.text + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_LLAVA_NEXT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content[0].text + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' }}{% for b in m.content if b.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for b in m.content if b.type == 'text' %}{{ b.text }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}{% for b in m.content if b.type == 'text' %}{% generation %}{{ b.text }}{% endgeneration %}{% endfor %}"
    "{{ '</s>' }}{% endif %}{% endfor %}"
)
_UTTERANCES = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}" + _PARTS + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content[0].text + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' + (lead if loop.first else '') }}"
    "{% for b in m.content %}{{ (b.text | trim) if b.type == 'text' else '<start_of_image>' }}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' }}" + _PARTS + "{{ '[/INST]' }}"
    "{% else %}" + _PARTS + "{{ eos_token }}{% endif %}{% endfor %}"
)


def _with_image(template: str, image: str) -> str:
    return template.replace("IMAGE", repr(image))


TEMPLATES: dict[str, str | None] = {
    "llava": _LLAVA,
    "llava_pixtral": _with_image(_MISTRAL, "[IMG]"),
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": _ONEVISION,
    "qwen2_vl": _with_image(_SYSTEM + _CHATML + _CHATML_ASK, _QWEN),
    "qwen2_5_vl": _with_image(_SYSTEM + _CHATML + _CHATML_ASK, _QWEN),
    "qwen3_vl": _with_image(_CHATML + _CHATML_ASK, _QWEN),
    "idefics3": _with_image(_UTTERANCES, "<image>"),
    "smolvlm": _with_image(_UTTERANCES, "<image>"),
    "internvl": _with_image(_CHATML + _CHATML_ASK, "<IMG_CONTEXT>\n"),
    "gemma3": _GEMMA,
    "paligemma": None,
    "mistral3": _with_image(_MISTRAL, "[IMG]"),
}
"""Chat templates by name of the tiny base; None if the releases have none."""

REQUIRED_TEMPLATES = {"llava": "vicuna_v1", "paligemma": "paligemma"}
"""The `model.chat_template` that a recipe must set, because the release has no template or one without an end-of-turn token."""
