"""Multiple-choice scoring: a candidate's log-likelihood is that of a plain forward pass of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES
from PIL import Image

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.encoding.encode import encode_sample
from mmtune.data.media.media import image_size
from mmtune.data.message import RowError, Sample
from mmtune.evaluation.evaluate import check_questions, evaluate
from mmtune.evaluation.predictions.answering import predict_answers
from mmtune.evaluation.predictions.choices import choice_prediction, score_choices
from mmtune.evaluation.predictions.likelihood_choice import content_free_sample, most_likely_choices
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.evaluation.predictions.prompt_cache import shares_prompt
from mmtune.models.load import load_base, resolve_model
from mmtune.models.tiny.tiny_bases import write_tiny_base
from mmtune.recipe.prompt_sections import ChoiceScores
from mmtune.recipe.recipe import EvaluateSection, ModelSection, Source
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
    """The log-likelihood of one candidate from the logits of plain transformers."""
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
    with torch.no_grad():
        log_probabilities = model(**inputs).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[at - 1, inputs["input_ids"][0, at]]) for at in range(start, end))


@pytest.fixture(scope="module")
def reference_scores(answering_llava: tuple[Any, Any], samples: list[Sample]) -> list[list[float]]:
    return [[_reference_score(*answering_llava, sample, choice) for choice in sample.choices] for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_scores_equal_those_of_plain_transformers(
    answering_llava: tuple[Any, Any], samples: list[Sample], reference_scores: list[list[float]], batch_size: int
) -> None:
    scores = score_choices(*answering_llava, samples, batch_size)
    assert [len(sample_scores) for sample_scores in scores] == [2, 3, 4, 5]
    for sample_scores, reference in zip(scores, reference_scores, strict=True):
        assert sample_scores == pytest.approx(reference, rel=1e-5)
        assert len({round(score, 2) for score in reference}) == len(reference)  # distinct, so that the order is tested


def test_scores_in_double_precision_equal_those_of_plain_transformers(
    answering_llava: tuple[Any, Any], samples: list[Sample]
) -> None:
    model, processor = copy.deepcopy(answering_llava[0]).double(), answering_llava[1]
    expected = [[_reference_score(model, processor, sample, choice) for choice in sample.choices] for sample in samples]
    for sample_scores, reference in zip(score_choices(model, processor, samples, 4), expected, strict=True):
        assert sample_scores == pytest.approx(reference, rel=0, abs=1e-9)


@pytest.mark.parametrize(("batch_size", "passes"), [(99, 2), (14, 2), (8, 6), (1, 4 + 14)])
def test_a_prompt_goes_through_the_model_once(
    answering_llava: tuple[Any, Any], samples: list[Sample], batch_size: int, passes: int
) -> None:
    """Of 4 questions with 14 candidates and 4 images, the prompts of a batch are one pass and its candidates another."""
    model, processor = answering_llava
    calls: list[tuple[int, int]] = []
    images: list[int] = []
    hooks = [
        model.model.language_model.register_forward_hook(lambda _, __, outputs: calls.append(outputs[0].shape[:2])),
        model.model.vision_tower.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0]))),
    ]
    try:
        score_choices(model, processor, samples, batch_size)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == passes
    assert sum(images) == sum(len(sample.images) for sample in samples) == 4
    assert sum(rows for rows, _ in calls) == 4 + 14


@pytest.mark.parametrize("family", ["florence2", "gemma3"])
def test_a_prompt_that_cannot_be_shared_is_computed_with_each_candidate(family: str, tmp_path: Path, rows: Path) -> None:
    """Florence-2 is an encoder-decoder model, and Gemma 3 has sliding windows."""
    case = CASES[family]
    section = ModelSection(base=str(write_tiny_base(case.base, tmp_path / "base")), chat_template=case.base.required_template)
    model, processor = load_base(resolve_model(section), seed=0)
    assert not shares_prompt(model)
    [sample, other] = [*iterate_rows(IndexedSamples([Source(path=str(rows), template="llava", limit=2)]))]
    questions = [replace(sample, choices=CHOICES), replace(other, choices=CHOICES[:2])]
    scores = score_choices(model, processor, questions, 3)
    for question, question_scores in zip(questions, scores, strict=True):
        for choice, score in zip(question.choices, question_scores, strict=True):
            answer = {"role": "assistant", "content": [{"type": "text", "text": choice}]}
            inputs = encode_sample(replace(question, messages=[*question.messages[:-1], answer]), processor, supervise="last")
            labels = inputs.pop("labels")[:, 1:]
            with torch.no_grad():
                logits = model(**inputs).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
            assert score == pytest.approx(-float(loss), rel=1e-5)


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
        assert seen == [(False, False)] * 2  # the prompt, then its candidates
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
    assert widths == [1, 1]  # the last token of the prompt predicts a letter, which predicts the end-of-turn token


def test_a_question_with_one_choice_is_an_error(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    with pytest.raises(RowError, match=r"^r\[0\]: choices: expected at least 2 candidate answers, got 1; evaluate\.score: "):
        score_choices(*answering_llava, [replace(samples[0], choices=("yes",))], 2)


def test_the_first_of_equally_likely_choices_is_selected(samples: list[Sample]) -> None:
    assert choice_prediction(samples[2], (-3.0, -1.0, -2.0, -1.0), (1, 1, 1, 1)).text == "no"


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
    monkeypatch.setattr(
        "mmtune.evaluation.predictions.answering.generate_predictions", lambda *_: [Prediction(text) for text in predictions]
    )
    source = Source(path=str(tmp_path / "rows.json"), template="docvqa")
    answers = evaluate(*answering_llava, EvaluateSection(data=(source,), metric="exact_match"))
    assert [answer.score for answer in answers] == [1, 1, 0]
    assert {answer.references for answer in answers} == {("ucsf", "University of California", "UC")}


def _closed(samples: list[Sample]) -> list[Sample]:
    """The questions with an image, twice with another one."""
    return [replace(sample, choices=CHOICES) for sample in (samples[1], samples[2])]


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_log_likelihoods_are_adjusted(
    answering_llava: tuple[Any, Any], samples: list[Sample], per_token: bool, calibrate: bool, tmp_path: Path
) -> None:
    model, processor = answering_llava
    section = EvaluateSection.model_validate(
        {
            "data": [{"path": "x", "template": "llava"}],
            "score": "choices",
            "choice_scores": {"per_token": per_token, "calibrate": calibrate},
        }
    )
    questions = _closed(samples)
    predictions = predict_answers(model, processor, questions, section, "scoring")
    Image.new("RGB", image_size(questions[0].images[0]), (127, 127, 127)).save(tmp_path / "grey.png")
    for sample, prediction in zip(questions, predictions, strict=True):
        grey = [
            {
                **message,
                "content": [{**b, "image": tmp_path / "grey.png"} if b["type"] == "image" else b for b in message["content"]],
            }
            for message in sample.messages
        ]
        expected = []
        for choice in CHOICES:
            score = _reference_score(model, processor, sample, choice)
            if calibrate:
                score -= _reference_score(model, processor, replace(sample, messages=grey), choice)
            tokens = len(processor.tokenizer(f"{choice}<|end|>", add_special_tokens=False).input_ids)
            expected.append(score / tokens if per_token else score)
        assert prediction.scores == pytest.approx(expected, rel=1e-4, abs=2e-4)
        assert prediction.text == CHOICES[max(range(len(expected)), key=expected.__getitem__)]


def test_a_content_free_question_is_computed_once(samples: list[Sample]) -> None:
    asked: list[list[Sample]] = []

    def predict(questions: Sequence[Sample], label: str) -> list[Prediction]:
        asked.append(list(questions))
        return [Prediction("", scores=(-1.0,) * len(CHOICES), tokens=(1,) * len(CHOICES)) for _ in questions]

    one, other = _closed(samples)
    most_likely_choices([one, one, other, one], ChoiceScores(calibrate=True), predict, "scoring")
    assert [len(questions) for questions in asked] == [4, 2]
    with pytest.raises(RowError, match=r"choices: evaluate\.choice_scores\.calibrate needs a question with an image"):
        content_free_sample(samples[0])


def test_choice_scores_without_score_choices_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs score: choices; give it, or leave choice_scores out"):
        EvaluateSection.model_validate({"data": [{"path": "x", "template": "llava"}], "choice_scores": {"per_token": True}})
