"""Resolving of chat templates: exact labels for every shipped template; a template that would lose content is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from PIL import Image

from mmtune.chat_templates.resolving import configure_special_tokens, template_names
from mmtune.models.assemble import assemble, resolve_chat_template, save_checkpoint
from mmtune.models.tiny.tiny_models import LANGUAGE_FAMILIES, write_tiny_language
from mmtune.utils.errors import UserError

IMAGES = [Image.new("RGB", (90, 60), "teal"), Image.new("RGB", (20, 70), "red")]


def _talk(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "role": role,
            "content": [
                {"type": "text", "text": piece} if isinstance(piece, str) else {"type": "image", "image": piece}
                for piece in (text if isinstance(text, list) else [text])
            ],
        }
        for role, text in turns
    ]


def _encode(processor: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[list[int]]]:
    """Token ids, and the supervised ones span by span."""
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    spans: list[list[int]] = []
    for position, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            if not position or not mask[position - 1]:
                spans.append([])
            spans[-1].append(token)
    return list(ids), spans


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
def test_special_tokens_are_where_they_should_be(tiny_checkpoints: Path, family: str) -> None:
    model, processor = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / family))
    tokenizer = processor.tokenizer
    eos = model.generation_config.eos_token_id
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in eos
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    ids, spans = _encode(processor, _talk(("user", [IMAGES[0], "What?"]), ("assistant", "a cat")))
    assert spans[0][-1] in eos
    assert tokenizer.bos_token_id is None or ids.count(tokenizer.bos_token_id) == 1


END = {"vicuna_v1": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
END |= {"plain": "\n", "tiny": "<|end|>"}
SPEAKS = {
    "vicuna_v1": "llama",
    "chatml": "qwen2",
    "llama3": "llama3",
    "mistral": "mistral",
    "gemma": "gemma",
    "plain": "llama",
}
PROMPT_ENDS_MID_LINE = ("vicuna_v1", "mistral")  # the answer's leading space is then the model's to write


@pytest.fixture(scope="module")
def template_processors(tiny_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A processor for each shipped template."""
    processors = {
        name: assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / family), chat_template=name)[1]
        for name, family in SPEAKS.items()
    }
    tiny = tmp_path_factory.mktemp("tiny")
    write_tiny_language("llama", tiny)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.save_pretrained(tiny)
    processors["tiny"] = assemble(str(tiny_checkpoints / "clip"), str(tiny), chat_template="tiny")[1]
    return processors


def test_every_shipped_template_is_tested() -> None:
    of_families = {"paligemma", "question_answer", "instruction", "glm"}  # they need their own processors: tests/families
    assert set(template_names()) == {*END, *of_families}


@pytest.mark.parametrize("name", END)
def test_supervised_tokens_are_the_answer_and_its_end(template_processors: dict[str, Any], name: str) -> None:
    processor = template_processors[name]
    space = " " if name in PROMPT_ENDS_MID_LINE else ""
    answers = ["a cat, twice.", "No: 2 dogs\nand\n\na bird"]
    system = [] if name == "plain" else [("system", "Be brief.")]
    talk = _talk(
        *system,
        ("user", [IMAGES[0], "What is it?"]),
        ("assistant", answers[0]),
        ("user", ["And ", IMAGES[1], " here?"]),
        ("assistant", answers[1]),
    )
    ids, spans = _encode(processor, talk)
    assert ids.count(processor.image_token_id) == 32
    assert [processor.tokenizer.decode(span) for span in spans] == [space + answer + END[name] for answer in answers]
    if system:
        assert "Be brief." in processor.tokenizer.decode(ids)
    spoken = [message for message in talk if message["role"] != "user"]
    plain_strings = [{**message, "content": message["content"][-1]["text"]} for message in spoken]
    if name not in ("mistral", "gemma"):
        assert [processor.tokenizer.decode(span) for span in _encode(processor, plain_strings)[1]] == (
            [space + answer + END[name] for answer in answers] if name != "plain" else [f"{answers[0]}\n{answers[1]}\n"]
        )


@pytest.mark.parametrize("name", sorted(set(END) - {"plain"}))
def test_the_prompt_of_a_question_is_a_prefix_of_the_training_text(template_processors: dict[str, Any], name: str) -> None:
    processor = template_processors[name]
    talk = _talk(("system", "Be brief."), ("user", [IMAGES[0], "What?"]), ("assistant", "it is"))
    prompt = processor.apply_chat_template(talk[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)
    asked = prompt["input_ids"][0]
    ids, spans = _encode(processor, talk)
    assert ids[: len(asked)] == asked
    assert ids[len(asked) : len(asked) + len(spans[0])] == spans[0]


RENDERED = {
    "vicuna_v1": (
        "<s>A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat? ASSISTANT: cat</s>USER: And\n<image>\n now? ASSISTANT: dog</s>"
    ),
    "chatml": (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n"
        "<|im_start|>user\nAnd\n<image>\n now?<|im_end|>\n<|im_start|>assistant\ndog<|im_end|>\n"
    ),
    "llama3": (
        "<|begin_of_text|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ncat<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd\n<image>\n now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ndog<|eot_id|>"
    ),
    "mistral": "<s>[INST] <image>\nWhat? [/INST] cat</s>[INST] And\n<image>\n now? [/INST] dog</s>",
    "gemma": (
        "<bos><start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\ncat<end_of_turn>\n"
        "<start_of_turn>user\nAnd\n<image>\n now?<end_of_turn>\n<start_of_turn>model\ndog<end_of_turn>\n"
    ),
    "plain": "<s><image>cat\n<image>dog\n",
    "tiny": ("<|user|><image>\nWhat?<|end|><|assistant|>cat<|end|><|user|>And\n<image>\n now?<|end|><|assistant|>dog<|end|>"),
}


@pytest.mark.parametrize("name", END)
def test_rendered_text_is_the_familys(template_processors: dict[str, Any], name: str) -> None:
    talk = _talk(
        ("user", [IMAGES[0], "What?"]),
        ("assistant", "cat"),
        ("user", ["And\n", IMAGES[1], " now?"]),
        ("assistant", "dog"),
    )
    assert template_processors[name].apply_chat_template(talk) == RENDERED[name]
    talk[0]["content"][1]["text"] = "\nWhat?"  # a source that leaves LLaVA's own newline in: still one newline
    assert template_processors[name].apply_chat_template(talk) == RENDERED[name]


def test_templates_reject_content_that_they_would_lose(template_processors: dict[str, Any]) -> None:
    for talk, reason in (
        (_talk(("user", "Draw."), ("assistant", [IMAGES[0]])), "text only"),
        (_talk(("tool", "x")), "tool"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "audio"),
    ):
        for name, processor in template_processors.items():
            with pytest.raises(Exception, match=reason):
                processor.apply_chat_template(talk)
                raise AssertionError(name)
    with pytest.raises(Exception, match="system"):
        template_processors["gemma"].apply_chat_template(_talk(("system", "Be brief."), ("assistant", "yes")))


def test_a_sentencepiece_tokenizer_and_its_own_bos(tiny_checkpoints: Path, tmp_path: Path) -> None:
    """Llama's real tokenizer class: a metaspace before words, and a beginning token that it adds itself."""
    write_tiny_language("llama", tmp_path)
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'.,:?"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    tokenizer = tf.LlamaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("a")["input_ids"][0] == 1
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokens))
    model.save_pretrained(tmp_path)
    model, processor = assemble(str(tiny_checkpoints / "clip"), str(tmp_path))
    save_checkpoint(model, processor, tmp_path / "out")
    for each in (processor, tf.AutoProcessor.from_pretrained(tmp_path / "out")):
        talk = _talk(("user", [IMAGES[0], "What?"]), ("assistant", "a cat"))
        ids, spans = _encode(each, talk)
        assert each.tokenizer.decode(spans[0]) == "a cat</s>"
        later = each(images=IMAGES[:1], text=each.apply_chat_template(talk))["input_ids"][0]
        assert later == ids and ids.count(1) == 1


@pytest.mark.parametrize(
    ("name", "family", "reason"),
    [
        ("vicuna", "llama", "unknown name 'vicuna'; did you mean 'vicuna_v1'"),
        ("nowhere.jinja", "llama", "no such file: nowhere.jinja"),
        ("chatml", "llama", r"<\|im_start\|>"),
    ],
)
def test_chat_template_names_are_checked(tiny_checkpoints: Path, name: str, family: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / family), chat_template=name)


def test_chat_templates_from_files_are_checked(tiny_checkpoints: Path, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_checkpoints / "qwen2")
    for text, reason in {
        "{{ messages[0].role }}": "expected one <image> for an image, got 0",
        "<image>{{ messages[0].role }}": "no {% generation %} tags",
        "{% if %}": "not valid Jinja",
        "<image>{{ messages[0].content + 'x' }}": "on a question with an image, the chat template fails",
    }.items():
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(UserError) as caught:
            resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer)
        assert reason in str(caught.value)
    good = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}<|im_end|>"
        "{% endgeneration %}{% else %}<image>{{ m.content[-1].text }}{% endif %}{% endfor %}"
    )
    (tmp_path / "own.jinja").write_text(good)
    assert resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer) == good
    bare = re.sub("{% (end)?generation %}", "", good)  # exact without marks too, where it writes a prompt
    (tmp_path / "own.jinja").write_text(bare + "{% if add_generation_prompt %}assistant:{% endif %}")
    resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer)
    (tmp_path / "own.jinja").write_text(bare)
    with pytest.raises(UserError, match="its text before an answer differs from the prompt"):
        resolve_chat_template(str(tmp_path / "own.jinja"), tokenizer)


def test_a_text_models_template_is_used_only_if_it_places_images(tiny_checkpoints: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_checkpoints / "qwen2")
    assert tokenizer.chat_template is not None
    chatml = resolve_chat_template("chatml", tokenizer)
    assert resolve_chat_template(None, tokenizer, model_type="qwen2") == chatml
    tokenizer.chat_template = chatml + "{# mine #}"
    assert resolve_chat_template(None, tokenizer, model_type="qwen2") == chatml + "{# mine #}"


@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_tokenizer_adds_nothing_that_the_template_writes(add_bos: bool, add_eos: bool, writes_bos: bool) -> None:
    """Text that is rendered first and tokenized later begins once and ends where the template ends it."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz:?"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tf.LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=add_bos, add_eos_token=add_eos)
    turn = "{{ m.role }}: {{ m.content[-1].text }}{{ '</s>' if m.role == 'assistant' }}"
    template = "<s>" * writes_bos + "{% for m in messages %}" + turn + "{% endfor %}"
    assert (tokenizer("a")["input_ids"][0] == 1, tokenizer("a")["input_ids"][-1] == 2) == (add_bos, add_eos)
    configure_special_tokens(tokenizer, template)
    text = tokenizer.apply_chat_template(_talk(("user", "a"), ("assistant", "b")), chat_template=template, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert (ids.count(1), ids.count(2)) == (int(writes_bos or add_bos), 1)
    assert (ids[0] == 1) == (writes_bos or add_bos) and ids[-1] == 2
