"""The serving check: an engine's answers to held-out questions, compared with those of the trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from mmtune.data.message import Sample, prompt_messages
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.serving.causes import find_cause, find_hidden_cause, find_token_cause
from mmtune.serving.engine_client import EngineClient, RequestRejected
from mmtune.serving.served_question import ServedQuestion
from mmtune.serving.trained_answers import TrainedModel
from mmtune.utils.errors import CheckFailed


@dataclass(frozen=True)
class ServingResult:
    """Result of the serving check.

    Attributes:
        questions: the number of questions.
        same_prompt_tokens: questions for which both count the same number of prompt tokens.
        same_answers: questions with the same greedy answer, or one that cannot be compared.
        parsed_answers: questions whose answer cannot be compared, because the engine took tool calls or reasoning out of it.
        cause: the cause of the difference; None without one.
        rounding: whether every differing answer is explained by computing in bf16.
        largest_log_probability_difference: over the tokens of equal answers; None if the engine gives none.
        answers: id, both answers and both token counts of each question.
    """

    questions: int
    same_prompt_tokens: int
    same_answers: int
    parsed_answers: int
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
        CheckFailed: the engine differs; the message names the cause, and the result has the answers.
    """
    compared = [_compare(engine, model, question) for question in _shown(questions)]
    difference = _log_probability_difference(compared)
    cause, rounding = None, False
    try:
        if not all(question.same_tokens for question in compared):
            cause = find_token_cause(engine, model, compared)
        elif not all(question.same_answer for question in compared):
            cause, rounding = find_cause(engine, model, compared)
        else:
            cause = find_hidden_cause(model, compared, difference)
    except RequestRejected as error:
        raise CheckFailed(f"{engine.root}: the engine rejects a question that it answered before: {error}") from error
    result = ServingResult(
        questions=len(compared),
        same_prompt_tokens=sum(question.same_tokens for question in compared),
        same_answers=sum(question.same_answer for question in compared),
        parsed_answers=sum(question.engine is not None and question.engine.parsed for question in compared),
        cause=cause,
        rounding=rounding,
        largest_log_probability_difference=difference,
        answers=[_record(question) for question in compared],
    )
    if cause is not None and not rounding:
        raise CheckFailed(f"{_counts(result)}: {cause}{_example(compared)}", asdict(result))
    return result


def _shown(questions: Sequence[Sample]) -> Iterator[Sample]:
    with EvaluationProgress("trained model and engine", len(questions), "questions") as progress:
        for question in questions:
            yield question
            progress.update(1)


def _compare(engine: EngineClient, model: TrainedModel, question: Sample) -> ServedQuestion:
    messages = prompt_messages(question)
    trained = model.answer(question)
    try:
        return ServedQuestion(question, trained, engine.ask(messages, model.max_new_tokens, question.tools))
    except RequestRejected as error:
        return ServedQuestion(question, trained, None, str(error))


def _log_probability_difference(compared: Sequence[ServedQuestion]) -> float | None:
    """Over the tokens that both sides have: an engine may leave out the end of turn."""
    differences = [
        abs(ours - theirs)
        for question in compared
        if question.same_answer and question.engine and not question.engine.parsed and question.engine.log_probabilities
        for ours, theirs in zip(question.trained.log_probabilities, question.engine.log_probabilities, strict=False)
    ]
    return max(differences, default=None)


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
        "engine_answer": engine.text if engine else question.rejection,
    }
