"""Labels are exact over many chat templates, whatever is said: with marks, and without them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from dialects import DIALECTS, Dialect, speaker
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.data.encode import EncodedText, check_chat_template, encode_text
from mmtune.data.message import Message, RowError, text_of

WORDS = [
    "a",
    "the cat",
    " ",
    "\n",
    "\n\n",
    "é",
    "猫",
    "<",
    ">",
    "yes",
    "{{ x }}",
    "Assistant:",
    "[INST]",
    "<|im_end|>",
    "<image>",
]


def said(extra: list[str]) -> st.SearchStrategy[str]:
    """Words, white space, and the spellings of control tokens, in any order."""
    return st.lists(st.sampled_from(WORDS + extra), max_size=5).map("".join) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=12
    )


@st.composite
def conversations(draw: st.DrawFn, dialect: Dialect) -> list[Message]:
    """One to three turns; in each question up to two images among up to three pieces of text."""
    text = said([*dialect.specials, dialect.end, dialect.token])
    piece = text.map(lambda words: {"type": "text", "text": words})
    image = st.just({"type": "image", "image": "never-opened.png"})
    messages: list[Message] = []
    if dialect.system and draw(st.booleans()):
        messages.append({"role": "system", "content": [draw(piece)]})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(st.lists(piece | image, min_size=1, max_size=4))})
        messages.append({"role": "assistant", "content": [draw(piece.filter(lambda block: block["text"].strip()))]})
    return messages


def spans_of(encoded: EncodedText, processor: Any) -> list[str]:
    """The supervised tokens, decoded span by span."""
    pairs = zip(encoded.input_ids, encoded.supervised, strict=True)
    spans = [[token for token, _ in group] for on, group in groupby(pairs, lambda pair: pair[1]) if on]
    return [processor.tokenizer.decode(span) for span in spans]


def answers_of(messages: list[Message], dialect: Dialect) -> list[str]:
    marks = str.maketrans("", "", "\U000f0000\U000f0001")  # what transformers marks spellings with, and drops from texts
    said = [text_of(message) for message in messages if message["role"] == "assistant"]
    spelt = any(token in text_of(message) for message in messages for token in (*dialect.specials, dialect.token))
    dropped = spelt or any(chr(code) in text_of(message) for message in messages for code in (0xF0000, 0xF0001))
    return [dialect.lead + (text.translate(marks) if dropped else text) + dialect.end for text in said]


@pytest.mark.parametrize("name", DIALECTS)
def test_labels_are_the_answers_and_their_ends_with_marks_and_without(name: str) -> None:
    dialect, marked, unmarked = DIALECTS[name], speaker(name), speaker(name, marked=False)
    assert "generation" in marked.chat_template and "generation %}" not in unmarked.chat_template

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(messages=conversations(dialect), size=st.integers(1, 9))
    def check(messages: list[Message], size: int) -> None:
        images = sum(block["type"] == "image" for message in messages for block in message["content"])
        replacements = [dialect.token * size] * images
        answers = [text_of(message) for message in messages if message["role"] == "assistant"]
        try:
            encoded = encode_text("r", messages, marked, replacements)
        except RowError as error:
            # What no span could make exact: white space that the template strips, or that joins what stands before it.
            assert any(answer != answer.strip() for answer in answers), error
            with pytest.raises(RowError):
                encode_text("r", messages, unmarked, replacements)
            return
        assert spans_of(encoded, marked) == answers_of(messages, dialect)
        image = marked.tokenizer.convert_tokens_to_ids(dialect.token)
        assert encoded.input_ids.count(image) == size * images == sum(encoded.media)
        assert not any(on and inside for on, inside in zip(encoded.supervised, encoded.media, strict=True))
        assert encode_text("r", messages, unmarked, replacements) == encoded
        last = encode_text("r", messages, unmarked, replacements, "last")
        assert last.input_ids == encoded.input_ids and spans_of(last, marked) == answers_of(messages, dialect)[-1:]

    check()


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", DIALECTS)
def test_the_dialects_pass_the_check_before_training(name: str, marked: bool) -> None:
    check_chat_template(speaker(name, marked))
