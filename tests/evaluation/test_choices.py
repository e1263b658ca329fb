"""A candidate's log-likelihood is minus what plain transformers gives as its loss, times its tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.message import RowError, Sample
from mmtune.evaluation.choices import most_likely_choice, score_choices
from mmtune.evaluation.evaluate import check_questions, evaluate
from mmtune.recipe.recipe import EvaluateSection, Source
from mmtune.utils.errors import UserError

torch.set_num_threads(1)

CHOICES = ("yes", "no", "yes indeed, and rather more of it", "A", "7")


@pytest.fixture(scope="module")
def samples(rows: Path) -> list[Sample]:
    """Closed questions of different lengths: with an image, without one, with two, after an earlier turn, after a system's."""
    first, second, *_ = iterate_rows(IndexedSamples([Source(path=str(rows), template="llava")]))
    words = [{"type": "text", "text": "a rather longer question, with no image at all"}]
    question, answer = second.messages
    image = first.messages[0]["content"][0]
    talks = [
        [{"role": "user", "content": words}, answer],
        first.messages,
        [{"role": "user", "content": [image, *question["content"]]}, answer],
        [*first.messages, {"role": "user", "content": words}, answer],
    ]
    return [Sample(f"r[{n}]", talk, choices=CHOICES[: n + 2]) for n, talk in enumerate(talks)]


def _plain(model: Any, processor: Any, sample: Sample, choice: str) -> float:
    """One candidate through transformers alone, its loss summed."""
    talk: list[dict[str, Any]] = []
    for message in [*sample.messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": choice}]}]:
        blocks = [
            {**block, "image": Image.open(block["image"]).convert("RGB")} if block["type"] == "image" else block
            for block in message["content"]
        ]
        talk.append({"role": message["role"], "content": blocks})
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = processor.apply_chat_template(talk, **settings)
    asked = processor.apply_chat_template(talk[:-1], add_generation_prompt=True, **settings)
    start, end = asked["input_ids"].shape[1], whole["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :start], asked["input_ids"])
    written = processor.tokenizer.decode(whole["input_ids"][0, start:])
    assert written == f"{choice}<|end|>"  # the candidate, and the token that ends the turn
    labels = whole["input_ids"].clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return -float(model(**whole, labels=labels).loss) * (end - start)


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_scores_are_those_of_plain_transformers(answering_llava: tuple[Any, Any], samples: list[Sample], batch_size: int) -> None:
    scores = score_choices(*answering_llava, samples, batch_size)
    expected = [[_plain(*answering_llava, sample, choice) for choice in sample.choices] for sample in samples]
    assert [len(of_it) for of_it in scores] == [2, 3, 4, 5]
    for of_it, of_plain in zip(scores, expected, strict=True):
        assert of_it == pytest.approx(of_plain, rel=1e-4, abs=1e-4)
        assert len({round(score, 2) for score in of_plain}) == len(of_plain)  # so that their order means something


def test_no_gradient_and_every_module_keeps_its_mode(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = answering_llava
    model.train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen: list[tuple[bool, bool]] = []
    hook = model.model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    try:
        score_choices(model, processor, samples[:1], 2)
        assert {name: module.training for name, module in model.named_modules()} == before
        assert seen == [(False, False)]
    finally:
        hook.remove()
        model.eval()


def test_only_the_answer_is_given_the_vocabularys_width(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = answering_llava
    widths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    try:
        score_choices(model, processor, [replace(samples[0], choices=("a", "b"))], 2)
    finally:
        hook.remove()
    assert widths == [2]  # a letter and the end of the turn


def test_an_open_question_is_refused(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    with pytest.raises(RowError, match=r"^r\[0\]: choices: 1 candidate answers; evaluate\.score: choices needs a template with"):
        score_choices(*answering_llava, [replace(samples[0], choices=("yes",))], 2)


def test_the_likeliest_is_the_first_of_equals(samples: list[Sample]) -> None:
    assert most_likely_choice(samples[2], (-3.0, -1.0, -2.0, -1.0)) == "no"


def test_an_evaluation_scores_classes(tmp_path: Path, answering_llava: tuple[Any, Any]) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "text": text, "label": label} for text, label in (("It is red.", 1), ("It is blue.", 0))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = {"0": "wrong", "1": "right"}
    source = {"path": str(tmp_path / "rows.jsonl"), "template": "image_text_match", "verbalizer": words}
    section = EvaluateSection.model_validate({"data": [source], "score": "choices", "batch_size": 3})
    check_questions(section)
    answers = evaluate(*answering_llava, section)
    asked = list(iterate_rows(IndexedSamples(section.data)))
    expected = [max(words.values(), key=lambda word: _plain(*answering_llava, sample, word)) for sample in asked]
    assert [answer.prediction for answer in answers] == expected
    assert [answer.reference for answer in answers] == ["right", "wrong"]
    assert [answer.correct for answer in answers] == [e == r for e, r in zip(expected, ["right", "wrong"], strict=True)]


def test_an_open_template_cannot_be_scored_by_choices(rows: Path) -> None:
    section = EvaluateSection(data=(Source(path=str(rows), template="llava"),), score="choices")
    with pytest.raises(UserError, match=r"rows\.json\[0\]: choices: 0 candidate answers"):
        check_questions(section)


def test_any_accepted_answer_is_right(tmp_path: Path, answering_llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "where?", "answers": ["ucsf", "University of California", "UC"]}] * 3
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    said = ["university of california.", "UCSF", "California"]
    monkeypatch.setattr("mmtune.evaluation.evaluate.generate_answers", lambda *_: said)
    answers = evaluate(*answering_llava, EvaluateSection(data=(Source(path=str(tmp_path / "rows.json"), template="docvqa"),)))
    assert [answer.correct for answer in answers] == [True, True, False]
    assert {answer.reference for answer in answers} == {"ucsf"}
