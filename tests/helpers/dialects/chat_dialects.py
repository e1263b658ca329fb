"""Chat templates similar to published ones, written with `{% generation %}` tags, and a processor for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import transformers as tf
from family_processors import byte_level

from mmtune.data.encoding.encode import EncodedText

SAID = (
    "{%- macro said(m) -%}{%- for b in m.content -%}{{- b.text if b.type == 'text' else IMAGE -}}{%- endfor -%}{%- endmacro -%}"
)


@dataclass(frozen=True)
class Dialect:
    """A way of writing conversations.

    Attributes:
        template: calls `said(m)` for a message's content; `IMAGE` there becomes `image`.
        specials: the special tokens, bos, eos and pad among them.
        end: what ends an answer.
        lead: what the model writes before an answer.
        image: what the template writes for an image.
        token: the image token in that.
        trims: the template takes white space off an answer.
        system: it has a place for a system message.
    """

    template: str
    specials: tuple[str, ...]
    end: str
    lead: str = ""
    image: str = "<image>"
    token: str = "<image>"
    bos: str | None = None
    eos: str | None = None
    trims: bool = False
    system: bool = True

    @property
    def marked(self) -> str:
        return (SAID + self.template).replace("IMAGE", repr(self.image))

    @property
    def unmarked(self) -> str:
        return re.sub(r"\{%-? (end)?generation -?%\}", "", self.marked)


def _chatml(system: str) -> str:
    return (
        "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\n" + system + "<|im_end|>\n' -}}{%- endif -%}"
        "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\n' -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- said(m) ~ '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
        "{%- else -%}{{- said(m) ~ '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )


def _headed(opens: str, closes: str, after: str, end: str, trim: str) -> str:
    """One header a message, which names its role."""
    return (
        "{{- bos_token -}}{%- for m in messages -%}{{- '" + opens + "' ~ m.role ~ '" + closes + "' -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- said(m)" + trim + " ~ '" + end + "' -}}{%- endgeneration -%}"
        "{%- else -%}{{- said(m)" + trim + " ~ '" + end + "' -}}{%- endif -%}{{- '" + after + "' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '" + opens + "assistant" + closes + "' -}}{%- endif -%}"
    )


DEEPSEEK = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

DIALECTS = {
    "qwen2.5-vl": Dialect(
        _chatml("You are a helpful assistant."),
        (*IM, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        "<|im_end|>",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        token="<|image_pad|>",
        eos="<|im_end|>",
    ),
    "internvl": Dialect(
        _chatml("You read pictures."),
        (*IM, "<img>", "</img>", "<IMG_CONTEXT>"),
        "<|im_end|>",
        image="<IMG_CONTEXT>\n",
        token="<IMG_CONTEXT>",
        eos="<|im_end|>",
    ),
    "llama-3": Dialect(
        _headed("<|start_header_id|>", "<|end_header_id|>\n\n", "", "<|eot_id|>", " | trim"),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        trims=True,
    ),
    "llama-4": Dialect(
        _headed("<|header_start|>", "<|header_end|>\n\n", "", "<|eot|>", ""),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
        "<|eot|>",
        bos="<|begin_of_text|>",
        eos="<|eot|>",
    ),
    "granite": Dialect(
        _headed("<|start_of_role|>", "<|end_of_role|>", "\n", "<|end_of_text|>", ""),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    "zephyr": Dialect(
        _headed("<|", "|>\n", "\n", "</s>", "").replace("{{- bos_token -}}", ""),
        ("<unk>", "<s>", "</s>"),
        "</s>",
        bos="<s>",
        eos="</s>",
    ),
    "phi-3": Dialect(
        _headed("<|", "|>\n", "\n", "<|end|>", "")
        .replace("{{- bos_token -}}", "")
        .replace("{%- if add_generation_prompt -%}", "{%- if not add_generation_prompt -%}{{- eos_token -}}{%- else -%}"),
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        eos="<|endoftext|>",
    ),
    "phi-4": Dialect(
        _headed("<|im_start|>", "<|im_sep|>", "", "<|im_end|>", "").replace("{{- bos_token -}}", ""),
        (*IM, "<|im_sep|>"),
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "gemma-3": Dialect(
        "{{- bos_token -}}{%- set first = messages[0] if messages[0].role == 'system' -%}"
        "{%- for m in (messages[1:] if first else messages) -%}"
        "{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else 'user') ~ '\n' -}}"
        "{{- said(first) ~ '\n\n' if first and loop.first else '' -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- said(m) | trim ~ '<end_of_turn>\n' -}}{%- endgeneration -%}"
        "{%- else -%}{{- said(m) | trim ~ '<end_of_turn>\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
        "<end_of_turn>",
        image="<start_of_image>",
        token="<start_of_image>",
        bos="<bos>",
        eos="<eos>",
        trims=True,
    ),
    "mistral-v3": Dialect(
        "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{- ' ' ~ said(m) ~ eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- '[INST] ' ~ said(m) ~ '[/INST]' -}}{%- endif -%}{%- endfor -%}",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        lead=" ",
        bos="<s>",
        eos="</s>",
        system=False,
    ),
    "mistral-v7": Dialect(
        "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{- said(m) ~ eos_token -}}{%- endgeneration -%}"
        "{%- elif m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' ~ said(m) ~ '[/SYSTEM_PROMPT]' -}}"
        "{%- else -%}{{- '[INST]' ~ said(m) ~ '[/INST]' -}}{%- endif -%}{%- endfor -%}",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"),
        "</s>",
        image="[IMG]",
        token="[IMG]",
        bos="<s>",
        eos="</s>",
    ),
    "deepseek": Dialect(
        "{{- bos_token -}}{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{- 'Assistant:' -}}"
        "{%- generation -%}{{- ' ' ~ said(m) ~ eos_token -}}{%- endgeneration -%}"
        "{%- else -%}{{- ('User: ' if m.role == 'user' else '') ~ said(m) ~ '\n\n' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}",
        DEEPSEEK,
        DEEPSEEK[1],
        lead=" ",
        bos=DEEPSEEK[0],
        eos=DEEPSEEK[1],
    ),
    "smolvlm": Dialect(
        "<|im_start|>{%- for m in messages -%}{{- m.role | capitalize ~ ':' -}}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{- ' ' ~ said(m) ~ '<end_of_utterance>' -}}{%- endgeneration -%}{{- '\n' -}}"
        "{%- else -%}{{- ('' if m.content[0].type == 'image' else ' ') ~ said(m) ~ '<end_of_utterance>\n' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}",
        (*IM, "<end_of_utterance>", "<fake_token_around_image>"),
        "<end_of_utterance>",
        lead=" ",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
    ),
    "command-r": Dialect(
        "{{- bos_token -}}{%- for m in messages -%}{{- '<|START_OF_TURN_TOKEN|>' -}}"
        "{{- {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- said(m) ~ '<|END_OF_TURN_TOKEN|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- said(m) ~ '<|END_OF_TURN_TOKEN|>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}",
        (
            "<BOS_TOKEN>",
            "<EOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
    ),
}


@cache
def dialect_processor(name: str, marked: bool = True) -> tf.LlavaProcessor:
    """A processor whose chat template is the dialect's, with its marks or without."""
    dialect = DIALECTS[name]
    names = {key: token for key, token in (("bos_token", dialect.bos), ("eos_token", dialect.eos)) if token}
    tokenizer = byte_level(tuple(dict.fromkeys((*dialect.specials, dialect.token))), **names)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    template = dialect.marked if marked else dialect.unmarked
    return tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token=dialect.token,
        chat_template=template,
    )


def spans_of(encoded: EncodedText, processor: Any) -> list[str]:
    """The supervised tokens, decoded span by span."""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    spans = [[token for token, _ in group] for on, group in groupby(pairs, lambda pair: pair[1]) if on]
    return [processor.tokenizer.decode(span) for span in spans]
