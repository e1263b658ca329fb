"""Padded batches equal those of the family's own processor for the same conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from family_processors import FAMILIES
from PIL import Image

from mmtune.data.batching.collate import collate, pack
from mmtune.data.encoding.encode import encode_prompt, encode_sample
from mmtune.data.message import Message, Sample
from mmtune.families.family_table import family_of
from mmtune.models.packed_attention import check_packable, verify_packing
from mmtune.models.tiny.tiny_bases import BASES

SIZES = [[(60, 40)], [], [(150, 40), (30, 90)], [(100, 200)], []]
"""Width and height of each sample's images."""
WORDS = ["what is it?", "nothing to see, yes or no?", "two", "the cat is on the mat", "yes?"]


def conversations(folder: Path, open_images: bool = True) -> list[list[Message]]:
    samples = []
    for number, (sizes, words) in enumerate(zip(SIZES, WORDS, strict=True)):
        content: list[dict[str, Any]] = []
        for place, size in enumerate(sizes if open_images else []):
            path = folder / f"{number}_{place}.png"
            # Neither flat nor like another: what is joined in the wrong order does not compare equal.
            Image.radial_gradient("L").resize(size).rotate(37 * number + 11 * place).convert("RGB").save(path)
            content.append({"type": "image", "image": path})
        samples.append([{"role": "user", "content": [*content, {"type": "text", "text": words}]}])
    return samples


def of_the_processor(processor: Any, talks: list[list[Message]], side: str) -> dict[str, torch.Tensor]:
    texts = [processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) for talk in talks]
    images = [[Image.open(block["image"]) for block in talk[0]["content"] if block["type"] == "image"] for talk in talks]
    begun = texts[0].startswith(processor.tokenizer.bos_token or "\0")  # the tokenizer would add another
    own = processor(
        text=texts,
        images=images if any(images) else None,
        padding=True,
        padding_side=side,
        return_tensors="pt",
        add_special_tokens=not begun,
    )
    return {key: own[key] for key in own if key != "labels"}  # PaliGemma's mark the whole answer side, here the prompt's


def assert_same(batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    for key in expected:
        assert torch.equal(batch[key], expected[key]), key


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_the_processors_own(family: str, side: str, tmp_path: Path) -> None:
    processor = FAMILIES[family]()
    talks = conversations(tmp_path)
    if family == "paligemma":  # its processor needs an image in every conversation
        talks = [talk for talk in talks if len(talk[0]["content"]) > 1]
    encoded = [encode_prompt("r", talk, processor) for talk in talks]
    assert_same(collate(encoded, processor.tokenizer.pad_token_id, side), of_the_processor(processor, talks, side))


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"paligemma"}))
def test_a_text_only_batch_has_no_media(family: str, tmp_path: Path) -> None:
    processor = FAMILIES[family]()
    talks = conversations(tmp_path, open_images=False)
    batch = collate([encode_prompt("r", talk, processor) for talk in talks], processor.tokenizer.pad_token_id)
    assert_same(batch, of_the_processor(processor, talks, "right"))


def test_padding_is_not_supervised_and_not_attended(tmp_path: Path) -> None:
    processor = FAMILIES["idefics3"]()
    encoded = samples(processor, tmp_path)
    batch = collate(encoded, processor.tokenizer.pad_token_id)
    for row, sample in enumerate(encoded):
        length = sample["input_ids"].shape[1]
        assert torch.equal(batch["labels"][row, :length], sample["labels"][0])
        assert (batch["labels"][row, length:] == -100).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)


# ----------------------------------------------------------------------------------------------------- on models


def samples(processor: Any, folder: Path) -> list[dict[str, torch.Tensor]]:
    answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "a photo of two dogs"}]}
    return [encode_sample(Sample("r", [*talk, answer]), processor) for talk in conversations(folder)]


def model_for(family: str, processor: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForImageTextToText.from_config(BASES[family].config(processor))
    with torch.no_grad():  # large enough that what one token sees of another shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.mark.parametrize("family", sorted(name for name in FAMILIES if family_of(name).unpackable is None))
def test_a_model_answers_a_batch_as_it_answers_each_sample(family: str, tmp_path: Path) -> None:
    processor = FAMILIES[family]()
    model, encoded = model_for(family, processor), samples(processor, tmp_path)
    pad = processor.tokenizer.pad_token_id
    alone = [collate([sample], pad) for sample in encoded]
    check_packable(model)
    verify_packing(model, collate(encoded, pad), alone)
    verify_packing(model, pack(encoded), alone)
