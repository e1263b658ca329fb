"""Character spans of tokens, over tokenizers that treat white space in different ways."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as tf
from family_processors import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from mmtune.chat_templates.rendering import ESCAPE_END, ESCAPE_START, ChatTemplateError, control_tokens
from mmtune.data.encoding.token_spans import (
    TokenSpans,
    escape_control_tokens,
    has_control_tokens,
    tokenize,
    tokenize_escaped,
    unescape_control_tokens,
)

SPECIALS = ("<s>", "</s>", "<image>", "<end>")


def _bytes() -> Any:
    return byte_level(SPECIALS, bos_token="<s>", eos_token="</s>")


def _composing() -> Any:
    tokenizer = _bytes()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _swallowing() -> Any:
    """Its image token takes the white space beside it along."""
    tokenizer = byte_level(("<s>", "</s>", "<end>"), bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<image>", lstrip=True, rstrip=True, special=True)], special_tokens=True)
    return tokenizer


def _metaspace(**settings: Any) -> Any:
    """Llama's own: words begin with a visible space, and the first one gets one that is not in the text."""
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'.,:?"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer = tf.LlamaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], **settings)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", "<end>"]})
    return tokenizer


def _framing() -> Any:
    """It puts a beginning and an end around every text."""
    tokenizer = _bytes()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


TOKENIZERS = {
    "bytes": _bytes(),
    "composing": _composing(),
    "swallowing": _swallowing(),
    "metaspace": _metaspace(),
    "metaspace, bos": _metaspace(add_bos_token=True),
    "framing": _framing(),
}
PIECES = st.sampled_from(
    ["<image>", "<image>" * 2, "<image>" * 5, "<end>", "<s>", " ", "\n", "the cat", "é", "e\u0301", "猫", "<", ">"]
)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECES, max_size=8))
def test_a_run_encoded_as_one_is_the_run(name: str, added: bool, pieces: list[str]) -> None:
    tokenizer, text = TOKENIZERS[name], "".join(pieces)
    whole = tokenizer(text, add_special_tokens=added, return_offsets_mapping=True)
    assert tokenize(tokenizer, text, added, ("<image>",)) == (whole["input_ids"], whole["offset_mapping"])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(PIECES, min_size=1, max_size=8), cut=st.floats(0, 1), length=st.floats(0, 1))
def test_spans_are_the_tokens_that_share_a_character(name: str, pieces: list[str], cut: float, length: float) -> None:
    text = "".join(pieces)
    _, offsets = tokenize(TOKENIZERS[name], text, True)
    start = int(cut * (len(text) - 1))
    span = (start, start + 1 + int(length * (len(text) - start - 1)))
    expected = [begin < span[1] and end > span[0] for begin, end in offsets]  # as transformers tells them
    places = TokenSpans(offsets)
    assert places.mask([span]) == expected
    touched = [offset for offset, inside in zip(offsets, expected, strict=True) if inside]
    if touched:
        assert places.crosses(span) == (touched[0][0] < span[0] or touched[-1][1] > span[1])


TEMPLATE = "{{ bos_token }}{% for m in messages %}{% for b in m.content %}{{ b.text }}{% endfor %}<end>{% endfor %}"


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(turns=st.lists(st.lists(PIECES, max_size=5).map("".join), min_size=1, max_size=3))
def test_escaped_spellings_equal_those_of_transformers(name: str, turns: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    control = control_tokens(tokenizer, TEMPLATE).anywhere
    messages = [{"role": "user", "content": [{"type": "text", "text": turn}]} for turn in turns]
    theirs = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, sanitize_control_tokens=True)
    rendered = "<s>" + "".join(escape_control_tokens(message["content"], control)[0]["text"] + "<end>" for message in messages)
    ids, offsets = tokenize_escaped(tokenizer, rendered, False)
    assert ids == theirs["input_ids"]
    text, _ = unescape_control_tokens(rendered, [])
    assert text == "<s>" + "".join(turn + "<end>" for turn in turns)
    assert offsets == sorted(offsets) and offsets[-1][1] == len(text)
    ends = [number for number, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<end>")]
    assert len(ends) == len(turns) and [text[slice(*offsets[number])].strip() for number in ends] == ["<end>"] * len(turns)
    framed, _ = tokenize_escaped(tokenizer, rendered, True)
    around = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    assert len(framed) - len(ids) == len(around[0]) - len(around[1]) and "".join(map(chr, ids)) in "".join(map(chr, framed))


def test_escape_characters_shift_spans_and_are_removed_from_texts() -> None:
    rendered = f"a{ESCAPE_START}<end>{ESCAPE_END}b{ESCAPE_END}<end>"
    assert unescape_control_tokens(rendered, [(0, 1), (1, 8), (8, 10), (10, 15), (0, 15)]) == (
        "a<end>b<end>",
        [(0, 1), (1, 6), (6, 7), (7, 12), (0, 12)],
    )
    control = control_tokens(_bytes(), TEMPLATE).anywhere
    assert (
        has_control_tokens("x<end>", control)
        and has_control_tokens(ESCAPE_END, control)
        and not has_control_tokens("<en d>", control)
    )
    halves = [{"type": "text", "text": "<en"}, {"type": "text", "text": "d>"}, {"type": "image"}, {"type": "text", "text": "d>"}]
    assert [block.get("text") for block in escape_control_tokens(halves, control)] == [f"<en{ESCAPE_END}", "d>", None, "d>"]


def test_a_control_token_that_plain_text_produces_is_rejected() -> None:
    """A word-level vocabulary has one token for the spelling, the control token itself."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    bare = Tokenizer(WordLevel({"<end>": 0, "a": 1, "?": 2}, unk_token="?"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", unk_token="?")
    with pytest.raises(
        ChatTemplateError, match="the text contains '<end>', which the tokenizer can only encode as a control token"
    ):
        tokenize_escaped(tokenizer, f"a {ESCAPE_START}<end>{ESCAPE_END} a", False)
