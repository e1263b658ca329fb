"""Evaluation: batched answers equal those of plain `model.generate` on single prompts; scores equal hand counts."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtune.data.dataset import IndexedSamples, iterate_rows
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import RowError, Sample
from mmtune.evaluation.answers import Answer, group_scores, score_answers, scores_to_dicts
from mmtune.evaluation.answers_file import read_answers, write_answers
from mmtune.evaluation.evaluate import evaluate
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.predictions import answering, running
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.recipe.recipe import EvaluateSection, Source

torch.set_num_threads(1)


def _section(rows: Path, **settings: Any) -> EvaluateSection:
    return EvaluateSection(data=(Source(path=str(rows), template="llava"),), max_new_tokens=6, **settings)


def _reference_answer(model: Any, processor: Any, sample: Sample) -> str:
    """The answer to one question from plain transformers."""
    prompt = [
        {
            "role": message["role"],
            "content": [
                {**block, "image": Image.open(block["image"]).convert("RGB")} if block["type"] == "image" else block
                for block in message["content"]
            ],
        }
        for message in sample.messages[:-1]
    ]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(prompt, **settings)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    text: str = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture(scope="module")
def samples(rows: Path) -> list[Sample]:
    """Questions of different lengths: with an image, without one, with two, and after an earlier turn."""
    first, second, *rest = iterate_rows(IndexedSamples([Source(path=str(rows), template="llava")]))
    words = [{"type": "text", "text": "a rather longer question, with no image at all, that pads the others on their left"}]
    question, answer = second.messages
    image = first.messages[0]["content"][0]
    return [
        Sample("text", [{"role": "user", "content": words}, answer]),
        first,
        Sample("two", [{"role": "user", "content": [image, *question["content"]]}, answer]),
        Sample("turns", [*first.messages, {"role": "user", "content": words}, answer]),
        *rest[:2],
    ]


@pytest.fixture(scope="module")
def reference_answers(answering_llava: tuple[Any, Any], samples: list[Sample]) -> list[str]:
    return [_reference_answer(*answering_llava, sample) for sample in samples]


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_batched_answers_equal_single_answers(
    answering_llava: tuple[Any, Any], samples: list[Sample], reference_answers: list[str], batch_size: int
) -> None:
    answers = generate_answers(*answering_llava, samples, max_new_tokens=6, batch_size=batch_size)
    assert answers == reference_answers
    assert len(set(answers)) > 1  # distinct, so that the order is tested


def test_other_processes_encode_the_questions(
    answering_llava: tuple[Any, Any],
    samples: list[Sample],
    reference_answers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encode(*arguments: Any) -> Any:
        (tmp_path / str(os.getpid())).touch()
        return encode_prompt(*arguments)

    monkeypatch.setattr(answering, "encode_prompt", encode)
    monkeypatch.setattr(running, "QUESTIONS_PER_PROCESS", 2)
    monkeypatch.setattr(running, "core_share", lambda: 3)
    assert generate_answers(*answering_llava, samples, max_new_tokens=6, batch_size=2) == reference_answers
    processes = [path.name for path in tmp_path.iterdir()]
    assert len(processes) == 2 and str(os.getpid()) not in processes
    broken = [{"role": role, "content": [{"type": "text", "text": "half of \ud83d"}]} for role in ("user", "assistant")]
    with pytest.raises(RowError, match=r"^row: messages\[0\]: the text is not valid Unicode"):
        generate_answers(*answering_llava, [*samples, Sample("row", broken)], max_new_tokens=2, batch_size=2)


def test_tensors_become_arrays_and_tensors_again() -> None:
    shared = torch.randn(2, 3).bfloat16()
    first = {"transposed": torch.randn(2, 3).T, "empty": torch.zeros(0, 5), "media": shared}
    second = {"bool": torch.tensor([[True, False]]), "scalar": torch.tensor(3.5, dtype=torch.float64), "media": shared}
    received = running._Arrays([first, second]).as_tensors()
    for before, each in zip((first, second), received, strict=True):
        assert before.keys() == each.keys()
        assert all(each[name].dtype == before[name].dtype and torch.equal(each[name], before[name]) for name in before)
    assert received[0]["media"] is received[1]["media"]


def test_no_questions_give_no_answers(answering_llava: tuple[Any, Any]) -> None:
    assert generate_answers(*answering_llava, [], max_new_tokens=6, batch_size=4) == []


def test_generation_restores_module_modes(answering_llava: tuple[Any, Any], samples: list[Sample]) -> None:
    model, processor = answering_llava
    model.train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    modes: list[bool] = []
    hook = model.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    try:
        generate_answers(model, processor, samples[:1], max_new_tokens=2, batch_size=1)
        assert {name: module.training for name, module in model.named_modules()} == before
        assert modes and not any(modes)
    finally:
        hook.remove()
        model.eval()


def test_a_question_that_cannot_be_encoded_is_an_error_with_its_row_id(answering_llava: tuple[Any, Any]) -> None:
    turns = [{"role": role, "content": [{"type": "text", "text": "half of \ud83d"}]} for role in ("user", "assistant")]
    with pytest.raises(RowError, match=r"^row: messages\[0\]: the text is not valid Unicode"):
        generate_answers(*answering_llava, [Sample("row", turns)], max_new_tokens=2, batch_size=1)
    with pytest.raises(RowError, match=r"^row: messages: expected an answer as the last turn of the conversation"):
        generate_answers(*answering_llava, [Sample("row", turns[:1])], max_new_tokens=2, batch_size=1)


def test_evaluate_scores_the_text_after_answer_after(
    rows: Path, answering_llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(rows.read_text())
    references = [row["conversations"][1]["value"] for row in content]
    final = [reference.rpartition("Answer:")[2] for reference in references]
    predictions = [*references[:8], f"Answer: not {final[8]}", "", "no idea", final[11]]
    monkeypatch.setattr(
        "mmtune.evaluation.predictions.answering.generate_predictions", lambda *_: [Prediction(text) for text in predictions]
    )
    answers = evaluate(*answering_llava, _section(rows, answer_after="Answer:"))
    assert [answer.score for answer in answers] == [1] * 8 + [0] * 4
    assert [answer.parsed for answer in answers] == [True] * 9 + [False] * 3  # those without the marker are unparsed
    assert [answer.score for answer in evaluate(*answering_llava, _section(rows))] == [1] * 8 + [0] * 4
    assert [answer.references for answer in answers] == [(reference,) for reference in references]
    assert [answer.id for answer in answers] == [f"rows.json[{number}]" for number in range(12)]
    assert [answer.task for answer in answers] == [row["task"] for row in content]
    assert answers[0].question == content[0]["conversations"][0]["value"].removeprefix("<image>\n")
    assert [Path(answer.images[0]).name for answer in answers] == [f"{number:05d}.png" for number in range(12)]
    assert [answer.cluster for answer in answers] == [answer.images[0] for answer in answers]
    assert {answer.source for answer in answers} == {None}  # the recipe has one source


def test_rows_without_a_task_are_scored_by_their_source(
    rows: Path, answering_llava: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(rows.read_text())
    for name, chunk in {"a.json": content[:2], "b.json": content[2:5]}.items():
        without_task = [{key: value for key, value in row.items() if key != "task"} for row in chunk]
        (tmp_path / name).write_text(json.dumps(without_task))
    sources = [Source(path=str(tmp_path / name), template="llava", media_root=str(rows.parent)) for name in ("a.json", "b.json")]
    section = EvaluateSection(data=(*sources, Source(path=str(rows), template="llava", limit=1)), max_new_tokens=6)
    monkeypatch.setattr(
        "mmtune.evaluation.predictions.answering.generate_predictions",
        lambda model, processor, samples, *_: [Prediction("?")] * len(samples),
    )
    scores = group_scores(evaluate(*answering_llava, section))
    assert [(each.task, each.questions) for each in scores] == [
        ("a.json", 2),
        ("b.json", 3),
        (content[0]["task"], 1),  # a row with a task counts in its task
        ("overall", 6),
    ]


def test_progress_without_a_terminal_is_a_line_every_30_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 10.0, 20.0, 42.0, 50.0])
    with EvaluationProgress("before tuning", 40, clock=lambda: next(times)) as progress:
        for _ in range(4):
            progress.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "before tuning: 10 of 40 questions, about 00:30 left",
        "before tuning: 30 of 40 questions, about 00:14 left",
    ]
    times = iter([0.0, 1.0, 2.0])
    with EvaluationProgress("short", 2, clock=lambda: next(times)) as progress:
        progress.update(1)
        progress.update(1)
    assert capsys.readouterr().err == ""


def test_a_held_out_row_that_cannot_be_read_stops_the_evaluation(tmp_path: Path, answering_llava: tuple[Any, Any]) -> None:
    (tmp_path / "r.jsonl").write_text('{"conversations": []}')
    with pytest.raises(RowError, match=r"r\.jsonl:1: conversations"):
        evaluate(*answering_llava, _section(tmp_path / "r.jsonl"))


def _answer(task: str | None, prediction: str, reference: str = "1 2. Answer: yes", **changes: Any) -> Answer:
    answer = Answer(
        "r", task, "?", (), (reference,), prediction, cluster=str(id(object())), metric="exact_match", answer_after="Answer:"
    )
    return dataclasses.replace(answer, **changes)


def test_scores_per_task_and_overall() -> None:
    answers = [
        _answer("b", "Answer: yes", cluster="1"),
        _answer("a", "no", cluster="2"),
        _answer("b", "so Answer: yes", cluster="3"),
        _answer("b", "Answer: yes", "x. Answer: no", cluster="4"),
        _answer(None, "x. Answer: Yes.", cluster="5"),
    ]
    answers = score_answers(answers)
    scores = group_scores(answers)
    assert [(s.task, s.questions, s.score, s.baseline) for s in scores] == [
        ("b", 3, 2 / 3, 2 / 3),
        ("a", 1, 0, 1),
        ("untitled", 1, 1, 1),
        ("overall", 5, 3 / 5, 4 / 5),
    ]
    assert scores[0].interval == pytest.approx((0.20765, 0.93851), abs=1e-5)  # scipy.stats.binomtest(2, 3), wilson
    assert json.loads(json.dumps(scores_to_dicts(scores)))[3]["score"] == 0.6
    assert [s.task for s in group_scores(answers[:1])] == ["overall"]


def test_written_answers_are_read_back_unchanged(tmp_path: Path) -> None:
    odd = "line\nbreak \u2028 \u2029 \x85 \x0b \x1c \r\n é 猫 <|end|>"
    answers = [
        _answer(None, odd, odd, question=odd, images=("a.png", "b.png"), options=("x", "y")),
        _answer("t", "", id="caf\udce9.json[0]"),
    ]
    write_answers(answers, tmp_path / "a.jsonl")
    assert read_answers(tmp_path / "a.jsonl") == answers
