"""Families whose features are resampled by queries, attended to across, or read by an encoder: what only they have."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from family_cases.separate_cases import SEPARATE_CASES
from PIL import Image

from mmtune.chat_templates.resolving import resolve_chat_template
from mmtune.data.batching.collate import collate
from mmtune.data.encoding.encode import IGNORE_INDEX, encode_prompt, encode_sample, open_images
from mmtune.data.encoding.token_counts import count_tokens
from mmtune.data.media.media import EmbeddedMedia, open_image
from mmtune.data.message import Message, RowError, Sample
from mmtune.families.family_table import family_of
from mmtune.models.tiny.tiny_bases import write_tiny_base


def _turn(role: str, *content: str | EmbeddedMedia) -> Message:
    blocks = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content]
    return {"role": role, "content": blocks}


def _image(color: str, size: tuple[int, int] = (40, 90)) -> EmbeddedMedia:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return EmbeddedMedia(Path("test"), color, data=file.getvalue())


QUESTIONS: dict[str, list[Message]] = {
    "text": [_turn("user", "What is it?")],
    "image": [_turn("user", _image("red"), "What is it?")],
    "image_last": [_turn("user", "What is it?", _image("red"))],
    "adjacent_images": [_turn("user", _image("red"), _image("blue", (120, 30)), " which?")],
    "two_turns": [_turn("user", _image("red"), "One?"), _turn("assistant", "yes"), _turn("user", _image("blue"), "\nTwo?")],
}


def _processor(family: str) -> Any:
    processor = SEPARATE_CASES[family].base.processor()
    processor.chat_template = SEPARATE_CASES[family].base.template
    return processor


PROMPTS = [(family, question) for family in ("idefics2", "mllama") for question in QUESTIONS]
PROMPTS += [
    (family, question)
    for family in ("blip-2", "blip-2_t5", "instructblip", "florence2", "kosmos-2")
    for question in ("image", "image_last")
]


@pytest.mark.parametrize(("family", "question"), PROMPTS)
def test_a_prompt_equals_that_of_the_processor(family: str, question: str) -> None:
    case, processor, messages = SEPARATE_CASES[family], _processor(family), QUESTIONS[question]
    if (template := case.base.required_template) is None:
        expected = processor.apply_chat_template(
            open_images("row", messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        source = resolve_chat_template(template, processor.tokenizer, image_token=None)
        processor.chat_template = processor.tokenizer.chat_template = source
        text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        expected = processor(images=[open_image(_image("red"))], text=[text], return_tensors="pt")
    encoded = encode_prompt("row", messages, processor)
    assert set(encoded) == set(expected)
    for name, tensor in encoded.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["blip-2_t5", "florence2"])
def test_the_loss_of_a_decoder_is_that_of_its_class(family: str, tmp_path: Path) -> None:
    """transformers shifts labels that begin with the answer; ours begin with the start token, as those of other families."""
    processor = _processor(family)
    processor.chat_template = resolve_chat_template("instruction", processor.tokenizer, image_token=None)
    encoded = encode_sample(Sample("row", [*QUESTIONS["image"], _turn("assistant", "a red cat")]), processor)
    model = tf.AutoModelForImageTextToText.from_pretrained(write_tiny_base(SEPARATE_CASES[family].base, tmp_path / "base"))
    labels, targets = encoded.pop("labels"), encoded.pop("decoder_input_ids")
    assert labels[0, 0] == IGNORE_INDEX and torch.equal(labels[0, 1:], targets[0, 1:])
    with torch.no_grad():
        expected = model(**encoded, labels=labels[:, 1:]).loss
        logits = model(**encoded, decoder_input_ids=targets).logits
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]), expected)


@pytest.mark.parametrize("family", ["blip-2_t5", "florence2"])
def test_a_decoder_writes_one_answer(family: str) -> None:
    processor = _processor(family)
    processor.chat_template = resolve_chat_template("question_answer", processor.tokenizer, image_token=None)
    turns = [*QUESTIONS["image"], _turn("assistant", "a cat"), _turn("user", "Sure?"), _turn("assistant", "yes")]
    with pytest.raises(RowError, match=r"expected one supervised answer, at the end, got 2 .* set data.supervise: last"):
        encode_sample(Sample("row", turns), processor)
    encoded = encode_sample(Sample("row", turns), processor, supervise="last")
    assert processor.tokenizer.decode(encoded["labels"][0, 1:], skip_special_tokens=True) == "yes"
    assert "a cat</s> Question: Sure? Answer:" in processor.tokenizer.decode(encoded["input_ids"][0])
    assert count_tokens(Sample("row", turns), processor, "last").tokens == sum(
        encoded[name].shape[1] for name in ("input_ids", "decoder_input_ids")
    )


def test_a_task_of_florence_is_the_question_of_its_processor() -> None:
    processor = _processor("florence2")
    processor.chat_template = resolve_chat_template("instruction", processor.tokenizer, image_token=None)
    image = _image("red")
    for task in ("<CAPTION>", "<REGION_TO_OCR>the mat"):
        encoded = encode_prompt("row", [_turn("user", image, task)], processor)
        expected = processor(images=[open_image(image)], text=[task], return_tensors="pt")
        assert torch.equal(encoded["input_ids"], expected["input_ids"])
    with pytest.raises(RowError, match="expected nothing beside the task <OD>"):
        encode_prompt("row", [_turn("user", image, "<OD> please")], processor)
    with pytest.raises(RowError, match="takes one image in a conversation, got 2"):
        encode_prompt("row", [_turn("user", image, image, "which?")], processor)


def test_the_qformer_of_instructblip_sees_the_question_and_no_answer() -> None:
    """Its processor would give it the whole conversation, with the answer that it should learn to give."""
    processor = _processor("instructblip")
    processor.chat_template = resolve_chat_template("instruction", processor.tokenizer, image_token=None)
    answered = [*QUESTIONS["two_turns"], _turn("assistant", "no")]
    rows = [encode_sample(Sample("row", [*answered[:1], _turn("assistant", text), *answered[2:]]), processor) for text in "ab"]
    prompt = encode_prompt("row", answered[:1], processor)
    for row in rows:
        assert row["qformer_input_ids"].shape[0] == len(row["pixel_values"]) == 2
        for question in row["qformer_input_ids"]:
            assert torch.equal(question, prompt["qformer_input_ids"][0])
            assert processor.qformer_tokenizer.decode(question) == "[CLS]One?"


def test_a_row_without_images_does_not_depend_on_the_images_of_its_batch(tmp_path: Path) -> None:
    """Mllama of transformers lets it attend to the empty images that pad it; a correction of the loaded model does not."""
    processor = _processor("mllama")
    answer = _turn("assistant", "yes")
    rows = [encode_sample(Sample("row", [*QUESTIONS[name], answer]), processor) for name in ("text", "image", "adjacent_images")]
    for row in rows:
        del row["labels"]
    model = tf.AutoModelForImageTextToText.from_pretrained(write_tiny_base(SEPARATE_CASES["mllama"].base, tmp_path / "base"))
    length = rows[0]["input_ids"].shape[1]
    with torch.no_grad():
        alone = [model(**row).logits[0] for row in rows]
        plain = model(**collate(rows, 0)).logits
        family_of("mllama").prepare_model(model)
        corrected = model(**collate(rows, 0)).logits
    assert not torch.allclose(plain[0, :length], alone[0], atol=1e-3)
    for row, logits in enumerate(alone):
        torch.testing.assert_close(corrected[row, : len(logits)], logits, rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_the_padding_before_its_prompt(tmp_path: Path) -> None:
    """Kosmos-2 of transformers counts padding in the positions of generated tokens; a correction of the loaded model does not."""
    case, processor = SEPARATE_CASES["kosmos-2"], _processor("kosmos-2")
    processor.chat_template = resolve_chat_template("question_answer", processor.tokenizer, image_token=None)
    questions = ("Is it?", "What is on the mat, the bird or the cat and two dogs?")
    prompts = [encode_prompt("row", [_turn("user", _image("red"), question)], processor) for question in questions]
    model = tf.AutoModelForImageTextToText.from_pretrained(write_tiny_base(case.base, tmp_path / "base"))
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that the answer depends on the positions

    def answers(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        batch = collate(rows, processor.tokenizer.pad_token_id, "left")
        output = model.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        return output[:, batch["input_ids"].shape[1] :]

    alone = torch.cat([answers([row]) for row in prompts])
    plain = answers(prompts)
    family_of("kosmos-2").prepare_model(model)
    assert not torch.equal(plain, alone)
    assert torch.equal(answers(prompts), alone)
    assert torch.equal(torch.cat([answers([row]) for row in prompts]), alone)
