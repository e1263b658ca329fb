"""The questions of held-out rows: all turns, and a prompt around the question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.message import Sample, text_of
from mmtune.evaluation.evaluate import check_questions, evaluate
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.evaluation.predictions.questions import with_prompt
from mmtune.recipe.recipe import EvaluateSection

torch.set_num_threads(1)


@pytest.fixture
def conversations(tmp_path: Path, rows: Path) -> Path:
    """A row of one turn, and one of four: an answer with weight 0, one about the same image again, and the last."""
    image = str(json.loads(rows.read_text())[0]["image"])
    turns = ["<image>How many?", "2", "Sure?", "no", "Really?", "yes", "Why?", "because"]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)
    ]
    messages[3]["weight"] = 0
    content = [{"images": [image], "messages": messages[:2]}, {"images": [image], "messages": messages}]
    shutil.copytree(rows.parent / "images", tmp_path / "images")
    (tmp_path / "turns.json").write_text(json.dumps(content))
    return tmp_path / "turns.json"


def _section(path: Path, **settings: Any) -> EvaluateSection:
    return EvaluateSection.model_validate(
        {"data": [{"path": str(path), "template": "messages"}], "max_new_tokens": 4, **settings}
    )


def test_every_turn_is_a_question_after_the_answers_of_the_row(answering_llava: tuple[Any, Any], conversations: Path) -> None:
    section = _section(conversations, turns="all", cache=False)
    check_questions(section)
    answers = evaluate(*answering_llava, section)
    assert [(answer.id, answer.question, answer.references) for answer in answers] == [
        ("turns.json[0]", "How many?", ("2",)),
        ("turns.json[1]#1", "How many?", ("2",)),
        ("turns.json[1]#2", "Really?", ("yes",)),
        ("turns.json[1]", "Why?", ("because",)),
    ]
    assert len({answer.cluster for answer in answers}) == 1
    [one, four] = iterate_rows(IndexedSamples(section.sources))
    parts = [one, *(Sample("r", four.messages[:end]) for end in (2, 6, 8))]
    expected = generate_answers(*answering_llava, parts, max_new_tokens=4, batch_size=1)
    assert [answer.prediction for answer in answers] == [text.strip() for text in expected]
    last = evaluate(*answering_llava, _section(conversations))
    assert last == [answers[0], answers[3]]


def test_a_prompt_surrounds_the_last_question_only(answering_llava: tuple[Any, Any], conversations: Path) -> None:
    prompt = "Look closely. {question}\nThink step by step, then write 'Answer:'."
    section = _section(conversations, prompt=prompt, answer_after="Answer:")
    samples = list(iterate_rows(IndexedSamples(section.sources)))
    changed = [with_prompt(sample, prompt) for sample in samples]
    assert text_of(changed[0].messages[0]) == "Look closely. How many?\nThink step by step, then write 'Answer:'."
    assert [block["type"] for block in changed[0].messages[0]["content"]] == ["image", "text"]
    assert changed[1].messages[:6] == samples[1].messages[:6]
    assert text_of(changed[1].messages[6]).startswith("Look closely. Why?")
    answers = evaluate(*answering_llava, section)
    expected = generate_answers(*answering_llava, changed, max_new_tokens=4, batch_size=1)
    assert [answer.prediction for answer in answers] == [text.strip() for text in expected]
    assert [answer.question for answer in answers] == ["How many?", "Why?"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Think."}, r"prompt\n  expected \{question\} once, where the question stands, got 'Think.'"),
        ({"turns": "all", "score": "choices"}, "turns\n  all is not supported with score: choices"),
        (
            {"turns": "all", "data": [{"path": "r", "template": "vqa", "shots": {"count": 1, "path": "r"}}]},
            "turns\n  all is not supported with shots of a source",
        ),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _section(Path("r.json"), **settings)
