"""When an engine's answer counts as the trained model's."""

from __future__ import annotations

import pytest
import torch

from mmtune.data.message import Sample
from mmtune.serving.engine_client import EngineAnswer
from mmtune.serving.served_question import ServedQuestion
from mmtune.serving.trained_answers import TrainedAnswer


@pytest.mark.parametrize(
    ("trained", "served", "same"),
    [
        ("two dogs", " two dogs\n", True),
        ("一只\ufffd", "一只", True),  # max_new_tokens ends within a character: vLLM 0.32 leaves it out, transformers does not
        ("一\ufffd只", "一只", False),
        ("two dogs", "two dog", False),
    ],
)
def test_an_answer_that_ends_within_a_character(trained: str, served: str, same: bool) -> None:
    sample = Sample(id="a", messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}]}])
    question = ServedQuestion(sample, 3, TrainedAnswer(trained, [], torch.zeros(0, 4)), EngineAnswer(served, 3))
    assert question.same_answer is same
