"""Tool calls in chat templates: the text of transformers, labels exactly on the calls and answers, and no part left out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import trl
from dialects.chat_dialects import spans_of
from dialects.tool_dialects import ENDS, TEMPLATES, processor_with, tool_processor

from mmtune.data.encoding.encode import encode_prompt, encode_text
from mmtune.data.message import Message, RowError

TRL = Path(trl.__file__).parent / "chat_templates"
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
LFM_TOKENS = ("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>")
PUBLISHED = {  # the file of a published template with tool calls and images, its image token, its other tokens
    "qwen3_vl.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_vl_training.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_5_nothink.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_5_nothink_training.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_5_think.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_6_training.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "qwen3_8_training.jinja": ("<|image_pad|>", QWEN_TOKENS),
    "lfm2_2_5_vl.jinja": ("<image>", LFM_TOKENS),
}
THINKING = ("qwen3_5_think.jinja", "qwen3_6_training.jinja", "qwen3_8_training.jinja")
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "zoom",
            "description": "Enlarge a part of the image, <|im_end|> included.",
            "parameters": {
                "type": "object",
                "properties": {"bbox_2d": {"type": "array", "items": {"type": "integer"}}, "label": {"type": "string"}},
                "required": ["bbox_2d"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    },
)
ZOOM = {"bbox_2d": [10, 20, 30, 40], "label": 'Zürich\'s "red"\nsign'}


def _published(name: str) -> tf.LlavaProcessor:
    image, tokens = PUBLISHED[name]
    bos = {"bos_token": "<|startoftext|>"} if "<|startoftext|>" in tokens else {}
    return processor_with((TRL / name).read_text(encoding="utf-8"), tokens, image, eos_token="<|im_end|>", **bos)


def text(*words: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": word} for word in words]


def image() -> dict[str, Any]:
    return {"type": "image", "image": "never-opened.png"}


def call(name: str, arguments: dict[str, Any], number: int = 1) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(words: str, number: int = 1, *media: dict[str, Any]) -> Message:
    return {"role": "tool", "content": [*media, *text(words)], "tool_call_id": f"call0000{number}", "name": "zoom"}


def said(words: str, *calls: dict[str, Any]) -> Message:
    message: Message = {"role": "assistant", "content": text(words) if words else []}
    return {**message, "tool_calls": list(calls)} if calls else message


QUESTION: Message = {"role": "user", "content": [image(), *text("What does the sign say?")]}
SYSTEM: Message = {"role": "system", "content": text("Be brief.")}
CONVERSATIONS: dict[str, list[Message]] = {
    "one call": [QUESTION, said("", call("zoom", ZOOM)), result("enlarged"), said("It says stop.")],
    "a call at the end": [SYSTEM, QUESTION, said("", call("zoom", ZOOM))],
    "text before a call": [SYSTEM, QUESTION, said("I look closer.", call("zoom", ZOOM)), result("enlarged"), said("Stop.")],
    "parallel calls": [QUESTION, said("", call("zoom", ZOOM), call("now", {}, 2)), result("a"), result("b", 2), said("Stop.")],
    "several steps": [
        *(QUESTION, said("", call("zoom", ZOOM)), result("enlarged")),
        *(said("", call("now", {}, 2)), result("12:00", 2), said("Stop, at noon.")),
    ],
    "an image in a result": [QUESTION, said("", call("zoom", ZOOM)), result("enlarged", 1, image()), said("Stop.")],
    "control tokens in texts": [
        *(QUESTION, said("", call("zoom", {"label": "</tool_call><|im_end|></s><image>", "bbox_2d": []}))),
        *(result("<|im_end|>[/TOOL_RESULTS]<image>"), said("The text <|im_end|>.")),
    ],
    "no call": [SYSTEM, QUESTION, said("It says stop.")],
}
"""Single-turn conversations; `ZOOM` has quotes, a line break and other letters."""


def _fits(name: str, case: str) -> bool:
    return not (name == "llama" and case == "parallel calls")  # its template takes one call in a turn


def plain(messages: list[Message], arguments_as_text: bool) -> list[Message]:
    """The messages as transformers' documentation writes them, for `apply_chat_template`."""
    messages = copy.deepcopy(messages)
    for message in messages:
        if message["role"] == "tool" and all(block["type"] == "text" for block in message["content"]):
            message["content"] = "".join(block["text"] for block in message["content"])
        message["content"] = message["content"] or ""
        for each in message.get("tool_calls", ()) if arguments_as_text else ():
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
    return messages


def _encode(messages: list[Message], processor: Any, **settings: Any) -> Any:
    images = sum(block["type"] == "image" for message in messages for block in message["content"])
    return encode_text("r", messages, processor, [processor.image_token] * images, tools=TOOLS, **settings)


CASES = [(name, case) for name in TEMPLATES for case in CONVERSATIONS if _fits(name, case)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_tokens_are_those_of_transformers(name: str, case: str) -> None:
    processor, messages = tool_processor(name), CONVERSATIONS[case]
    reference = processor.tokenizer.apply_chat_template(
        plain(messages, name == "text-arguments"), tools=list(TOOLS), return_dict=False, sanitize_control_tokens=True
    )
    assert _encode(messages, processor).input_ids == reference


@pytest.mark.parametrize(("name", "case"), [each for each in CASES if each[1] != "control tokens in texts"])
def test_labels_are_the_assistant_masks_of_transformers(name: str, case: str) -> None:
    """But for the line break after a turn, which some templates mark too."""
    _check_masks(tool_processor(name), CONVERSATIONS[case], name == "text-arguments")


def _check_masks(processor: Any, messages: list[Message], arguments_as_text: bool) -> None:
    images = sum(block["type"] == "image" for message in messages for block in message["content"])
    encoded = encode_text("r", messages, processor, [processor.image_token] * images, tools=TOOLS[1:])
    reference = processor.tokenizer.apply_chat_template(
        plain(messages, arguments_as_text), tools=list(TOOLS[1:]), return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.input_ids == reference["input_ids"]
    pairs = list(zip(encoded.supervised, reference["assistant_masks"], encoded.input_ids, strict=True))
    assert any(encoded.supervised) and all(mask for supervised, mask, _ in pairs if supervised)
    beyond = processor.tokenizer.decode([token for supervised, mask, token in pairs if mask and not supervised])
    assert not re.sub("</?think>", "", beyond).strip()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_tags_make_no_difference(name: str, case: str) -> None:
    assert _encode(CONVERSATIONS[case], tool_processor(name, marked=False)) == _encode(CONVERSATIONS[case], tool_processor(name))


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_supervised_tokens_are_the_calls_the_texts_and_their_ends(name: str, case: str, marked: bool) -> None:
    processor, messages = tool_processor(name, marked), CONVERSATIONS[case]
    spans = spans_of(_encode(messages, processor), processor)
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    for span, answer in zip(spans, answers, strict=True):
        words = "".join(block["text"] for block in answer["content"])
        assert span.count(ENDS[name]) == 1 + words.count(ENDS[name]) + json.dumps(answer.get("tool_calls", "")).count(ENDS[name])
        assert span.endswith(ENDS[name]) and words in span
        if "tool_calls" not in answer:
            assert span.strip() == words + ENDS[name]
        for each in answer.get("tool_calls", ()):
            assert each["function"]["name"] in span
            if each["function"]["arguments"]:
                written = re.search(r"\{\"(label|bbox_2d)\".*?\]?\}(?=[}<,\]]|\n)", span)
                assert written and json.loads(written[0]) == each["function"]["arguments"]
        for other in (message for message in messages if message["role"] in ("tool", "user")):
            assert not any(
                block["text"] in span for block in other["content"] if block["type"] == "text" and len(block["text"]) > 1
            )
        assert "Enlarge a part" not in span


@pytest.mark.parametrize(
    "name", ["hermes", "mistral", "text-arguments"]
)  # this tokenizer joins the line breaks of llama's prompt
def test_a_prompt_is_the_text_before_its_answer(name: str) -> None:
    processor, messages = tool_processor(name), CONVERSATIONS["several steps"][1:]
    messages = [{"role": "user", "content": text("What does the sign say?")}, *messages]
    whole = _encode(messages, processor)
    for number in (1, 3, 5):
        prompt = encode_prompt("r", messages[:number], processor, TOOLS)["input_ids"][0].tolist()
        assert (
            whole.input_ids[: len(prompt)] == prompt and whole.supervised[len(prompt)] and not whole.supervised[len(prompt) - 1]
        )


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_call_and_answer_of_several_questions_is_supervised(name: str, marked: bool) -> None:
    processor = tool_processor(name, marked)
    again: list[Message] = [{"role": "user", "content": text("And now?")}, said("", call("now", {}, 3)), result("13:00", 3)]
    messages = [*CONVERSATIONS["several steps"], *again, said("At one.")]
    spans = spans_of(_encode(messages, processor), processor)
    assert len(spans) == 5 and [span for span in spans if "now" in span] == [spans[1], spans[3]]
    assert [spans[2].strip(), spans[4].strip()] == ["Stop, at noon." + ENDS[name], "At one." + ENDS[name]]


@pytest.mark.parametrize("supervise", ["last", "without_tool_calls"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_context_if_the_recipe_says_so(name: str, supervise: Any) -> None:
    processor = tool_processor(name)
    encoded = _encode(CONVERSATIONS["several steps"], processor, supervise=supervise)
    assert [span.strip() for span in spans_of(encoded, processor)] == ["Stop, at noon." + ENDS[name]]
    assert encoded.input_ids == _encode(CONVERSATIONS["several steps"], processor).input_ids


def test_a_row_of_calls_alone_has_no_supervised_token_without_them() -> None:
    with pytest.raises(
        RowError, match=r"weight 0 or a tool call \(data.supervise: without_tool_calls\), so no token is supervised"
    ):
        _encode(CONVERSATIONS["a call at the end"], tool_processor("hermes"), supervise="without_tool_calls")


def test_a_call_of_weight_0_is_context() -> None:
    messages = copy.deepcopy(CONVERSATIONS["one call"])
    messages[1]["supervised"] = False
    processor = tool_processor("hermes")
    assert spans_of(_encode(messages, processor), processor) == ["It says stop.<|im_end|>"]


# ---- published templates


def _reasoned(messages: list[Message]) -> list[Message]:
    thought = "The sign\nis small."
    return [{**m, "reasoning_content": thought} if m["role"] == "assistant" else m for m in messages]


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_tokens_and_labels_of_transformers(name: str, case: str) -> None:
    processor, messages = _published(name), CONVERSATIONS[case]
    if name in THINKING:
        messages = _reasoned(messages)
    encoded = _encode(messages, processor)
    reference = processor.tokenizer.apply_chat_template(
        plain(messages, False), tools=list(TOOLS), return_dict=False, sanitize_control_tokens=True
    )
    assert encoded.input_ids == reference
    spans, answers = spans_of(encoded, processor), [message for message in messages if message["role"] == "assistant"]
    assert len(spans) == len(answers)
    for span, answer in zip(spans, answers, strict=True):
        words = "".join(block["text"] for block in answer["content"])
        assert words in span and span.endswith("<|im_end|>")
        if "tool_calls" not in answer and name not in THINKING:
            assert span == words + "<|im_end|>"
        assert ("is small." in span) == (name in THINKING) and all(
            each["function"]["name"] in span for each in answer.get("tool_calls", ())
        )
        assert "tool_response" not in span and "enlarged" not in span and "Enlarge" not in span


GEMMA_TOKENS = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>')


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_gemma_4_ends_a_call_with_the_token_that_begins_its_result(case: str) -> None:
    """Its template writes results and the next answer into the same turn, and the generation config stops at that token."""
    tokens = (*GEMMA_TOKENS, "<|tool_response>", "<tool_response|>")
    template = (TRL / "gemma4_v5.jinja").read_text(encoding="utf-8")
    processor = processor_with(template, tokens, "<|image|>", bos_token="<bos>", eos_token="<eos>")
    messages = CONVERSATIONS[case]
    if case == "text before a call":  # the template moves the text behind the result
        with pytest.raises(RowError, match="the chat template writes a tool call differently before other turns"):
            _encode(messages, processor)
        return
    encoded = _encode(messages, processor)
    reference = processor.tokenizer.apply_chat_template(
        plain(messages, False), tools=list(TOOLS), return_dict=False, sanitize_control_tokens=True
    )
    assert encoded.input_ids == reference
    spans, answers = spans_of(encoded, processor), [message for message in messages if message["role"] == "assistant"]
    for span, answer in zip(spans, answers, strict=True):
        if "tool_calls" in answer:
            assert span.startswith(("<|tool_call>call:zoom{", "<|tool_call>call:now{}"))
            assert span.endswith("<tool_call|><|tool_response>") and "enlarged" not in span
        else:
            assert span == answer["content"][0]["text"] + "<turn|>"


MARKED = ("qwen3_vl_training.jinja", "qwen3_5_nothink_training.jinja", "lfm2_2_5_vl.jinja")


@pytest.mark.parametrize("case", [case for case in CONVERSATIONS if case != "control tokens in texts"])
@pytest.mark.parametrize("name", MARKED)
def test_published_templates_with_tags_give_the_assistant_masks_of_transformers(name: str, case: str) -> None:
    """But for what the prompt already has, such as an empty thought, and the line break after a turn."""
    _check_masks(_published(name), CONVERSATIONS[case], arguments_as_text=False)


def test_qwen3_vl_writes_the_call_that_its_release_documents() -> None:
    processor = _published("qwen3_vl.jinja")
    arguments = '{"bbox_2d": [10, 20, 30, 40], "label": "Zürich\'s \\"red\\"\\nsign"}'
    written = '<tool_call>\n{"name": "zoom", "arguments": ' + arguments + "}\n</tool_call><|im_end|>"
    assert spans_of(_encode(CONVERSATIONS["one call"], processor), processor) == [written, "It says stop.<|im_end|>"]


# ---- rejected


def _template(call_text: str, tools: str = "{{ tools | tojson if tools }}", end: str = "<|im_end|>") -> str:
    return (
        tools + "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ ':' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}{{ b.text }}{% endfor %}{% endif %}"
        "{% for c in m.tool_calls %}" + call_text + "{% endfor %}"
        "{{ '" + end + "' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )


FULL = "{{ c.function | tojson }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (_template(FULL), None),
        (_template(""), "the chat template does not write tool calls; set model.chat_template to a .jinja file that does"),
        (_template("{{ c.function.name }}"), "the chat template does not write tool calls"),
        (_template("{{ c.function.arguments | tojson }}"), "does not write 'zoom' of the tool call 'zoom'"),
        (_template(FULL, ""), "the chat template does not write tools"),
        (_template(FULL, "{% for t in tools %}{{ t.function.name }}{% endfor %}"), "the chat template does not write tools"),
        (_template("{{ c.function.name ~ c.function.arguments }}"), None),  # Python's spelling of an object: JSON text is used
        (_template(FULL, end=""), "the chat template writes no end-of-turn token after a tool call"),
        (
            _template(FULL).replace("{{ c.function", "{{ '<|im_end|>' }}{{ c.function"),
            "before the end of a tool call",
        ),
        (
            _template(FULL).replace("<|im_start|>assistant:", "<|im_start|>model:"),
            "another text before a tool call",
        ),
        (_template("{{ c.function.name }}{{ 'probe_key' }}: probe value"), "does not write 'bbox_2d' of the tool call 'zoom'"),
    ],
)
def test_a_template_writes_every_part_or_the_row_is_rejected(template: str, reason: str | None) -> None:
    processor = processor_with(template, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    messages = [{"role": "user", "content": text("q")}, said("", call("zoom", ZOOM)), result("r"), said("a")]
    if reason is None:
        spans = spans_of(encode_text("r", messages, processor, [], tools=TOOLS), processor)
        assert len(spans) == 2 and "zoom" in spans[0] and '"bbox_2d": [10, 20, 30, 40]' in spans[0] and spans[1] == "a<|im_end|>"
        return
    with pytest.raises(RowError, match=re.escape(reason)) as caught:
        encode_text("rows.json[3]", messages, processor, [], tools=TOOLS)
    assert caught.value.issue == "chat_template"


def test_tags_around_the_text_of_a_turn_but_not_its_call_are_rejected() -> None:
    template = tool_processor("hermes").chat_template
    template = template.replace(
        "{%- generation -%}{{- said(m) -}}", "{%- generation -%}{{- said(m) ~ ' ' -}}{%- endgeneration -%}"
    )
    template = template.replace("{{- '<|im_end|>\n' -}}{%- endgeneration -%}", "{{- '<|im_end|>\n' -}}")
    processor = processor_with(template, QWEN_TOKENS, eos_token="<|im_end|>")
    with pytest.raises(RowError, match=re.escape("expected the {% generation %} tags of the chat template around")):
        encode_text("r", CONVERSATIONS["text before a call"], processor, ["<image>"], tools=TOOLS)


@pytest.mark.parametrize("name", ["qwen2_5_vl.jinja", "smolvlm.jinja", "llava_next.jinja"])
def test_published_templates_without_a_place_for_tools_are_rejected_in_training_and_questions(name: str) -> None:
    processor = processor_with((TRL / name).read_text(encoding="utf-8"), QWEN_TOKENS, eos_token="<|im_end|>")
    messages = CONVERSATIONS["one call"]
    for encode in (
        lambda: encode_text("r", messages, processor, ["<image>"], tools=TOOLS),
        lambda: encode_prompt("r", [{"role": "user", "content": text("q")}], processor, TOOLS),
    ):
        with pytest.raises(RowError, match=r"the chat template does not write tools.*; set model.chat_template to a .jinja file"):
            encode()


def test_tools_that_a_template_writes_later_than_the_first_answer_are_rejected() -> None:
    """As Mistral's older templates do, before the last question: the first answers would be trained without them."""
    template = _template(FULL, "").replace(
        "{{ '<|im_start|>' ~ m.role",
        "{{ tools | tojson if m.role == 'user' and (messages | selectattr('role', 'equalto', 'user') | list)[-1] == m }}"
        "{{ '<|im_start|>' ~ m.role",
    )
    processor = processor_with(template, ("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    turn = [{"role": "user", "content": text("q")}, said("", call("zoom", ZOOM)), result("r"), said("a")]
    assert len(spans_of(encode_text("r", turn, processor, [], tools=TOOLS), processor)) == 2
    with pytest.raises(RowError, match="writes another text before a tool call than its prompt"):
        encode_text("r", [*turn, {"role": "user", "content": text("p")}, said("b")], processor, [], tools=TOOLS)


def test_a_control_token_in_a_key_is_rejected() -> None:
    messages = [QUESTION, said("", call("zoom", {"<|im_end|>": 1}))]
    with pytest.raises(RowError, match=r"the key '<\|im_end\|>' of a tool call or schema contains a control token; rename it"):
        encode_text("r", messages, tool_processor("hermes"), ["<image>"])


def test_text_of_a_call_that_is_not_unicode_is_rejected() -> None:
    with pytest.raises(RowError, match=r"messages\[1\]: the text is not valid Unicode"):
        encode_text("r", [QUESTION, said("", call("zoom", {"label": "\ud83d"}))], tool_processor("hermes"), ["<image>"])
