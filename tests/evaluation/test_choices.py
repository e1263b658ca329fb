"""Multiple-choice scoring: a candidate's log-likelihood equals minus the loss of plain transformers times its tokens."""

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
    """Multiple-choice questions of different lengths: without an image, with one, with two, and after an earlier turn."""
    first, second, *_ = iterate_rows(IndexedSamples([Source(path=str(rows), template="llava")]))
    words = [{"type": "text", "text": "a rather longer question, with no image at all"}]
    question, answer = second.messages
    image = first.messages[0]["content"][0]
    conversations = [
        [{"role": "user", "content": words}, answer],
        first.messages,
        [{"role": "user", "content": [image, *question["content"]]}, answer],
        [*first.messages, {"role": "user", "content": words}, answer],
    ]
    return [Sample(f"r[{n}]", messages, choices=CHOICES[: n + 2]) for n, messages in enumerate(conversations)]


def _reference_score(model: Any, processor: Any, sample: Sample, choice: str) -> float:
    """The log-likelihood of one candidate from plain transformers' loss."""
    conversation: list[dict[str, Any]] = []
    for message in [*sample.messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": choice}]}]:
        blocks = [
            {**block, "image": Image.open(block["image"]).convert("RGB")} if block["type"] == "image" else block
            for block in message["content"]
        ]
        conversation.append({"role": message["role"], "content": blocks})
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(conversation, **settings)
    prompt = processor.apply_chat_template(conversation[:-1], add_generation_prompt=True, **settings)
    start, end = prompt["input_ids"].shape[1], inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][:, :start], prompt["input_ids"])
    assert processor.tokenizer.decode(inputs["input_ids"][0, start:]) == f"{choice}<|end|>"  # with the end-of-turn token
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return -float(model(**inputs, labels=labels).loss) * (end - start)


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_scores_equal_those_of_plain_transformers(
    answering_llava: tuple[Any, Any], samples: list[Sample], batch_size: int
) -> None:
    scores = score_choices(*answering_llava, samples, batch_size)
    expected = [[_reference_score(*answering_llava, sample, choice) for choice in sample.choices] for sample in samples]
    assert [len(sample_scores) for sample_scores in scores] == [2, 3, 4, 5]
    for sample_scores, reference in zip(scores, expected, strict=True):
        assert sample_scores == pytest.approx(reference, rel=1e-4, abs=1e-4)
        assert len({round(score, 2) for score in reference}) == len(reference)  # distinct, so that the order is tested


def test_scoring_uses_no_gradient_and_restores_module_modes(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
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


def test_logits_are_computed_for_answer_positions_only(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = answering_llava
    widths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    try:
        score_choices(model, processor, [replace(samples[0], choices=("a", "b"))], 2)
    finally:
        hook.remove()
    assert widths == [2]  # a letter and the end-of-turn token


def test_a_question_with_one_choice_is_an_error(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    with pytest.raises(RowError, match=r"^r\[0\]: choices: expected at least 2 candidate answers, got 1; evaluate\.score: "):
        score_choices(*answering_llava, [replace(samples[0], choices=("yes",))], 2)


def test_the_first_of_equally_likely_choices_is_selected(samples: list[Sample]) -> None:
    assert most_likely_choice(samples[2], (-3.0, -1.0, -2.0, -1.0)) == "no"


def test_evaluate_with_choices_predicts_the_most_likely_class(tmp_path: Path, answering_llava: tuple[Any, Any]) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "text": text, "label": label} for text, label in (("It is red.", 1), ("It is blue.", 0))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    verbalizer = {"0": "wrong", "1": "right"}
    source = {"path": str(tmp_path / "rows.jsonl"), "template": "image_text_match", "verbalizer": verbalizer}
    section = EvaluateSection.model_validate({"data": [source], "score": "choices", "batch_size": 3})
    check_questions(section)
    answers = evaluate(*answering_llava, section)
    samples = list(iterate_rows(IndexedSamples(section.data)))
    expected = [max(verbalizer.values(), key=lambda word: _reference_score(*answering_llava, sample, word)) for sample in samples]
    assert [answer.prediction for answer in answers] == expected
    assert [answer.references for answer in answers] == [("right",), ("wrong",)]
    assert [answer.score for answer in answers] == [e == r for e, r in zip(expected, ["right", "wrong"], strict=True)]


def test_score_choices_with_a_template_without_options_is_an_error(rows: Path) -> None:
    section = EvaluateSection(data=(Source(path=str(rows), template="llava"),), score="choices")
    with pytest.raises(UserError, match=r"rows\.json\[0\]: choices: expected at least 2 candidate answers, got 0"):
        check_questions(section)


def test_any_reference_answer_is_correct(
    tmp_path: Path, answering_llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "where?", "answers": ["ucsf", "University of California", "UC"]}] * 3
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}), encoding="utf-8")
    predictions = ["university of california.", "UCSF", "California"]
    monkeypatch.setattr("mmtune.evaluation.answering.generate_answers", lambda *_: predictions)
    source = Source(path=str(tmp_path / "rows.json"), template="docvqa")
    answers = evaluate(*answering_llava, EvaluateSection(data=(source,), metric="exact_match"))
    assert [answer.score for answer in answers] == [1, 1, 0]
    assert {answer.references for answer in answers} == {("ucsf", "University of California", "UC")}
