"""Labels over many chat templates and random conversations, with and without `{% generation %}` tags."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers as tf
import trl
from dialects.chat_dialects import DIALECTS, Dialect, dialect_processor, spans_of
from family_processors import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mmtune.data.encoding.encode import encode_text
from mmtune.data.encoding.encoding_checks import check_chat_template
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


def message_texts(extra: list[str]) -> st.SearchStrategy[str]:
    """Words, white space, and the spellings of control tokens, in any order."""
    return st.lists(st.sampled_from(WORDS + extra), max_size=5).map("".join) | st.text(
        st.characters(exclude_categories=["Cs"]), max_size=12
    )


@st.composite
def conversations(draw: st.DrawFn, dialect: Dialect) -> list[Message]:
    """One to three turns; in each question up to two images among up to three pieces of text."""
    text = message_texts([*dialect.specials, dialect.end, dialect.token])
    piece = text.map(lambda words: {"type": "text", "text": words})
    image = st.just({"type": "image", "image": "never-opened.png"})
    messages: list[Message] = []
    if dialect.system and draw(st.booleans()):
        messages.append({"role": "system", "content": [draw(piece)]})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(st.lists(piece | image, min_size=1, max_size=4))})
        messages.append({"role": "assistant", "content": [draw(piece.filter(lambda block: block["text"].strip()))]})
    return messages


def answers_of(messages: list[Message], dialect: Dialect) -> list[str]:
    marks = str.maketrans("", "", "\U000f0000\U000f0001")  # what transformers marks spellings with, and drops from texts
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    spelt = any(token in text_of(message) for message in messages for token in (*dialect.specials, dialect.token))
    dropped = spelt or any(chr(code) in text_of(message) for message in messages for code in (0xF0000, 0xF0001))
    return [dialect.lead + (text.translate(marks) if dropped else text) + dialect.end for text in answers]


@pytest.mark.parametrize("name", DIALECTS)
def test_labels_are_the_answers_and_their_ends_with_and_without_generation_tags(name: str) -> None:
    dialect, marked, unmarked = DIALECTS[name], dialect_processor(name), dialect_processor(name, marked=False)
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
    check_chat_template(dialect_processor(name, marked))


# ------------------------------------------------------------------------------------------------------------------ TRL

TRL = Path(trl.__file__).parent / "chat_templates"
END_OF = {
    "gemma3": ("<start_of_image>", "<end_of_turn>"),
    "idefics3": ("<image>", "<end_of_utterance>"),
    "llava_next": ("<image>", "</s>"),
    "qwen2_5_vl": ("<|image_pad|>", "<|im_end|>"),
    "qwen3_vl": ("<|image_pad|>", "<|im_end|>"),
    "smolvlm": ("<image>", "<end_of_utterance>"),
}


def _speaks(template: str, image: str, *more: str) -> tf.LlavaProcessor:
    specials = (
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<end_of_utterance>",
        image,
        *more,
    )
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    tokenizer = byte_level(tuple(dict.fromkeys(specials)), bos_token="<s>", eos_token="</s>")
    return tf.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="full", image_token=image, chat_template=template
    )


def _talk(*turns: str | list[str]) -> list[Message]:
    """From the user on; in a list, what is called `image` is one."""
    return [
        {
            "role": "assistant" if number % 2 else "user",
            "content": [
                {"type": "image", "image": "x"} if piece == "image" else {"type": "text", "text": piece}
                for piece in ([turn] if isinstance(turn, str) else turn)
            ],
        }
        for number, turn in enumerate(turns)
    ]


@pytest.mark.parametrize("name", END_OF)
def test_trls_training_templates_give_the_labels_of_the_original_templates(name: str) -> None:
    """The published template has no marks, TRL's has, around more than the end of turn for some."""
    image, end = END_OF[name]
    messages = _talk(["image", "what?"], "a cat", ["and ", "image", "?"], "no\n\n<|im_end|>not", "sure?", "yes")
    encoded = []
    for file in (f"{name}_training.jinja", f"{name}.jinja"):
        processor = _speaks((TRL / file).read_text(encoding="utf-8"), image)
        encoded.append(encode_text("r", messages, processor, [image * 4] * 2))
        check_chat_template(processor)
    assert encoded[0] == encoded[1]
    spans = spans_of(encoded[0], processor)
    assert [span.lstrip(" ") for span in spans] == [text + end for text in ("a cat", "no\n\n<|im_end|>not", "yes")]


def test_a_thought_inside_the_prompt_is_not_supervised() -> None:
    """TRL marks the empty thought too; the prompt of a model that does not think ends after it."""
    talk = _talk(["image", "what?"], "a cat")
    for file in ("qwen3_5_nothink_training.jinja", "qwen3_5_nothink.jinja"):
        processor = _speaks((TRL / file).read_text(encoding="utf-8"), "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
        assert spans_of(encode_text("r", talk, processor, ["<|image_pad|>"]), processor) == ["a cat<|im_end|>"]
    thinks = _speaks((TRL / "qwen3_5_think_training.jinja").read_text(encoding="utf-8"), "<|image_pad|>")
    with pytest.raises(
        RowError,
        match=re.escape(r"the answer 'a cat' and one end-of-turn token to be supervised, got '<think>\n\n</think>\n\na cat"),
    ):
        encode_text("r", talk, thinks, ["<|image_pad|>"])


# ------------------------------------------------------------------------------------------------------------- refusals

TURN = "{{% for m in messages %}}{{{{ m.role ~ ':' }}}}{0}{{% endfor %}}{1}"
SAYS = "{{ m.content[0].text }}<|im_end|>"
PROMPT = "{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    ("turn", "prompt", "reason"),
    [
        (SAYS, PROMPT, None),
        (SAYS, "", "its text before an answer differs from the prompt: expected '.*', got '.*assistant:'"),
        (SAYS, PROMPT.replace("assistant:", "assistant"), "its text before an answer differs from the prompt"),
        ("{{ m.content[0].text | upper }}<|im_end|>", PROMPT, "changes an answer"),
        ("{{ m.content[0].text | replace('sure', 'certain') }}<|im_end|>", PROMPT, None),
        ("{{ m.content[0].text | replace('dog', 'cat') }}<|im_end|>", PROMPT, "changes an answer"),
        ("{{ m.content[0].text ~ m.content[0].text }}<|im_end|>", PROMPT, "drops or repeats an answer"),
        ("{% if loop.last or m.role == 'user' %}" + SAYS + "{% endif %}", PROMPT, "drops or repeats an answer"),
        ("{% if 'dog' in m.content[0].text %}!{% endif %}" + SAYS, PROMPT, "writes other text that depends on its words"),
        ("{{ m.content[0].text }}", PROMPT, "writes no end-of-turn token after the last answer"),
        ("{{ m.content[0].text }} over<|im_end|>", PROMPT, "writes no end-of-turn token"),
        (
            "{{ m.content[0].text }}{{ '<|im_end|>' if loop.last or m.role == 'user' }}",
            PROMPT,
            "ends only the last turn, but not all turns, with '<.im_end.>'",
        ),
        ("{{ raise_exception('no such talk') }}", PROMPT, "the chat template rejects this conversation: no such talk"),
        ("{{ m.nothing.here }}", PROMPT, "the chat template rejects this conversation: .* has no attribute"),
    ],
)
def test_a_template_without_generation_tags_is_exact_or_rejected_with_the_reason(
    turn: str, prompt: str, reason: str | None
) -> None:
    processor = _speaks(TURN.format(turn, prompt), "<image>")
    messages = _talk("what?", "a dog", "sure?", "yes")
    if reason is None:
        assert spans_of(encode_text("r", messages, processor, []), processor) == ["a dog<|im_end|>", "yes<|im_end|>"]
        return
    with pytest.raises(RowError, match=reason) as caught:
        encode_text("rows.json[3]", messages, processor, [])
    assert caught.value.row == "rows.json[3]" and caught.value.field == "messages"


@pytest.mark.parametrize("marked", [True, False])
def test_white_space_that_a_template_strips_is_reported(marked: bool) -> None:
    with pytest.raises(RowError, match="strips white space from the ends of an answer; remove it from the row"):
        encode_text("r", _talk("what?", "a dog\n"), dialect_processor("llama-3", marked), [])


@pytest.mark.parametrize("marked", [True, False])
def test_a_token_across_the_boundary_of_an_answer_is_rejected(marked: bool) -> None:
    """A prompt that ends with a space, which the tokenizer joins to the first word."""
    turn = "{% if m.role == 'user' %}" + SAYS + "{% else %}{{ ' ' }}{% generation %}" + SAYS + "{% endgeneration %}{% endif %}"
    template = TURN.format(turn, PROMPT.replace("assistant:", "assistant: "))
    processor = _speaks(template if marked else re.sub("{% (end)?generation %}", "", template), "<image>")
    with pytest.raises(
        RowError, match=r"messages\[1\]: the answer shares a token with the text that the chat template writes next to it"
    ):
        encode_text("r", _talk("what?", "the cat"), processor, [])


def test_a_prompt_that_tokenizes_differently_with_its_answer_is_rejected() -> None:
    """Line breaks and the spaces before them are one piece for Qwen's and Llama 3's tokenizers, split by what follows.

    No token stands over the edge of the answer, and the prompt alone still has other tokens than the prompt before the answer.
    """
    space, line = "\u0120", "\u010a"  # as byte-level BPE spells them
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(line, space), (space, space)]
    model = models.BPE({token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}, merges)
    backend = Tokenizer(model)
    pieces = pre_tokenizers.Split(Regex(r"[^\s]+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    answer = "{{ ' \\n  ' }}{% generation %}" + SAYS + "{% endgeneration %}"
    turn = "{% if m.role == 'user' %}" + SAYS + "{% else %}" + answer + "{% endif %}"
    processor = _speaks(TURN.format(turn, PROMPT.replace("assistant:", "{{ 'assistant: \n  ' }}")), "<image>")
    specials = processor.tokenizer.all_special_tokens
    processor.tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", extra_special_tokens=specials
    )
    assert encode_text("r", _talk("what?", "the cat"), processor, []).input_ids
    with pytest.raises(RowError, match=r"messages\[1\]: the answer starts with white space that the tokenizer joins"):
        encode_text("r", _talk("what?", "\nthe cat"), processor, [])


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_media_without_an_encoding_are_named(kind: str) -> None:
    messages = _talk("what?", "a dog")
    messages[0]["content"].insert(0, {"type": kind, kind: "clip"})
    with pytest.raises(RowError, match=rf"r: messages\[0\]: expected text or an image, got {kind}"):
        encode_text("r", messages, dialect_processor("zephyr"), [])


def test_placeholders_and_images_have_equal_counts() -> None:
    messages = _talk(["image", "what?"], "a dog")
    with pytest.raises(RowError, match="expected 2 image placeholders from the chat template, one for each image, got 1"):
        encode_text("r", messages, dialect_processor("zephyr"), ["<image>"] * 2)
    forgets = _speaks(TURN.format("{{ m.content[-1].text }}<|im_end|>", PROMPT), "<image>")
    with pytest.raises(RowError, match="expected 1 image placeholders from the chat template, one for each image, got 0"):
        encode_text("r", messages, forgets, ["<image>"])
