"""Comparison of single answers, and the causes that need no engine to be shown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from mmtune.data.message import Sample, text_of
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.serving.causes import answers_as_base, find_hidden_cause, find_token_cause, gap_at_departure
from mmtune.serving.engine_client import EngineAnswer, EngineClient, RequestRejected, openai_message
from mmtune.serving.served_question import ServedQuestion
from mmtune.serving.serving_check import check_serving
from mmtune.serving.trained_answers import TrainedAnswer
from mmtune.serving.unread_parts import find_unread_parts
from mmtune.utils.errors import CheckFailed, UserError


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
    question = ServedQuestion(sample, TrainedAnswer(trained, 3, [], [], [], []), EngineAnswer(served, 3))
    assert question.same_answer is same


class Answers:
    """A trained model with given answers of its base."""

    has_base = True
    max_new_tokens = 1

    def __init__(self, base: list[str], rounding: float = 0.1) -> None:
        self._base = base
        self._rounding = rounding

    def answers_of_base(self, samples: list[Sample]) -> list[TrainedAnswer]:
        return [answer(self._base[int(sample.id)]) for sample in samples]

    def rounding(self, _: Any) -> float:
        return self._rounding

    def answer(self, _: Any) -> TrainedAnswer:
        return TrainedAnswer("yes", 3, [], [-1.0], [], [])


def answer(text: str) -> TrainedAnswer:
    return TrainedAnswer(text, 3, [], [], [], [])


def questions(trained: list[str], served: list[str]) -> list[ServedQuestion]:
    return [
        ServedQuestion(Sample(str(number), []), answer(ours), EngineAnswer(theirs, 3))
        for number, (ours, theirs) in enumerate(zip(trained, served, strict=True))
    ]


def test_one_answer_that_is_the_bases_is_not_the_base() -> None:
    """One of four answers is the base's by chance; the engine answers the others as trained."""
    base: Any = Answers(["no", "no", "no", "yes"])
    trained = ["yes", "yes", "no", "yes"]
    assert not answers_as_base(base, questions(trained, ["no", "yes", "no", "yes"]))
    assert answers_as_base(base, questions(trained, ["no", "no", "no", "yes"]))
    assert not answers_as_base(Answers(trained), questions(trained, ["no", "yes", "no", "yes"]))  # type: ignore[arg-type]


class Engine:
    """An engine whose log-probability differs by this much for questions of text alone."""

    def __init__(self, difference: float) -> None:
        self._difference = difference

    def ask(self, *_: Any) -> EngineAnswer:
        return EngineAnswer("yes", 3, (-1.0 - self._difference,))


def test_equal_answers_may_hide_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    trained = ["yes", "no"]
    tuned: Any = Answers(["yes", "yes"], rounding=0.1)
    engine: Any = Engine(0.25)
    for difference, cause in ((None, None), (1e-5, None), (0.15, None), (0.25, "the weights: the answers are the same")):
        named = find_hidden_cause(engine, tuned, questions(trained, trained), difference)
        assert named is None if cause is None else str(named).startswith(cause)
    assert capsys.readouterr().out == ""
    images: Any = Engine(0.01)
    assert find_hidden_cause(images, tuned, questions(trained, trained), 0.25) is None
    assert "warning: the images: the answers are the same, but the log-probability of a token differs by 0.25, and by 0.01" in (
        capsys.readouterr().out
    )
    untuned: Any = Answers(trained)
    assert find_hidden_cause(engine, untuned, questions(trained, trained), None) is None
    assert "warning: the untuned base gives the same answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "same"), [(("f", "what", "a cat"), True), (("I look", "f"), False), (("f", "what", "a dog"), False)]
)
def test_the_parts_of_an_answer_are_compared_by_their_words(parts: tuple[str, ...], same: bool) -> None:
    trained = answer('<tool_call>{"name": "f", "arguments": {"what": "a cat"}}</tool_call>')
    assert ServedQuestion(Sample("0", []), trained, EngineAnswer("f({})", 3, parts=parts)).same_answer is same


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_is_a_part_by_the_name_of_each_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers serve` 5.23 and llama.cpp say reasoning_content, vLLM 0.32 reasoning."""
    message = {"role": "assistant", "content": "a cat", name: "It has ears."}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    reply = {"id": "0", "created": 0, "model": "m", "object": "chat.completion", "usage": usage}
    reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": message}]
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=reply))
    monkeypatch.setattr("openai.DefaultHttpxClient", lambda **_: httpx2.Client(transport=transport))
    asked = EngineClient("http://engine").ask([{"role": "user", "content": block("What is it?")}], 8)
    assert asked == EngineAnswer("a cat", 3, parts=("It has ears.", "a cat"))


class Counting:
    """A trained model whose prompts have one token for each word of text, reasoning and names."""

    def prompt_tokens(self, messages: list[dict[str, Any]], _: Any) -> int:
        parts = [[text_of(message), message.get("reasoning_content", ""), message.get("name", "")] for message in messages]
        return sum(len(part.split()) for message in parts for part in message)


@pytest.mark.parametrize(
    ("counted", "parts"),
    [
        (8, ("leaves out the text beside a tool call",)),
        (9, ("leaves out reasoning_content",)),
        (7, ("leaves out reasoning_content", "leaves out the name of a tool result")),
        (4, ("leaves out the text beside a tool call", "leaves out reasoning_content", "leaves out the name of a tool result")),
        (6, ("leaves out the text beside a tool call", "leaves out reasoning_content")),
        (3, None),
        (12, None),
    ],
)
def test_parts_that_an_engine_leaves_out_are_found_by_the_number_of_tokens(counted: int, parts: tuple[str, ...] | None) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    turns = [
        {"role": "user", "content": block("Find it now")},
        {"role": "assistant", "content": block("I look here"), "reasoning_content": "a b", "tool_calls": [call]},
        {"role": "tool", "content": block("found"), "name": "the finder"},
        {"role": "assistant", "content": block("It is found")},
    ]
    read = find_unread_parts(Counting(), Sample("0", turns), counted)  # type: ignore[arg-type]
    assert (read and read[1]) == parts
    assert read is None or (read[0].messages[0], read[0].messages[-1]) == (turns[0], turns[-1])


def test_a_schema_without_description_is_read_as_vllm_writes_it() -> None:
    """vLLM 0.32 gives chat templates the keys of OpenAI's API, with null for a missing description."""

    class Schemas:
        def prompt_tokens(self, _: Any, tools: Any) -> int:
            return len(json.dumps(tools))

    function = {"name": "find", "description": None, "parameters": {"type": "object"}}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}, "response": {}}}
    turns = [{"role": "user", "content": block("Find it")}, {"role": "assistant", "content": block("yes")}]
    written = ({"type": "function", "function": function},)
    read = find_unread_parts(Schemas(), Sample("0", turns, tools=(tool,)), len(json.dumps(written)))  # type: ignore[arg-type]
    assert read is not None and read[0].tools == written and read[0].messages == turns
    assert read[1][0].startswith('writes "description": null') and len(read[1]) == 1


def test_a_call_without_text_has_no_content() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    contents = [
        openai_message({"role": "assistant", "content": content, "tool_calls": [call]})["content"]
        for content in ([], block(""), block("I look"))
    ]
    assert contents == [None, None, "I look"]


def block(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def test_questions_with_video_alone_are_an_error() -> None:
    turns = [{"role": "user", "content": [{"type": "video", "video": "0.mp4"}]}, {"role": "assistant", "content": block("a")}]
    with pytest.raises(UserError, match="all 1 questions have a video or audio"):
        check_serving(None, None, [Sample("0", turns)])  # type: ignore[arg-type]


def test_the_progress_bar_ends_before_an_error_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        def answer(self, _: Any) -> TrainedAnswer:
            raise CheckFailed("the engine ended")

    ended: list[bool] = []
    monkeypatch.setattr(EvaluationProgress, "__exit__", lambda *_: ended.append(True))
    asked: Any = [Sample("a", [{"role": "user", "content": []}, {"role": "assistant", "content": []}])]
    engine: Any = None
    model: Any = Ends()
    with pytest.raises(CheckFailed) as caught:  # its traceback keeps the frames alive, as while it is printed
        check_serving(engine, model, asked)
    assert ended and caught.value.result is None


class Words:
    """A trained model, and an engine with a limit of the context or without images; a prompt has one token for each word."""

    def __init__(self, limit: int = 10_000, images: bool = True) -> None:
        self._limit = limit
        self._images = images

    def prompt_tokens(self, messages: list[dict[str, Any]], _: Any = ()) -> int:
        blocks = [block for message in messages for block in message["content"]]
        return sum(len(block["text"].split()) if block["type"] == "text" else 50 for block in blocks)

    def ask(self, messages: list[dict[str, Any]], *_: Any) -> EngineAnswer:
        if any(block["type"] == "image" for message in messages for block in message["content"]) and not self._images:
            raise RequestRejected("HTTP 400: Invalid token", False)
        if (counted := self.prompt_tokens(messages)) > self._limit:
            raise RequestRejected("HTTP 400: too long", False)
        return EngineAnswer("", counted)


@pytest.mark.parametrize(
    ("engine", "cause"),
    [
        (Words(limit=30), "a truncated context: the engine rejects long questions, answers up to 3 tokens (HTTP 400: too long)"),
        (Words(limit=300, images=False), "the engine rejects 1 of the questions: HTTP 400: Invalid token"),
    ],
)
def test_an_engine_without_images_has_no_truncated_context(engine: Any, cause: str) -> None:
    samples = [
        Sample("0", [{"role": "user", "content": [*images, *block("What is it?")]}]) for images in ([], [{"type": "image"}])
    ]
    compared = []
    for sample in samples:
        trained = replace(answer("a"), prompt_tokens=engine.prompt_tokens(sample.messages))
        try:
            compared.append(ServedQuestion(sample, trained, engine.ask(sample.messages)))
        except RequestRejected as error:
            compared.append(ServedQuestion(sample, trained, None, str(error)))
    assert find_token_cause(engine, engine, compared) == cause


class Characters:
    """A model whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("served", "gap"),
    [
        ("ab", 1.0),  # the trained answer is "aéb", and the engine left out the character of two tokens: its first one differs
        ("aê", 1.0),  # one of the two tokens
        ("aéc", 3.0),
        ("aéb and more", 4.0),
        ("x", 5.0),
    ],
)
def test_the_gap_where_an_answer_departs(served: str, gap: float) -> None:
    trained = TrainedAnswer("aéb", 3, [*"aéb".encode(), 0], [], [], [5.0, 1.0, 2.0, 3.0, 4.0])
    question = ServedQuestion(Sample("0", []), trained, EngineAnswer(served, 3))
    assert gap_at_departure(Characters(), question) == gap  # type: ignore[arg-type]
