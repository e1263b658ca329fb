"""The serving check: an engine's answers to held-out questions, compared with those of the trained model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmtune.data.message import Sample, prompt_messages
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.serving.causes import find_cause, find_hidden_cause, find_token_cause
from mmtune.serving.engine_client import EngineAnswer, EngineClient, RequestRejected
from mmtune.serving.served_question import ServedQuestion, log_probability_difference
from mmtune.serving.trained_answers import TrainedModel
from mmtune.serving.unread_parts import find_unread_parts
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import read_record, replace_text, report_disk_errors

RECORDED_CHECKS = 20


@dataclass(frozen=True)
class ServingResult:
    """Result of the serving check.

    Attributes:
        questions: the number of questions.
        same_prompt_tokens: questions for which both count the same number of prompt tokens.
        same_answers: questions with the same greedy answer.
        failed_answers: questions without an answer to compare, because the engine failed at it.
        not_asked: questions with a video or audio, which the check does not send.
        unread_parts: what the engine does to conversations, keys of `unread_parts.PARTS`, and the number of questions. These are
            compared as the engine reads them.
        cause: the cause of the difference; None without one.
        rounding: whether every differing answer is explained by computing in bf16.
        largest_log_probability_difference: over the tokens of equal answers; None if the engine gives none.
        answers: id, both answers and both token counts of each question.
    """

    questions: int
    same_prompt_tokens: int
    same_answers: int
    failed_answers: int
    not_asked: int
    unread_parts: dict[str, int]
    cause: str | None
    rounding: bool
    largest_log_probability_difference: float | None
    answers: list[dict[str, object]]


def check_serving(engine: EngineClient, model: TrainedModel, questions: Sequence[Sample]) -> ServingResult:
    """Compare an engine with the trained model on held-out questions.

    The answers are greedy. A difference that rounding to bf16 explains is a warning: the numbers of prompt tokens agree, and
    every differing answer departs at a token where the two largest fp32 logits differ by less than twice the largest change of
    such a difference when the trained model computes in bf16.

    Raises:
        UserError: all questions have a video or audio.
        CheckFailed: the engine differs; the message names the cause, and the result has the answers.
    """
    asked = [question for question in questions if _has_images_only(question)]
    if not asked:
        raise UserError(f"all {len(questions)} questions have a video or audio, which the check does not send to an engine")
    compared = []
    with EvaluationProgress("trained model and engine", len(asked), "questions") as progress:
        for question in asked:
            compared.append(_compare(engine, model, question))
            progress.update(1)
    differences = [
        log_probability_difference(question.trained, question.engine)
        for question in compared
        if question.same_answer and question.engine and not question.engine.parts
    ]
    difference = max((each for each in differences if each is not None), default=None)
    cause, rounding = None, False
    try:
        if not all(question.same_tokens for question in compared):
            cause = find_token_cause(engine, model, compared)
        elif not all(question.same_answer for question in compared):
            cause, rounding = find_cause(engine, model, compared)
        elif all(question.failed for question in compared):
            cause = f"the engine fails at every answer: {compared[0].rejection}"
        else:
            cause = find_hidden_cause(engine, model, compared, difference)
    except RequestRejected as error:
        raise CheckFailed(f"{engine.root}: the engine rejects a question that it answered before: {error}") from error
    result = ServingResult(
        questions=len(compared),
        same_prompt_tokens=sum(question.same_tokens for question in compared),
        same_answers=sum(question.same_answer and not question.failed for question in compared),
        failed_answers=sum(question.failed for question in compared),
        not_asked=len(questions) - len(asked),
        unread_parts=dict(Counter(part for question in compared for part in question.unread)),
        cause=cause,
        rounding=rounding,
        largest_log_probability_difference=difference,
        answers=[_record(question) for question in compared],
    )
    if cause is not None and not rounding:
        raise CheckFailed(f"{_counts(result)}: {cause}{_example(compared)}", asdict(result))
    return result


def record_check(path: Path, engine: str, weights: str, result: Mapping[str, Any], outcome: str) -> None:
    """Add the result of a serving check to the last ones in a run's `serving.json`, which its report shows.

    Args:
        path: the file.
        engine: the address of the engine and the name of its model.
        weights: the run or checkpoint that it was compared with.
        result: a `ServingResult` as a dictionary.
        outcome: `passed`, or what differs.
    """
    difference = result["largest_log_probability_difference"]
    check = {
        "time": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "engine": engine,
        "compared with": weights,
        "same prompt tokens": f"{result['same_prompt_tokens']} of {result['questions']}",
        "same answers": f"{result['same_answers']} of {result['questions']}",
        "largest log-probability difference": "" if difference is None else f"{difference:.2g}",
        "result": outcome,
    }
    earlier = read_record(path, checks=list)["checks"] if path.is_file() else []
    with report_disk_errors(path):
        replace_text(path, json.dumps({"checks": [*earlier, check][-RECORDED_CHECKS:]}, indent=2) + "\n")


def _compare(engine: EngineClient, model: TrainedModel, question: Sample) -> ServedQuestion:
    messages = prompt_messages(question)
    trained = model.answer(question)
    try:
        answer = engine.ask(messages, model.max_new_tokens, question.tools)
    except RequestRejected as error:
        return ServedQuestion(question, trained, _prompt_alone(engine, question) if error.failed else None, str(error))
    differs = answer.prompt_tokens != trained.prompt_tokens
    if differs and (read := find_unread_parts(model, question, answer.prompt_tokens)) is not None:
        return ServedQuestion(read[0], model.answer(read[0]), answer, unread=read[1])
    return ServedQuestion(question, trained, answer)


def _prompt_alone(engine: EngineClient, question: Sample) -> EngineAnswer | None:
    """The engine's number of prompt tokens; None if it fails at the question itself.

    `transformers serve` fails at an answer that it cannot parse, such as a tool call that ends with `max_new_tokens`.
    """
    try:
        return replace(engine.ask(prompt_messages(question), 1, question.tools), text="", parts=())
    except RequestRejected:
        return None


def _has_images_only(question: Sample) -> bool:
    return all(block["type"] in ("text", "image") for message in prompt_messages(question) for block in message["content"])


def _counts(result: ServingResult) -> str:
    return (
        f"prompt tokens agree for {result.same_prompt_tokens} of {result.questions} questions, answers for {result.same_answers}"
    )


def _example(compared: Sequence[ServedQuestion]) -> str:
    """The first question that differs."""
    first = next((each for each in compared if not (each.same_tokens and each.same_answer)), None)
    if first is None:
        return ""
    if first.engine is None:
        return f"\n{first.sample.id}: the engine answers {first.rejection}"
    return (
        f"\n{first.sample.id}: {first.prompt_tokens} prompt tokens and {_short(first.trained.text)} from the trained model, "
        f"{first.engine.prompt_tokens} and {_short(first.engine.text)} from the engine"
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _record(question: ServedQuestion) -> dict[str, object]:
    engine = question.engine
    return {
        "id": question.sample.id,
        "prompt_tokens": question.prompt_tokens,
        "engine_prompt_tokens": engine.prompt_tokens if engine else None,
        "answer": question.trained.text,
        "engine_answer": question.rejection or (engine.text if engine else ""),
    }
