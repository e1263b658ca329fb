"""Chat templates that behave like published ones: exact labels, or an error that names the line that fixes it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from dialects.chat_dialects import spans_of
from family_processors import byte_level

from mmtune.chat_templates.resolving import resolve_chat_template, set_chat_template, training_chat_template
from mmtune.data.encoding.encode import encode_prompt, encode_text
from mmtune.data.encoding.encoding_checks import check_chat_template
from mmtune.utils.errors import UserError

IMAGES_FIRST = (
    "{% for b in m.content if b.type == 'image' %}{{ IMAGE }}{% endfor %}"
    "{% for b in m.content if b.type == 'text' %}TEXT{% endfor %}"
)


def _said(image: str, text: str = "{{ b.text }}") -> str:
    return IMAGES_FIRST.replace("IMAGE", repr(image)).replace("TEXT", text)


def _turns(opens: str, question: str, answer: str, prompt: str, begins: str = "", ends: str = "") -> str:
    return (
        f"{begins}{{% for m in messages %}}{opens}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{question}{{% endif %}}"
        f"{ends}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


MARKED = "{% generation %}{{ b.text }}{% endgeneration %}"
LLAMA = ("<unk>", "<s>", "</s>", "<image>", "[INST]", "[/INST]")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
LLAVA_15 = _turns(
    "{{ m.role.upper() + ': ' }}",
    _said("<image>\n", "{{ b.text + ' ' }}"),
    _said("<image>\n", "{% generation %}{{ b.text + ' ' }}{% endgeneration %}"),
    "ASSISTANT:",
)
CAPITALS = "{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
INSTRUCTS = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
TODAY = "{{ bos_token }}[SYSTEM_PROMPT]Today is {{ strftime_now('%Y-%m-%d') }}.[/SYSTEM_PROMPT]"

EXACT: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "llava-next-mistral": (
        _turns("", "[INST] " + _said("<image>\n") + " [/INST]", "{{ ' ' }}" + _said("", MARKED) + "{{ eos_token }}", ""),
        LLAMA,
        "<image>",
        " {}</s>",
    ),
    "llava-next-chatml": (
        _turns(
            "{{ '<|im_start|>' + m.role + '\n' }}",
            _said("<image>\n"),
            _said("", MARKED),
            "{{ '<|im_start|>assistant\n' }}",
            ends="<|im_end|>",
        ),
        CHATML,
        "<image>",
        "{}<|im_end|>",
    ),
    "llava-onevision": (
        _turns(
            "{{ '<|im_start|>' + m.role + ' ' }}",
            _said("<image>", "{{ '\n' + b.text }}"),
            _said("", "{% generation %}{{ '\n' + b.text }}{% endgeneration %}"),
            "{{ '<|im_start|>assistant\n' }}",
            ends="<|im_end|>",
        ),
        CHATML,
        "<image>",
        "{}<|im_end|>",
    ),
    "qwen2-vl": (
        _turns(
            "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
            "{{ '<|im_start|>' + m.role + '\n' }}",
            _said("<|vision_start|><|image_pad|><|vision_end|>"),
            _said(""),
            "{{ '<|im_start|>assistant\n' }}",
            ends="<|im_end|>{{ '\n' }}",
        ),
        CHATML,
        "<|image_pad|>",
        "{}<|im_end|>",
    ),
    "smolvlm": (
        _turns(CAPITALS, _said("<image>"), _said(""), "Assistant:", begins="<|im_start|>", ends="<end_of_utterance>{{ '\n' }}"),
        (*CHATML, "<end_of_utterance>"),
        "<image>",
        " {}<end_of_utterance>",
    ),
    "gemma3": (
        _turns(
            "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}",
            _said("<start_of_image>", "{{ b.text | trim }}"),
            _said("", "{{ b.text | trim }}"),
            "{{ '<start_of_turn>model\n' }}",
            begins="{{ bos_token }}",
            ends="<end_of_turn>{{ '\n' }}",
        ),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<s>", "</s>"),
        "<start_of_image>",
        "{}<end_of_turn>",
    ),
    "mistral3": (
        _turns(INSTRUCTS, "[INST]" + _said("[IMG]") + "[/INST]", _said("") + "{{ eos_token }}", "", begins=TODAY),
        (*LLAMA, "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "[IMG]",
        "{}</s>",
    ),
    "marks-around-each-piece": (
        _turns("<|user|>", _said("<image>"), "{% for b in m.content %}" + MARKED + "{% endfor %}</s>", "<|user|>"),
        LLAMA,
        "<image>",
        "{}</s>",
    ),
}
"""Template, special tokens, image token, and the supervised text of an answer."""


def _processor(template: Any, specials: tuple[str, ...], image: str) -> tf.LlavaProcessor:
    names = {"eos_token": "</s>", "bos_token": "<s>"} if "</s>" in specials else {"eos_token": "<|im_end|>"}
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return tf.LlavaProcessor(
        images,
        byte_level(specials, **names),
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token=image,
        chat_template=template,
    )


def _messages(*answers: str) -> list[dict[str, Any]]:
    messages = []
    for number, answer in enumerate(answers):
        question: list[dict[str, str]] = [{"type": "text", "text": "what?"}]
        messages.append({"role": "user", "content": ([] if number else [{"type": "image", "image": "x"}]) + question})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


@pytest.mark.parametrize("name", EXACT)
def test_published_templates_give_exact_labels(name: str) -> None:
    template, specials, image, span = EXACT[name]
    processor = _processor(template, specials, image)
    set_chat_template(processor, training_chat_template(processor, processor.image_token))
    check_chat_template(processor)
    messages = _messages("a cat", "no\n\ndog")
    encoded = encode_text("r", messages, processor, [image * 4])
    assert spans_of(encoded, processor) == [span.format("a cat"), span.format("no\n\ndog")]
    # The prompt that the model is given is what stands before the first answer; OneVision's writes other white space there.
    prompt = encode_prompt("r", messages[2:3], processor)["input_ids"][0].tolist()
    whole = encode_text("r", messages[2:], processor, [])
    same = prompt == whole.input_ids[: whole.supervised.index(True)]
    assert same == (name != "llava-onevision")


@pytest.mark.parametrize("system", ["", "A chat between a curious human and an assistant. "])
def test_a_template_without_end_of_turn_is_an_error_that_names_the_shipped_one(system: str) -> None:
    """LLaVA-1.5's and LLaVA-NeXT-Vicuna's: a space behind the answer."""
    processor = _processor(system + LLAVA_15, LLAMA, "<image>")
    with pytest.raises(
        UserError, match=r"expected an end-of-turn token after an answer, got ' '.*model.chat_template: vicuna_v1,"
    ):
        training_chat_template(processor, processor.image_token)
    resolve_chat_template("vicuna_v1", processor.tokenizer)  # the advice leads somewhere


@pytest.mark.parametrize(
    ("template", "specials", "image", "named"),
    [
        (
            LLAVA_15.replace("ASSISTANT:", "ROBOT:").replace("m.role.upper()", "'ROBOT'"),
            LLAMA,
            "<image>",
            "mistral or vicuna_v1 if",
        ),
        (EXACT["llava-next-chatml"][0].replace("<|im_end|>", ""), CHATML, "<image>", "model.chat_template: chatml, which"),
        (
            EXACT["qwen2-vl"][0].replace("<|im_end|>", ""),
            CHATML,
            "<|image_pad|>",
            "FILE.jinja.*no shipped template works with this",
        ),
        ("{{ messages[0].content + 'x' }}", LLAMA, "<image>", "fails on this conversation.*mistral or vicuna_v1 if"),
        (
            EXACT["qwen2-vl"][0].replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
            CHATML,
            "<|image_pad|>",
            "think",
        ),
        (None, LLAMA, "<image>", "the model has no chat template; set model.chat_template to mistral or vicuna_v1 if"),
        ({"tool_use": LLAVA_15, "rag": LLAVA_15}, LLAMA, "<image>", "expected a chat template named default, got rag, tool_use"),
    ],
)
def test_an_unsuitable_template_is_an_error_that_names_a_suitable_one(
    template: Any, specials: Any, image: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        training_chat_template(_processor(template, specials, image), image)


def test_the_default_of_several_templates_is_used_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    template, specials, image, _ = EXACT["llava-next-chatml"]
    assert training_chat_template(_processor({"default": template, "rag": "x"}, specials, image), image) == template
    assert "chat template: using default, of default, rag" in capsys.readouterr().out
    processor = _processor(None, specials, image)
    processor.tokenizer.chat_template = template  # in tokenizer_config.json alone
    assert training_chat_template(processor, processor.image_token) == template


def test_an_unsupported_system_message_is_an_error_of_its_row() -> None:
    """Some templates add a system message to a string, as if it had no blocks; others refuse it."""
    for opens, reason in (
        (
            "{% if m.role == 'system' %}{{ m.content + '\n' }}{% endif %}",
            "fails on this conversation at line 1: can only concatenate",
        ),
        ("{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}", "rejects this conversation: no system"),
    ):
        template = _turns(opens, _said("<image>"), _said("", MARKED) + "</s>", "<|user|>")
        processor = _processor(template, LLAMA, "<image>")
        messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *_messages("yes")]
        with pytest.raises(UserError, match=f"r: messages: the chat template {reason}"):
            encode_text("r", messages, processor, ["<image>"])


def test_a_template_that_ends_its_answers_differently_is_rejected() -> None:
    template = _turns("<|user|>", _said("<image>"), _said("", MARKED) + "{{ '</s>' if loop.last else '<s>' }}", "<|user|>")
    processor = _processor(template, LLAMA, "<image>")
    with pytest.raises(UserError, match="the same end-of-turn token after every answer, got '</s>', '<s>'"):
        encode_text("r", _messages("a cat", "no"), processor, ["<image>"])
