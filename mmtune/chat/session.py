"""Chat session: conversation history, images, and streamed answers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer

from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.encoding.encoding_checks import check_encoding
from mmtune.data.media.media import EmbeddedMedia, ImageView, open_image
from mmtune.data.media.pixels import Window
from mmtune.data.message import Message
from mmtune.models.compute import move_batch, training_autocast
from mmtune.models.generation import generate
from mmtune.utils.errors import UserError


class ChatSession:
    """The conversation history and its images; prompts are rendered with the processor's chat template, as in training.

    Args:
        model: the model, in eval mode.
        processor: the model's processor, with a chat template that `check_encoding` accepts.
        max_new_tokens: at most this many new tokens per answer.
        window: the gray values that map to black and white, as the `window` of a recipe's data source.

    Raises:
        UserError: `max_new_tokens` below 1, or an unusable chat template.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int = 256, window: Window | None = None
    ) -> None:
        check_encoding(processor)
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {max_new_tokens}: expected at least 1")
        self._model = model
        self._processor = processor
        self._max_new_tokens = max_new_tokens
        self._window = window
        self._messages: list[Message] = []
        self._images: list[dict[str, Any]] = []

    def attach(self, image: Path | EmbeddedMedia) -> tuple[int, int]:
        """Attach an image to the next question; returns its (width, height) in pixels.

        Raises:
            UserError: a file that is missing, damaged or not an image.
        """
        view = ImageView(image, self._window)
        try:
            size = open_image(view).size  # decodes it completely: an error during a later question would not name the image
        except ValueError as error:
            raise UserError(str(error)) from error
        self._images.append({"type": "image", "image": view})
        return size

    @property
    def pending_images(self) -> int:
        """The number of images attached to the next question."""
        return len(self._images)

    @property
    def turns(self) -> int:
        """The number of messages in the conversation: questions and answers."""
        return len(self._messages)

    def reset(self) -> None:
        """Delete all messages and images."""
        self._messages = []
        self._images = []

    def ask(self, question: str) -> Generator[str]:
        """Stream the greedy answer in text chunks; question and answer are then added to the conversation.

        If the iterator is closed early or Ctrl-C interrupts it, generation stops after the current token, and the call returns
        when the generation thread has ended. The chunks already yielded are added as the answer, so the model sees what the user
        has read. If none was yielded, the question is dropped and its images stay attached to the next question.

        Raises:
            UserError: an image that no longer exists, or a question that is not valid Unicode.
        """
        message: Message = {"role": "user", "content": [*self._images, {"type": "text", "text": question}]}
        prompt = encode_prompt("chat", [*self._messages, message], self._processor)
        streamer = TextIteratorStreamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []
        stop_requested = Event()

        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop_requested.is_set(), device=input_ids.device)

        def generate_answer() -> None:
            try:
                with torch.inference_mode(), training_autocast(self._model):
                    inputs = move_batch(self._model, prompt)
                    generate(self._model, self._processor, inputs, self._max_new_tokens, streamer, [stop])
            except BaseException as error:  # raised again in the calling thread, which would otherwise wait forever
                errors.append(error)
                streamer.end()

        # A thread that is inside torch when the interpreter exits aborts the process, so it must end before `ask` returns.
        thread = Thread(target=generate_answer)
        chunks: list[str] = []
        finished = False
        try:
            thread.start()
            for chunk in streamer:
                chunks.append(chunk)
                yield chunk
            finished = True
        finally:
            stop_requested.set()
            _join(thread)
            if not errors and (finished or any(chunks)):
                self._messages += [message, {"role": "assistant", "content": [{"type": "text", "text": "".join(chunks)}]}]
                self._images = []
        if errors:
            raise errors[0]


def _join(thread: Thread) -> None:
    """Wait for the thread to end, ignoring Ctrl-C: generation has already been asked to stop."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()
