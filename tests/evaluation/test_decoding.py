"""Sampled answers and near ties: frequencies of a closed form, the same answers in any batch, the vote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.message import Sample
from mmtune.evaluation.predictions import answering
from mmtune.evaluation.predictions.answering import generate_predictions, predict_answers
from mmtune.evaluation.predictions.choices import choice_prediction
from mmtune.evaluation.predictions.decoding import DecodingSettings, TokenChoice
from mmtune.evaluation.predictions.prediction import Prediction, vote
from mmtune.recipe.recipe import EvaluateSection, Source

torch.set_num_threads(1)

SAMPLED = DecodingSettings(max_new_tokens=6, temperature=0.8, answers=3)


@pytest.fixture(scope="module")
def samples(rows: Path) -> list[Sample]:
    """Questions of different lengths, one of them with two images."""
    first, second, *rest = iterate_rows(IndexedSamples([Source(path=str(rows), template="llava", limit=5)]))
    question, answer = second.messages
    image = first.messages[0]["content"][0]
    return [first, Sample("two", [{"role": "user", "content": [image, *question["content"]]}, answer]), *rest]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_sampled_with_their_probabilities(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -torch.inf])
    count = 4000
    choice = TokenChoice(DecodingSettings(1, temperature, seed=1), [], [f"r{n}" for n in range(count)])
    chosen = choice(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    expected = (logits / temperature).softmax(-1)
    frequencies = torch.bincount(chosen, minlength=5) / count
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_sampled_answers_are_the_same_in_any_batch(
    answering_llava: tuple[Any, Any], samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_predictions(*answering_llava, samples, SAMPLED, batch_size=99)
    assert len({prediction.answers for prediction in expected}) == len(samples)
    assert all(len(prediction.answers) == 3 for prediction in expected)
    assert any(len(set(prediction.answers)) > 1 for prediction in expected)
    assert generate_predictions(*answering_llava, samples, SAMPLED, batch_size=1) == expected
    assert generate_predictions(*answering_llava, samples[::-1][:2], SAMPLED, batch_size=4) == expected[::-1][:2]
    other_seed = DecodingSettings(6, 0.8, 3, seed=1)
    assert generate_predictions(*answering_llava, samples, other_seed, batch_size=99) != expected
    monkeypatch.setattr(answering, "shares_prompt", lambda _: False)  # each answer computes its prompt
    assert generate_predictions(*answering_llava, samples, SAMPLED, batch_size=5) == expected


def test_several_answers_share_the_features_of_their_images(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = answering_llava
    images: list[int] = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    try:
        generate_predictions(model, processor, samples, SAMPLED, batch_size=99)
    finally:
        hook.remove()
    assert images == [sum(len(sample.images) for sample in samples)]


def test_a_greedy_answer_of_which_two_tokens_are_nearly_equal_is_a_near_tie() -> None:
    choice = TokenChoice(DecodingSettings(3), [9], ["clear", "tie", "tie after its end"])
    steps = [
        ([1, 1, 9], [[3.0, 1.0], [3.0, 2.0], [3.0, 1.0]]),
        ([2, 2, 0], [[3.0, 1.0], [3.0, 3.0 - 5e-5], [3.0, 3.0]]),
    ]
    ids = torch.zeros(3, 1, dtype=torch.long)
    for tokens, logits in steps:
        scores = torch.tensor(logits)
        assert torch.equal(choice(ids, scores), scores)
        ids = torch.cat([ids, torch.tensor(tokens)[:, None]], dim=1)
    assert choice.near_ties_of_rows() == [False, True, False]


def test_choices_with_nearly_equal_likelihoods_are_a_near_tie() -> None:
    sample = Sample("r", [], choices=("a", "b", "c"))
    assert choice_prediction(sample, (-2.0, -1.0, -1.00005), (1, 1, 1)).near_tie
    assert not choice_prediction(sample, (-2.0, -1.0, -1.001), (1, 1, 1)).near_tie


def test_the_most_frequent_final_answer_wins() -> None:
    answers = ("it is. Answer: no", "I see. Answer: Yes", "Answer:  yes ", "cut off", "cut off", "cut off")
    assert vote(Prediction("", answers=answers), "Answer:").text == answers[1]
    assert vote(Prediction("", answers=("cut off", "too")), "Answer:").text == "cut off"
    answers = answers[:4]
    assert vote(Prediction("", answers=answers), None).text == answers[0]  # all differ: the first
    assert vote(Prediction("one"), None) == Prediction("one")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {}, "score": "choices"}, "sampling\n  not supported with score: choices"),
        ({"answer_after": "A:", "score": "choices"}, "answer_after\n  not supported with score: choices"),
        ({"sampling": {"temperature": 0.0}}, r"sampling.temperature\n  expected more than 0, got 0.0"),
    ],
)
def test_sampling_settings_that_do_nothing_are_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateSection.model_validate({"data": [{"path": "r.json", "template": "llava"}], **settings})


def test_the_vote_of_a_recipe_is_its_prediction(rows: Path, answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    sampling = {"num_return_sequences": 3, "temperature": 0.8}
    section = EvaluateSection.model_validate(
        {"data": [{"path": str(rows), "template": "llava"}], "max_new_tokens": 6, "sampling": sampling}
    )
    expected = generate_predictions(*answering_llava, samples, SAMPLED, batch_size=16)
    predictions = predict_answers(*answering_llava, samples, section, "")
    assert [each.answers for each in predictions] == [each.answers for each in expected]
    assert all(each.text in each.answers for each in predictions)
