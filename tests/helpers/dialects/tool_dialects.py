"""Chat templates with tool calls, in the ways of published ones, and a processor for each. The wording is their own."""

from __future__ import annotations

import re
from functools import cache

import transformers as tf
from family_processors import byte_level

from dialects.chat_dialects import SAID

HERMES = (  # Qwen's way: schemas in the system turn, calls in <tool_call>, consecutive results in one user turn
    "{%- macro schemas() -%}{{- 'Functions you can call:\n<tools>' -}}"
    "{%- for t in tools -%}{{- '\n' ~ t | tojson -}}{%- endfor -%}"
    "{{- '\n</tools>' -}}{%- endmacro -%}"
    "{%- if tools -%}{{- '<|im_start|>system\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- said(messages[0]) ~ '\n\n' -}}{%- endif -%}{{- schemas() ~ '<|im_end|>\n' -}}"
    "{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\n' ~ said(messages[0]) ~ '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' ~ said(m) ~ '<|im_end|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}{{- '<|im_start|>assistant\n' -}}{%- generation -%}{{- said(m) -}}"
    "{%- for c in m.tool_calls -%}{{- '\n' if m.content or not loop.first -}}"
    '{{- \'<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' -}}'
    "{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson -}}{{- '}\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endgeneration -%}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\n<tool_response>\n' ~ said(m) ~ '\n</tool_response>' -}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
MISTRAL = (  # calls as one JSON list with ids, which the template demands
    "{{- bos_token -}}{%- if tools -%}{{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ said(m) ~ '[/SYSTEM_PROMPT]' -}}"
    "{%- elif m.role == 'user' -%}{{- '[INST] ' ~ said(m) ~ '[/INST]' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{{- '[TOOL_RESULTS] {\"content\": ' ~ said(m) | tojson ~ ', \"call_id\": \"' ~ m.tool_call_id ~ '\"}[/TOOL_RESULTS]' -}}"
    "{%- elif m.tool_calls -%}{%- generation -%}{{- (' ' ~ said(m)) if m.content else '' -}}{{- '[TOOL_CALLS] [' -}}"
    "{%- for c in m.tool_calls -%}{%- if c.id is not defined -%}{{- raise_exception('a call has no id') -}}{%- endif -%}"
    "{{- (c.function | tojson)[:-1] ~ ', \"id\": \"' ~ c.id ~ '\"}' ~ ('' if loop.last else ', ') -}}{%- endfor -%}"
    "{{- ']' ~ eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{%- generation -%}{{- ' ' ~ said(m) ~ eos_token -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)
LLAMA = (  # schemas in the first user turn, one call in a turn, results as JSON
    "{%- macro head(role) -%}{{- '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' -}}{%- endmacro -%}{{- bos_token -}}"
    "{%- set ns = namespace(schemas=tools) -%}{%- for m in messages -%}"
    "{%- if m.tool_calls -%}{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call in a turn') -}}{%- endif -%}"
    "{{- head('assistant') -}}{%- generation -%}{{- said(m) ~ '{\"name\": \"' ~ m.tool_calls[0].function.name -}}"
    "{{- '\", \"parameters\": ' ~ m.tool_calls[0].function.arguments | tojson ~ '}<|eot_id|>' -}}{%- endgeneration -%}"
    "{%- elif m.role == 'assistant' -%}{{- head('assistant') -}}"
    "{%- generation -%}{{- said(m) ~ '<|eot_id|>' -}}{%- endgeneration -%}"
    "{%- elif m.role == 'tool' -%}{{- head('ipython') ~ said(m) | tojson ~ '<|eot_id|>' -}}"
    "{%- else -%}{{- head(m.role) -}}{%- if ns.schemas and m.role == 'user' -%}{{- 'You can call these functions.\n\n' -}}"
    "{%- for t in ns.schemas -%}{{- t | tojson(indent=4) ~ '\n\n' -}}{%- endfor -%}{%- set ns.schemas = none -%}{%- endif -%}"
    "{{- said(m) ~ '<|eot_id|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- head('assistant') -}}{%- endif -%}"
)
TEXT_ARGUMENTS = (  # arguments are concatenated, so an object fails
    "{%- if tools -%}{{- '<|im_start|>tools\n' ~ tools | tojson ~ '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- said(m) -}}"
    "{%- for c in m.tool_calls -%}{{- '<call>' + c.function.name + '\n' + c.function.arguments + '</call>' -}}{%- endfor -%}"
    "{{- '<|im_end|>' -}}{%- endgeneration -%}{%- else -%}{{- said(m) ~ '<|im_end|>' -}}{%- endif -%}{{- '\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# said() of these reads the text of a call or a result as a string too.
_TEXT = "{%- if m.content is string -%}{{- m.content -}}{%- else -%}"
SAID_OR_TEXT = SAID.replace("{%- for b", _TEXT + "{%- for b").replace("{%- endmacro -%}", "{%- endif -%}{%- endmacro -%}")

TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA, "text-arguments": TEXT_ARGUMENTS}
ENDS = {"hermes": "<|im_end|>", "mistral": "</s>", "llama": "<|eot_id|>", "text-arguments": "<|im_end|>"}
SPECIALS = {
    "hermes": ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "mistral": (
        *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "text-arguments": ("<|im_start|>", "<|im_end|>", "<call>", "</call>"),
}
NAMES = {
    "hermes": {"eos_token": "<|im_end|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "text-arguments": {"eos_token": "<|im_end|>"},
}


def processor_with(template: str, specials: tuple[str, ...], image: str = "<image>", **names: str) -> tf.LlavaProcessor:
    """A processor with a chat template, and a byte-level tokenizer with these special tokens."""
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = byte_level(tuple(dict.fromkeys((*specials, image))), **names)
    tokenizer.chat_template = template
    return tf.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", image_token=image, chat_template=template
    )


@cache
def tool_processor(name: str, marked: bool = True) -> tf.LlavaProcessor:
    """A processor of one of `TEMPLATES`, with its `{% generation %}` tags or without."""
    template = (SAID_OR_TEXT + TEMPLATES[name]).replace("IMAGE", repr("<image>"))
    if not marked:
        template = re.sub(r"\{%-? (end)?generation -?%\}", "", template)
    return processor_with(template, SPECIALS[name], **NAMES[name])
