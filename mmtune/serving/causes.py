"""Causes of a difference between engine and trained model, found by further questions that each differ for one reason only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mmtune.data.message import Message, RowError, Sample, prompt_messages, text_message, text_of
from mmtune.serving.engine_client import EngineClient, RequestRejected
from mmtune.serving.served_question import ServedQuestion, log_probability_difference, shown_text
from mmtune.serving.trained_answers import TrainedModel
from mmtune.serving.unread_parts import find_unread_parts

SHORT = "What is this? Answer with one word."
SYSTEM = "Answer in English."
TEXT_QUESTIONS = ("Hello", SHORT, "Count from one to ten.", "Is two more than one? Answer yes or no.")
LONG_TOKENS = 512
"""Two questions are made longer than any of the run by this many words and twice as many, to find a limit of the context."""
EXACT = 1e-3
"""Log-probabilities that differ by less need no measurement of rounding."""
OWN_QUESTIONS = 8
"""Questions of the run that are asked without their images."""
BASE_ANSWERS = 8
"""Questions on which the engine is compared with the untuned base."""


def find_token_cause(engine: EngineClient, model: TrainedModel, compared: Sequence[ServedQuestion]) -> str:
    """Why an engine counts another number of prompt tokens.

    Two long questions find a limit of the context. Questions of text alone, with and without a system prompt, tell a default
    system prompt from another chat template. The rest are the images.
    """
    images = _images_of_probes(engine, model, compared)
    short = _difference(engine, model, [_user(SHORT, images)])
    if short is None:
        rejection = next((each.rejection for each in compared if each.rejection), "its own output has the reason")
        return f"the engine rejects a short question: {rejection}"
    if (limit := _context_limit(engine, model, compared, images)) is not None:
        return limit
    if short:
        with_system = _difference(engine, model, [_system(), _user(SHORT, images)])
        if with_system == 0:
            return (
                f"the default system prompt: without a system message the engine's prompt is {_longer(short)}, with one both are "
                "the same. Serve the chat template of the release"
            )
        return (
            f"the chat template: the engine's prompt of a short question is {_longer(short)}. Serve the release with its own "
            "chat_template.jinja, and without an option that replaces it"
        )
    differing = [each for each in compared if not each.same_tokens]
    if rejected := [each for each in differing if each.engine is None]:
        return f"the engine rejects {len(rejected)} of the questions: {rejected[0].rejection}"
    for each in differing:
        if not each.sample.images or _texts_differ(engine, model, each.sample):
            return "the chat template: it writes a conversation of several turns, or its tools, in another way"
    return (
        "the image size: questions of text alone agree, and those with images do not. The engine's processor has other pixel "
        "bounds or another image size than that of the release (preprocessor_config.json, processor_config.json, or an option "
        "of the engine such as --mm-processor-kwargs or --image-max-tokens), or writes other tokens around an image"
    )


def find_cause(engine: EngineClient, model: TrainedModel, compared: Sequence[ServedQuestion]) -> tuple[str, bool]:
    """Why an engine gives other answers although it counts the same prompt tokens, and whether rounding explains it."""
    differing = [each for each in compared if not each.same_answer]
    if answers_as_base(model, compared):
        return (
            "the weights: the engine answers as the untuned base does. The adapter is not applied or not merged; serve the "
            "result of `mmtune merge`",
            False,
        )
    answered = _text_answers(engine, model, differing)
    if any(chat != ours == raw for ours, chat, raw in answered):
        return (
            "the chat template: it has as many tokens, but other ones. With the rendered prompt as text the engine answers as "
            "trained, as a chat it does not",
            False,
        )
    if penalties := _answers_with_penalties(engine, model, differing):
        return (
            f"generation settings: the engine applies {penalties} of generation_config.json, which training and evaluation do "
            "not use. Remove them from the release, or override them in the request",
            False,
        )
    gaps = [gap_at_departure(model, each) for each in differing]
    tolerance = 2 * model.rounding([(each.sample, each.trained) for each in compared])
    if max(gaps) < tolerance:
        return (
            f"rounding: every differing answer departs at a token whose two largest logits differ by less than {tolerance:.2g} "
            f"(at most {max(gaps):.2g}), which computing in bf16 explains",
            True,
        )
    again = engine.ask(prompt_messages(differing[0].sample), model.max_new_tokens, differing[0].sample.tools)
    if differing[0].engine is not None and again.text != differing[0].engine.text:
        return "sampling: the engine answers the same question in two ways although temperature 0 is requested", False
    if answered and all(chat == ours for ours, chat, _ in answered) and all(each.sample.images for each in differing):
        return (
            "the images: answers to questions of text alone are the same. The engine prepares images in another way (resizing, "
            "mean and standard deviation), has them elsewhere in the prompt, or has another vision tower or projector",
            False,
        )
    return (
        f"the weights: an answer departs at a token whose two largest logits differ by {max(gaps):.2g}, and computing in bf16 "
        f"changes such a difference by at most {tolerance / 2:.2g}. The engine serves other weights than those of the run",
        False,
    )


def find_hidden_cause(
    engine: EngineClient, model: TrainedModel, compared: Sequence[ServedQuestion], difference: float | None
) -> str | None:
    """A cause although all answers are the same; None without one.

    Prints a line if the untuned base gives the same answers too, so that they do not show which of the two is served, and one if
    log-probabilities differ for questions with images alone: llama.cpp does not resize images as training does.

    Args:
        difference: the largest difference of a token's log-probability; None if the engine gives none.
    """
    answered = [(each.sample, each.trained) for each in compared]
    if model.has_base:
        base = model.answers_of_base([sample for sample, _ in answered[:BASE_ANSWERS]])
        if all(shown_text(ours.text) == shown_text(trained.text) for ours, (_, trained) in zip(base, answered, strict=False)):
            print("warning: the untuned base gives the same answers, so they do not show whether the tuned weights are served")
    if difference is None or difference < EXACT:
        return None
    of_text = _difference_without_images(engine, model)
    if difference <= 2 * (tolerance := model.rounding(answered)):
        return None
    if of_text is not None and of_text <= 2 * tolerance:
        print(
            f"warning: the images: the answers are the same, but the log-probability of a token differs by {difference:.2g}, and "
            f"by {of_text:.2g} for questions of text alone. The engine prepares images in another way (resizing, mean and "
            "standard deviation), or has another vision tower or projector"
        )
        return None
    return (
        f"the weights: the answers are the same, but the log-probability of a token differs by {difference:.2g}, and computing "
        f"in bf16 changes the gap between two logits by at most {tolerance:.2g}"
    )


def _difference_without_images(engine: EngineClient, model: TrainedModel) -> float | None:
    """The largest difference of a token's log-probability in answers to questions of text alone, infinite if an answer differs.

    None for a family or an engine without such questions.
    """
    largest = 0.0
    for text in TEXT_QUESTIONS:
        try:
            ours, theirs = model.answer([_user(text)]), engine.ask([_user(text)], model.max_new_tokens)
        except (RequestRejected, RowError):
            return None
        if shown_text(ours.text) != shown_text(theirs.text):
            return math.inf
        largest = max(largest, log_probability_difference(ours, theirs) or 0.0)
    return largest


def _user(text: str, images: Sequence[dict[str, object]] = ()) -> Message:
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def _system() -> Message:
    return text_message("system", SYSTEM)


def _images_of_probes(engine: EngineClient, model: TrainedModel, compared: Sequence[ServedQuestion]) -> list[dict[str, object]]:
    """No image, or one image of the run where the family or the engine takes no question without one."""
    if _difference(engine, model, [_user(SHORT)]) is not None:
        return []
    blocks = (block for each in compared for message in each.sample.messages for block in message["content"])
    return [block for block in blocks if block["type"] == "image"][:1]


def _difference(engine: EngineClient, model: TrainedModel, messages: list[Message]) -> int | None:
    """How many prompt tokens more the engine counts; None if one side takes no such question."""
    try:
        expected = model.prompt_tokens(messages)
        return engine.ask(messages, 1).prompt_tokens - expected
    except (RequestRejected, RowError):
        return None


def _longer(difference: int) -> str:
    count = f"{abs(difference)} token{'s' if abs(difference) > 1 else ''}"
    return f"{count} longer than in training" if difference > 0 else f"{count} shorter than in training"


def _context_limit(
    engine: EngineClient, model: TrainedModel, compared: Sequence[ServedQuestion], images: list[dict[str, object]]
) -> str | None:
    """The limit that two long questions of different lengths meet, or that keeps the engine from answering long questions."""
    words = max(each.prompt_tokens for each in compared) + LONG_TOKENS
    long = [[_user(f"Count:{' one' * count}", images)] for count in (words, words + LONG_TOKENS)]
    try:
        counted = [engine.ask(messages, 1).prompt_tokens for messages in long]
    except RequestRejected:
        return _rejected_length(engine, compared, images)
    reached = any(each.prompt_tokens >= counted[0] for each in compared if not each.same_tokens)
    if counted[0] != counted[1] or not reached:
        return None
    return (
        f"a truncated context: of a question with {model.prompt_tokens(long[0])} tokens the engine reads {counted[0]}. Serve "
        "with a longer context (vLLM: --max-model-len), and remove `truncation` from the release's tokenizer.json"
    )


def _rejected_length(engine: EngineClient, compared: Sequence[ServedQuestion], images: list[dict[str, object]]) -> str | None:
    """The limit of an engine that rejects long questions: all that it rejects are longer than all that it answers.

    A question of text that is as long as the shortest rejected one must be rejected too.
    """
    rejected = min((each.prompt_tokens for each in compared if each.engine is None), default=0)
    longest = max((each.prompt_tokens for each in compared if each.engine is not None), default=0)
    if rejected <= longest:
        return None
    try:
        engine.ask([_user(f"Count:{' one' * rejected}", images)], 1)
    except RequestRejected as error:
        return f"a truncated context: the engine rejects long questions, answers up to {longest} tokens ({error})"
    return None


def answers_as_base(model: TrainedModel, compared: Sequence[ServedQuestion]) -> bool:
    """Whether the engine gives the base's answers to all questions that base and trained model answer differently."""
    answered = [each for each in compared if not each.failed]
    groups = ([each for each in answered if each.same_answer == same][:BASE_ANSWERS] for same in (False, True))
    asked = [each for group in groups for each in group]
    base = model.answers_of_base([each.sample for each in asked])
    telling = [
        (each, answer)
        for each, answer in zip(asked, base, strict=True)
        if shown_text(answer.text) != shown_text(each.trained.text)
    ]
    return bool(telling) and all(
        each.engine is not None and shown_text(answer.text) == shown_text(each.engine.text) for each, answer in telling
    )


def _texts_differ(engine: EngineClient, model: TrainedModel, question: Sample) -> bool:
    """Whether the engine counts another number of tokens for a question without its images, and `PARTS` do not explain it."""
    texts = replace(question, messages=[_text_alone(message) for message in question.messages])
    try:
        expected = model.prompt_tokens(prompt_messages(texts), texts.tools)
        counted = engine.ask(prompt_messages(texts), 1, texts.tools).prompt_tokens
    except (RequestRejected, RowError):  # a family without questions of text alone
        return False
    return counted != expected and find_unread_parts(model, texts, counted) is None


def _text_alone(message: Message) -> Message:
    return {**message, "content": [block for block in message["content"] if block["type"] == "text"]}


def _answers_with_penalties(engine: EngineClient, model: TrainedModel, differing: Sequence[ServedQuestion]) -> str | None:
    """The settings of the generation config with which the trained model gives the engine's answers.

    A repetition penalty is also switched off in the engine, which must then answer as trained: a single answer can change in the
    same way by rounding.
    """
    if not (penalties := model.penalties):
        return None
    for each in differing:
        assert each.engine is not None
        if shown_text(model.answer(each.sample, penalties).text) != shown_text(each.engine.text):
            return None
        if penalties.keys() == {"repetition_penalty"}:
            answer = engine.ask_without_penalty(prompt_messages(each.sample), model.max_new_tokens, each.sample.tools)
            if shown_text(answer) != shown_text(each.trained.text):
                return None
    return ", ".join(f"{name} {value}" for name, value in penalties.items())


def _text_answers(
    engine: EngineClient, model: TrainedModel, differing: Sequence[ServedQuestion]
) -> list[tuple[str, str, str | None]]:
    """Answers to questions of text alone: of the trained model, of the engine, and of the engine to the rendered prompt."""
    answers = []
    own = [text_of(prompt_messages(each.sample)[-1]) for each in differing]
    for text in dict.fromkeys((*TEXT_QUESTIONS, *own[:OWN_QUESTIONS])):
        messages = [_user(text)]
        try:
            ours = model.answer(messages)
            chat = engine.ask(messages, model.max_new_tokens)
        except (RequestRejected, RowError):  # a family without questions of text alone
            return []
        raw = engine.complete_text(model.rendered(messages), model.max_new_tokens)
        same_prompt = raw is not None and raw.prompt_tokens == ours.prompt_tokens
        answers.append(
            (shown_text(ours.text), shown_text(chat.text), shown_text(raw.text) if raw is not None and same_prompt else None)
        )
    return answers


def gap_at_departure(model: TrainedModel, question: ServedQuestion) -> float:
    """The gap between the two largest logits at the first token of the trained answer that the engine's does not have.

    If the text does not show which, the smallest gap of the possible tokens: those of one character, and all tokens of an answer
    with `parts`.
    """
    assert question.engine is not None
    trained, served = question.trained, question.engine.text.strip()
    if question.engine.parts:
        return min(trained.gaps)
    shared = 0
    for position in range(len(trained.tokens)):
        text = model.decode(trained.tokens[: position + 1]).lstrip()
        if not served.startswith(text.rstrip("\ufffd").rstrip()):
            return min(trained.gaps[shared : position + 1])
        if not text.endswith("\ufffd"):
            shared = position + 1
    return min(trained.gaps[shared:] or trained.gaps[-1:])  # the engine's answer has more after the end of turn
