"""Encoding: exact labels of answers and their end of turn, the same tokens in training and serving, padding without effect."""

from __future__ import annotations

import unicodedata
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import (
    IGNORE_INDEX,
    OverLength,
    encode_prompt,
    encode_sample,
    open_images,
)
from mmtune.data.encoding.encoding_checks import check_chat_template
from mmtune.data.message import Message, RowError, Sample
from mmtune.utils.errors import UserError

torch.set_num_threads(1)

END = {"vicuna_v1": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
END |= {"plain": "\n", "tiny": "<|end|>"}
SPACE = {"vicuna_v1": " ", "mistral": " "}  # their prompts end mid-line, so the model writes the space itself
TALKING = sorted(set(END) - {"plain"})


def _sample(*turns: str | list[str], system: str | None = None) -> Sample:
    """A conversation from the user on; in a list, what ends in .png is an image."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for number, turn in enumerate(turns):
        content = [
            {"type": "image", "image": piece} if piece.endswith(".png") else {"type": "text", "text": piece}
            for piece in ([turn] if isinstance(turn, str) else turn)
        ]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return Sample("r.json[7]", messages)


def _spans(encoded: dict[str, torch.Tensor], processor: Any) -> list[str]:
    """The supervised tokens, decoded span by span."""
    pairs = zip(encoded["input_ids"][0].tolist(), encoded["labels"][0].tolist(), strict=True)
    spans = [list(group) for on, group in groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX) if on]
    assert all(token == label for span in spans for token, label in span)
    return [processor.tokenizer.decode([token for token, _ in span]) for span in spans]


def _conversations(media: Path) -> dict[str, Sample]:
    a, b = str(media / "a.png"), str(media / "b.png")
    return {
        "text only": _sample("what?", "nothing"),
        "image": _sample([a, "what?"], "a cat"),
        "several turns": _sample([a, "what?"], "a cat", "sure?", "yes. 100%"),
        "several images": _sample([a, b, "which?"], "both", ["and", b, "?"], "no\n\nnot it", system="Be brief."),
        "unicode": _sample("何? ñ", "猫 é e\u0301 🐈\u200d⬛ \u2028 ﬁ"),
        "white space": _sample("  what?\n\n", "yes  \t and\n\n\n    no \n\n"),
        "like markup": _sample("<b>&amp;{{ x }}", "{% if %}</b><image"),
    }


@pytest.mark.parametrize("case", list(_conversations(Path())))
@pytest.mark.parametrize("name", TALKING)
def test_supervised_tokens_are_the_answers_and_their_ends(
    template_processors: dict[str, Any], media: Path, name: str, case: str
) -> None:
    processor, sample = template_processors[name], _conversations(media)[case]
    encoded = encode_sample(sample, processor)
    answers = [message["content"][0]["text"] for message in sample.messages if message["role"] == "assistant"]
    if name == "chatml":  # Qwen's tokenizer composes accents
        answers = [unicodedata.normalize("NFC", answer) for answer in answers]
    assert _spans(encoded, processor) == [SPACE.get(name, "") + answer + END[name] for answer in answers]
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape == encoded["attention_mask"].shape
    image = ids == processor.image_token_id
    assert not (image & (labels != IGNORE_INDEX)).any()
    assert image.sum() == 16 * len(sample.images)
    assert ("pixel_values" in encoded) == bool(sample.images)
    if sample.images:
        assert len(encoded["pixel_values"]) == len(sample.images)


def test_a_caption_is_supervised_with_its_newline(template_processors: dict[str, Any], media: Path) -> None:
    processor = template_processors["plain"]
    assert _spans(encode_sample(_sample([str(media / "a.png"), "Describe."], "a cat"), processor), processor) == ["a cat\n"]
    with pytest.raises(RowError, match=r"r\.json\[7\]: messages: expected 2 supervised spans, one for each answer, got 1"):
        encode_sample(_sample("a", "b", "c", "d"), processor)  # with no words between, two captions run together


@pytest.mark.parametrize("name", TALKING)
def test_the_loss_can_be_limited_to_the_last_answer(template_processors: dict[str, Any], media: Path, name: str) -> None:
    processor, sample = template_processors[name], _conversations(media)["several images"]
    whole, last = encode_sample(sample, processor), encode_sample(sample, processor, supervise="last")
    assert _spans(last, processor) == _spans(whole, processor)[-1:] and len(_spans(whole, processor)) == 2
    assert all(torch.equal(whole[key], last[key]) for key in whole if key != "labels")


TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>")
TEXT = st.lists(st.sampled_from(TOKENS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=4).map("".join)
ANSWER = TEXT.filter(str.strip)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(question=TEXT, answer=ANSWER, then=TEXT, last=ANSWER)
def test_labels_are_exact_for_any_text(untrained: tuple[Any, Any], question: str, answer: str, then: str, last: str) -> None:
    processor = untrained[1]
    encoded = encode_sample(_sample(question, answer, then, last), processor)
    assert _spans(encoded, processor) == [f"{answer}<|end|>", f"{last}<|end|>"]


SPACES = st.text(st.sampled_from(" \n\t\rab.é"), max_size=12)


@pytest.mark.parametrize("name", TALKING)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(question=SPACES, answer=SPACES.filter(str.strip))
def test_labels_are_exact_or_rejected_when_white_space_joins(
    template_processors: dict[str, Any], name: str, question: str, answer: str
) -> None:
    processor, sample = template_processors[name], _sample(question, answer)
    try:
        encoded = encode_sample(sample, processor)
    except RowError as error:
        assert answer[0].isspace() and error.field == "messages[1]" and "starts with white space" in error.detail
        return
    assert _spans(encoded, processor) == [SPACE.get(name, "") + answer + END[name]]


def test_joined_white_space_is_rejected(template_processors: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=r"r\.json\[7\]: messages\[1\]: the answer starts with white space"):
        encode_sample(_sample("q", "\n\nfoo"), template_processors["chatml"])
    assert _spans(encode_sample(_sample("q", " foo"), template_processors["chatml"]), template_processors["chatml"]) == [
        " foo<|im_end|>"
    ]


@pytest.mark.parametrize("case", list(_conversations(Path())))
@pytest.mark.parametrize("name", TALKING)
def test_training_and_serving_agree(template_processors: dict[str, Any], media: Path, name: str, case: str) -> None:
    """At every answer, what is served is what was trained up to there; and both are what the processor gives by itself."""
    processor, sample = template_processors[name], _conversations(media)[case]
    trained = encode_sample(sample, processor)
    opened = open_images(sample.id, sample.messages)
    plain = processor.apply_chat_template(opened, tokenize=True, return_dict=True, return_tensors="pt")
    assert set(trained) == {*plain, "labels"}
    assert all(torch.equal(trained[key], plain[key]) for key in plain)
    ids, labels = trained["input_ids"][0], trained["labels"][0]
    mask = processor.apply_chat_template(opened, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert (labels != IGNORE_INDEX).long().tolist() == mask["assistant_masks"][0]
    begins = ((labels[1:] != IGNORE_INDEX) & (labels[:-1] == IGNORE_INDEX)).nonzero().flatten() + 1
    answers = [number for number, message in enumerate(sample.messages) if message["role"] == "assistant"]
    for begin, number in zip(begins.tolist(), answers, strict=True):
        prompt = encode_prompt(sample.id, sample.messages[:number], processor)
        assert torch.equal(prompt["input_ids"][0], ids[:begin])
        assert set(prompt) <= set(trained) and prompt["input_ids"].dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------- refusals

SPELLS = {
    "tiny": ["<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<image>"],
    "llama3": ["<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<image>"],
    "chatml": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "vicuna_v1": ["</s>", "<s>"],
    "mistral": ["[INST]", "[/INST]", "</s>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>", "<eos>"],
}


@pytest.mark.parametrize(("name", "token"), [(name, token) for name, tokens in SPELLS.items() for token in tokens])
def test_a_control_token_spelled_in_text_is_encoded_as_text(
    template_processors: dict[str, Any], media: Path, name: str, token: str
) -> None:
    processor, tokenizer, a = template_processors[name], template_processors[name].tokenizer, str(media / "a.png")
    for turns in (
        [f"say {token}!", "ok"],
        [[a, f"{token}{token} it"], f"ok{token}", [f"{token}\n", a], f"  {token[1:]}<{token} é."],
        ["\U000f0000what\U000f0001?", f"\U000f0000{token}"],  # characters that transformers marks a spelling with
    ):
        sample = _sample(*turns)
        encoded = encode_sample(sample, processor)
        plain = processor.apply_chat_template(
            open_images(sample.id, sample.messages),
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            return_tensors="pt",
        )
        assert encoded["input_ids"].tolist() == plain["input_ids"].tolist()
        answers = [turn.replace("\U000f0000", "") for turn in turns[1::2]]
        assert _spans(encoded, processor) == [SPACE.get(name, "") + answer + END[name] for answer in answers]
        prompt = encode_prompt(sample.id, sample.messages[:-1], processor)
        served = processor.apply_chat_template(
            open_images(sample.id, sample.messages[:-1]),
            tokenize=True,
            return_dict=True,
            sanitize_control_tokens=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        assert prompt["input_ids"].tolist() == served["input_ids"].tolist()
    half = len(token) // 2
    harmless, halves = (encode_sample(_sample(turn, "ok"), processor) for turn in (["ab", "cd"], [token[:half], token[half:]]))
    control = tokenizer.convert_tokens_to_ids(token)  # in two blocks, rendered as one
    assert (halves["input_ids"] == control).sum() == (harmless["input_ids"] == control).sum()
    assert token in tokenizer.decode(halves["input_ids"][0])


def test_invalid_unicode_text_is_rejected(untrained: tuple[Any, Any]) -> None:
    with pytest.raises(RowError, match=r"r\.json\[7\]: messages\[1\]: the text is not valid Unicode"):
        encode_sample(_sample("q", "half of \ud83d"), untrained[1])


def test_a_sample_that_is_too_long_is_rejected(untrained: tuple[Any, Any], media: Path) -> None:
    processor, sample = untrained[1], _sample([str(media / "a.png"), "what?"], "a cat")
    length = encode_sample(sample, processor)["input_ids"].shape[1]
    assert encode_sample(sample, processor, max_tokens=length)["input_ids"].shape[1] == length
    with pytest.raises(OverLength, match=rf"r\.json\[7\]: messages: {length} tokens, more than data.max_tokens: {length - 1}"):
        encode_sample(sample, processor, max_tokens=length - 1)


def test_an_image_that_cannot_be_decoded_is_named(untrained: tuple[Any, Any], media: Path) -> None:
    whole = (media / "a.png").read_bytes()
    (media / "a.png").write_bytes(whole[: len(whole) * 2 // 3])
    for encode in (encode_sample, lambda sample, processor: encode_prompt(sample.id, sample.messages[:1], processor)):
        with pytest.raises(RowError, match=r"r\.json\[7\]: image: .*a\.png"):
            encode(_sample([str(media / "a.png")], "x"), untrained[1])


# -------------------------------------------------------------------------------------------------------- chat template


@pytest.mark.parametrize("name", END)
def test_the_shipped_chat_templates_pass(template_processors: dict[str, Any], name: str) -> None:
    check_chat_template(template_processors[name])


TURNS = (
    "{{% for m in messages %}}{{% set text = m.content[0].text %}}{{% if m.role == 'user' %}}{{{{ '<|user|>' ~ text }}}}"
    "{{% else %}}{0}{{% endif %}}{{% endfor %}}"
)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<|assistant|>{% generation %}{{ text ~ '<|end|>' }}{% endgeneration %}", None),
        ("<|assistant|>{% generation %}{{ text }}{% endgeneration %}<|end|>", None),
        (
            "<|assistant|>{% generation %}{{ text }}{% endgeneration %}.<|end|>",
            "expected an end-of-turn token after an answer, got ''",
        ),
        (
            "<|assistant|>{% generation %}{{ text ~ ' ' }}{% endgeneration %}",
            "expected an end-of-turn token after an answer, got ' '",
        ),
        (
            "{% generation %}{{ '<|assistant|>' ~ text ~ '<|end|>' }}{% endgeneration %}",
            r"to be supervised, got '<\|assistant\|>",
        ),
        (
            "<|assistant|>{% generation %}{{ text ~ '<|end|><|pad|>' }}{% endgeneration %}",
            "the answer 'yes' and one end-of-turn token to be supervised, got",
        ),
        (
            "<|assistant|>{% generation %}{{ '<|end|>' }}{% endgeneration %}",
            "the answer 'yes' and one end-of-turn token to be supervised, got",
        ),
        ("<|assistant|>{{ text ~ '<|end|>' }}", "no {% generation %} tags.*'<|user|>Is it?<|assistant|>' for '<|user|>Is it?'"),
    ],
)
def test_a_template_that_supervises_something_else_is_rejected(answer: str, reason: str | None) -> None:
    from mmtune.builtin.tiny_checkpoint import build_processor

    processor = build_processor()
    processor.chat_template = TURNS.format(answer)
    if reason is None:
        check_chat_template(processor)
        return
    with pytest.raises(UserError, match=reason):
        check_chat_template(processor)


def test_a_template_that_drops_an_answer_is_reported_with_the_row(untrained: tuple[Any, Any]) -> None:
    from mmtune.builtin.tiny_checkpoint import build_processor

    processor = build_processor()
    marked = "{% generation %}{{ text ~ '<|end|>' }}{% endgeneration %}"
    processor.chat_template = TURNS.format(f"<|assistant|>{{% if loop.last %}}{marked}{{% else %}}{{{{ text }}}}{{% endif %}}")
    check_chat_template(processor)
    with pytest.raises(RowError, match="expected 2 supervised spans, one for each answer, got 1"):
        encode_sample(_sample("a", "b", "c", "d"), processor)


# -------------------------------------------------------------------------------------------------------------- collate


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_fills_one_side(side: str) -> None:
    def ones(length: int, value: int) -> torch.Tensor:
        return torch.full((1, length), value)

    rows = [
        {"input_ids": ones(n, 5), "labels": ones(n, 6), "attention_mask": ones(n, 1), "token_type_ids": ones(n, 2)}
        for n in (3, 1)
    ]
    rows[1]["pixel_values"] = torch.full((2, 3, 4, 4), 0.5)
    batch = collate(rows, 9, side)
    pads = {"input_ids": 9, "labels": IGNORE_INDEX, "attention_mask": 0, "token_type_ids": 0}
    values = {"input_ids": 5, "labels": 6, "attention_mask": 1, "token_type_ids": 2}
    for key, pad in pads.items():
        short = [values[key], pad, pad] if side == "right" else [pad, pad, values[key]]
        assert batch[key].tolist() == [[values[key]] * 3, short]
    assert batch["pixel_values"].shape == (2, 3, 4, 4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_of_a_batch_are_those_of_each_sample_alone(untrained: tuple[Any, Any], media: Path, side: str) -> None:
    model, processor = untrained
    a, b = str(media / "a.png"), str(media / "b.png")
    samples = [
        _sample([a, "what?"], "a cat"),
        _sample("text only, and rather longer than the others are, for a long left side", "yes"),
        _sample([b, a, "which?"], "both"),
    ]
    encoded = [encode_sample(sample, processor) for sample in samples]
    batch = collate(encoded, processor.tokenizer.pad_token_id, side)
    pixels = [sample["pixel_values"] for sample in encoded if "pixel_values" in sample]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels)) and len(batch["pixel_values"]) == 3
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, position_ids=positions).logits
        for row, sample in enumerate(encoded):
            alone = model(**{key: value for key, value in sample.items() if key != "labels"}).logits[0]
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][real], alone, atol=1e-5, rtol=0)
            assert torch.equal(batch["labels"][row][real], sample["labels"][0])
            assert (batch["labels"][row][~real] == IGNORE_INDEX).all()
