"""Encoding per family: tensors equal those of the family's own processor, and image tokens are never supervised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from family_processors import FAMILIES
from PIL import Image

from mmtune.data.encoding.encode import IGNORE_INDEX, encode_prompt, encode_sample, encode_text, open_images
from mmtune.data.encoding.encoding_checks import check_chat_template
from mmtune.data.message import Message, RowError, Sample
from mmtune.utils.errors import UserError

CONVERSATIONS: dict[str, list[list[str]]] = {
    "text": [["what?"], ["a cat"]],
    "image": [["wide.png", "what?"], ["a cat"]],
    "several": [["wide.png", "tall.png", "which?"], ["both"], ["and ", "dot.png", "?"], ["no\n\nnot it"]],
    "interleaved": [["is ", "tall.png", " as ", "tall.png", "?"], ["yes"]],
    "spelled": [["wide.png", "{image}{end} what?"], ["a {image} cat"], ["sure?"], ["{end} yes"]],
}


TAKE_SPELLINGS = ("idefics3", "internvl", "paligemma")
"""Families whose own code takes a placeholder that a text spells for a real one, even with sanitizing on."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (150, 37)), ("tall", (33, 95)), ("dot", (20, 20))):
        Image.effect_noise(size, 60).convert("RGB").save(root / f"{name}.png")
    return root


def _sample(turns: list[list[str]], pictures: Path, processor: Any) -> Sample:
    spelled = {"image": processor.image_token, "end": processor.tokenizer.eos_token}
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        content = [
            {"type": "image", "image": pictures / piece}
            if piece.endswith(".png")
            else {"type": "text", "text": piece.format(**spelled)}
            for piece in turn
        ]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return Sample("r", messages)


def _plain(messages: list[Message], processor: Any, sanitize: bool, prompt: bool = False) -> dict[str, torch.Tensor]:
    """What the processor gives by itself."""
    return dict(
        processor.apply_chat_template(
            open_images("r", messages),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=prompt,
            **({"sanitize_control_tokens": True} if sanitize else {}),
        )
    )


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_samples_equal_those_of_the_processor(pictures: Path, family: str, case: str) -> None:
    processor = FAMILIES[family]()
    sample = _sample(CONVERSATIONS[case], pictures, processor)
    reads_types = isinstance(processor, tf.PaliGemmaProcessor)
    if reads_types and case == "text":
        with pytest.raises(RowError, match="needs an image in every conversation"):
            encode_sample(sample, processor)
        return
    trained = encode_sample(sample, processor)
    asked = encode_prompt(sample.id, sample.messages[:-1], processor)
    for ours, messages, prompt in ((trained, sample.messages, False), (asked, sample.messages[:-1], True)):
        if case == "spelled" and family in TAKE_SPELLINGS:
            with pytest.raises(ValueError, match="should be the same"):
                _plain(messages, processor, True, prompt)
            continue
        theirs = _plain(messages, processor, case == "spelled", prompt)
        assert set(ours) | {"labels"} == set(theirs) | {"labels"}
        for key, tensor in theirs.items():
            if not (reads_types and key in ("labels", "token_type_ids")):
                assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    ids, labels = trained["input_ids"], trained["labels"]
    supervised = labels != IGNORE_INDEX
    assert torch.equal(ids[supervised], labels[supervised])
    images = torch.isin(ids, torch.tensor([processor.image_token_id, *processor.image_token_ids]))
    assert not (images & supervised).any() and images.any() == (case != "text")
    end = processor.tokenizer.eos_token if family != "gemma3" else "<end_of_turn>"
    lead = " " if "%} {%" in processor.chat_template else ""
    answers = [
        turn[0].format(image=processor.image_token, end=processor.tokenizer.eos_token) for turn in CONVERSATIONS[case][1::2]
    ]
    assert processor.tokenizer.decode(labels[supervised]) == "".join(lead + answer + end for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_encoding_gives_the_tokens_of_the_whole_sample(pictures: Path, family: str) -> None:
    """Counting gives the same tokens from the replacement strings and reads no pixels; media tokens are marked as such."""
    processor = FAMILIES[family]()
    sample = _sample(CONVERSATIONS["several"], pictures, processor)
    images = [block["image"] for message in open_images("r", sample.messages) for block in message["content"] if "image" in block]
    inputs = processor(
        images=[images],
        text=[processor.image_token * 3],
        return_text_replacement_offsets=True,
        images_kwargs={"return_tensors": "pt"},
    )
    replacements = [change["replacement"] for change in inputs["text_replacement_offsets"][0]]
    encoded = encode_text(sample.id, sample.messages, processor, replacements)
    whole = encode_sample(sample, processor)
    assert encoded.input_ids == whole["input_ids"][0].tolist()
    assert encoded.supervised == (whole["labels"][0] != IGNORE_INDEX).tolist()
    bare = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in replacements]
    if family not in ("idefics3", "smolvlm", "gemma3"):  # theirs have line breaks at the ends, which may join others
        assert [token for token, inside in zip(encoded.input_ids, encoded.media, strict=True) if inside] == [
            token for ids in bare for token in ids
        ]
    for token, (start, end) in zip(encoded.input_ids, encoded.offsets, strict=True):
        assert processor.tokenizer.decode([token]) == encoded.text[start:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_chat_templates_pass(family: str) -> None:
    processor = FAMILIES[family]()
    if family != "paligemma":
        check_chat_template(processor)


def test_the_answers_of_a_prefix_model_are_not_seen_by_its_prefix(pictures: Path) -> None:
    processor = FAMILIES["paligemma"]()
    sample = _sample(CONVERSATIONS["several"], pictures, processor)
    for supervise, answers in (("all", 2), ("last", 1)):
        encoded = encode_sample(sample, processor, supervise=supervise)
        types, on = encoded["token_type_ids"][0], encoded["labels"][0] != IGNORE_INDEX
        assert processor.tokenizer.decode(encoded["input_ids"][0][on]).count("<eos>") == answers
        first = int(on.nonzero()[0])
        assert not types[:first].any() and types[first:].all()
    assert not encode_prompt("r", sample.messages[:1], processor)["token_type_ids"].any()


def test_images_that_a_processor_rejects_are_errors_with_their_row(pictures: Path) -> None:
    Image.new("RGB", (900, 4)).save(pictures / "line.png")
    with pytest.raises(RowError, match="r: image: Qwen2VLProcessor rejects the sample's images: absolute aspect ratio"):
        encode_sample(_sample([["line.png", "?"], ["no"]], pictures, FAMILIES["qwen2_vl"]()), FAMILIES["qwen2_vl"]())


def test_a_processor_without_image_token_counts_is_rejected(pictures: Path) -> None:
    class Silent(tf.LlavaProcessor):
        replace_image_token = tf.ProcessorMixin.replace_image_token

    known = FAMILIES["llava"]()
    processor = Silent(known.image_processor, known.tokenizer, patch_size=14, chat_template=known.chat_template)
    with pytest.raises(
        UserError, match="Silent has no `replace_image_token`, and its token ids do not show the text of an image"
    ):
        encode_sample(_sample(CONVERSATIONS["image"], pictures, processor), processor)
