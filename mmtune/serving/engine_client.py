"""Questions to a served model through its OpenAI-compatible API."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import httpx2
import openai

from mmtune.chat_templates.tool_calls import leaves
from mmtune.data.media.media import blank_image, open_image
from mmtune.data.message import Message
from mmtune.utils.errors import CheckFailed, UserError

GREEDY = {"temperature": 0.0, "seed": 0}
REASONING = ("reasoning_content", "reasoning")
"""Names of the reasoning in an answer: those of `transformers serve` 5.23 and llama.cpp, and of vLLM 0.32."""


@dataclass(frozen=True)
class EngineAnswer:
    """The answer of an engine to one question.

    Attributes:
        text: the answer.
        prompt_tokens: the number of tokens of the prompt, image tokens included, as the engine counts them.
        log_probabilities: of the tokens of the answer, natural logarithm; None if the engine does not give them.
        parts: reasoning, text, and names, keys and values of tool calls, where the engine took reasoning or tool calls out of the
            text, which thus is not what the model wrote; empty otherwise.
    """

    text: str
    prompt_tokens: int
    log_probabilities: tuple[float, ...] | None = None
    parts: tuple[str, ...] = ()


class RequestRejected(Exception):
    """The engine answers one request with an error.

    Args:
        message: the engine's words.
        failed: whether the engine failed at it (HTTP 500, or a closed connection), instead of rejecting it (HTTP 400).
    """

    def __init__(self, message: str, failed: bool) -> None:
        super().__init__(message)
        self.failed = failed


class EngineClient:
    """Asks a served model.

    Args:
        url: the address of the engine, with or without `/v1`.
        model: the name of the model in the engine; None: the engine's only model.
        timeout_s: how long one answer may take.
        model_option: the option that gives `model`, for messages.

    Raises:
        UserError: the address is not one.
    """

    def __init__(self, url: str, model: str | None = None, timeout_s: float = 600.0, model_option: str = "--model-name") -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--check {url}: expected the address of an engine, such as http://127.0.0.1:8000/v1")
        self.root = url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(
            base_url=f"{self.root}/v1",
            api_key="none",
            timeout=timeout_s,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # a proxy of the environment must not see loopback
        )
        self._gives_log_probabilities = True
        self._model_option = model_option
        self._model: Any = openai.omit if model is None else model

    @property
    def name(self) -> str:
        """The address of the engine and the name of its model."""
        return f"{self._model} at {self.root}"

    def connect(self) -> None:
        """Ask for one token, without the name of a model if none is given: an engine with one model then uses it.

        Raises:
            UserError: the name of the model is needed, or is wrong.
            CheckFailed: no OpenAI-compatible engine answers.
        """
        try:
            self._send_probe()
        except RequestRejected as error:
            listed = self._listed_models()
            if not listed and isinstance(error.__cause__, openai.NotFoundError):
                raise UserError(
                    f"{self.root}/v1/chat/completions: no such address there ({error}); expected the address of an "
                    "OpenAI-compatible engine, such as http://127.0.0.1:8000/v1"
                ) from error
            if self._model is not openai.omit or len(listed) != 1:
                names = ", ".join(listed[:10])
                which = f"; its models: {names}" if listed and self._model not in listed else ""
                if self._model is openai.omit and not error.failed:
                    which = f"; {self._model_option} NAME selects one of several models{names and f' ({names})'}"
                raise UserError(f"{self.root}: the engine rejects a question: {error}{which}") from error
            self._model = listed[0]
            try:
                self._send_probe()
            except RequestRejected as again:
                raise UserError(f"{self.root}: the engine rejects a question to {listed[0]}: {again}") from again

    def _send_probe(self) -> None:
        """Ask a question of text, or one with an image where the model takes no other."""
        text = {"type": "text", "text": "Hello"}
        try:
            self.ask([{"role": "user", "content": [text]}], 1)
        except RequestRejected:
            self.ask([{"role": "user", "content": [{"type": "image", "image": blank_image()}, text]}], 1)

    def _listed_models(self) -> list[str]:
        try:
            return [model.id for model in self._client.models.list()]
        except openai.OpenAIError:  # `transformers serve` fails here without a cache of the hub; the name is then asked for
            return []

    def ask(self, messages: Sequence[Message], max_tokens: int, tools: Sequence[dict[str, Any]] = ()) -> EngineAnswer:
        """The greedy answer to a conversation.

        Args:
            messages: typed messages; images are sent as PNG, with the pixels that training reads.
            max_tokens: at most this many new tokens.
            tools: schemas of functions.

        Raises:
            RequestRejected: the engine answers with an error.
            CheckFailed: it does not answer, or not as an OpenAI-compatible engine.
        """
        request = self._request(messages, max_tokens, tools)
        if self._gives_log_probabilities:
            try:
                return self._complete({**request, "logprobs": True})
            except RequestRejected:
                answer = self._complete(request)  # rejected for another reason: raised again
                self._gives_log_probabilities = False
                return answer
        return self._complete(request)

    def _request(self, messages: Sequence[Message], max_tokens: int, tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
        converted = [openai_message(message) for message in messages]
        return {"messages": converted, "max_tokens": max_tokens, **GREEDY, **({"tools": list(tools)} if tools else {})}

    def _complete(self, request: dict[str, Any]) -> EngineAnswer:
        try:
            completion = self._client.chat.completions.create(model=self._model, **request)
        except openai.OpenAIError as error:
            self._raise(error)
        try:
            choice = completion.choices[0]
            tokens = choice.logprobs.content if choice.logprobs else None
            return EngineAnswer(
                text=_text(choice.message),
                prompt_tokens=int(completion.usage.prompt_tokens),
                log_probabilities=tuple(float(token.logprob) for token in tokens) if tokens else None,
                parts=_parts(choice.message),
            )
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            shown = str(completion)[:200]
            raise CheckFailed(
                f"{self.root}: expected a chat completion with `choices` and `usage.prompt_tokens`, got {shown}; is it an "
                "OpenAI-compatible engine?"
            ) from error

    def ask_without_penalty(self, messages: Sequence[Message], max_tokens: int, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The greedy answer with a repetition penalty of 1, whatever the engine's default. Raises as `ask`."""
        request = self._request(messages, max_tokens, tools)
        try:
            return self._complete({**request, "extra_body": {"repetition_penalty": 1.0}}).text
        except RequestRejected:  # `transformers serve` knows no such key, and sets the penalty to 1 + frequency_penalty
            return self._complete({**request, "frequency_penalty": 0.0}).text

    def complete_text(self, prompt: str, max_tokens: int) -> EngineAnswer | None:
        """The greedy continuation of a rendered prompt (`/v1/completions`); None if the engine has no such endpoint."""
        try:
            completion: Any = self._client.completions.create(
                model=self._model, prompt=prompt, max_tokens=max_tokens, temperature=0.0, seed=0
            )
            return EngineAnswer(completion.choices[0].text, completion.usage.prompt_tokens)
        except (openai.OpenAIError, AttributeError, IndexError, TypeError):
            return None

    def _raise(self, error: openai.OpenAIError) -> NoReturn:
        if isinstance(error, openai.APITimeoutError):
            raise CheckFailed(f"{self.root}: the engine did not answer in {self._client.timeout:g} s") from error
        if isinstance(error, openai.APIConnectionError):
            reason = error.__cause__ or error
            if not isinstance(reason, httpx2.ConnectError):  # `transformers serve` does so where the model or processor fails
                raise RequestRejected("the connection was closed; the engine's own output has the reason", True) from error
            raise CheckFailed(f"{self.root}: no engine answers there: {reason}; `mmtune serve RUN` starts one") from error
        if isinstance(error, openai.APIStatusError):
            raise RequestRejected(f"HTTP {error.status_code}: {_detail(error)}", error.status_code >= 500) from error
        raise CheckFailed(f"{self.root}: the engine's answer cannot be read: {error}") from error


def _detail(error: openai.APIStatusError) -> str:
    """The engine's own words in one line."""
    body: Any = error.body
    if isinstance(body, Mapping):
        body = body.get("detail") or body.get("message") or body
    return " ".join((body if isinstance(body, str) else json.dumps(body) if body else error.response.text).split())[:300]


def _text(message: Any) -> str:
    """The text of an answer, and its tool calls as the engine gives them."""
    calls = [f"{call.function.name}({call.function.arguments})" for call in message.tool_calls or ()]
    return "\n".join([str(message.content or ""), *calls]).strip("\n")


def _parts(message: Any) -> tuple[str, ...]:
    """The attribute `parts` of an answer."""
    reasoning = next((str(text) for name in REASONING if (text := getattr(message, name, None))), "")
    if not (message.tool_calls or reasoning):
        return ()
    parts = [reasoning, str(message.content or "")]
    for call in message.tool_calls or ():
        parts += [call.function.name, *_values(call.function.arguments)]
    return tuple(part for part in parts if part.strip())


def _values(arguments: str) -> list[str]:
    """The keys and values of a call's arguments; their text where it is not JSON."""
    try:
        return list(leaves(json.loads(arguments)))
    except ValueError:
        return [arguments]


def openai_message(message: Message) -> dict[str, Any]:
    """A message in the form of OpenAI's API."""
    converted: dict[str, Any] = {"role": message["role"], "content": [_openai_block(block) for block in message["content"]]}
    if message["role"] != "user" and all(block["type"] == "text" for block in message["content"]):
        converted["content"] = "".join(block["text"] for block in message["content"])
        if "tool_calls" in message and not converted["content"]:
            converted["content"] = None  # vLLM 0.32 gives templates a list with an empty text for "", which they take for a text
    if calls := message.get("tool_calls"):
        converted["tool_calls"] = [
            {
                "id": call.get("id", f"call_{number}"),
                "type": "function",
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)},
            }
            for number, call in enumerate(calls)
        ]
    return converted | {key: message[key] for key in ("tool_call_id", "name", "reasoning_content") if key in message}


def _openai_block(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    file = io.BytesIO()
    open_image(block["image"]).save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
