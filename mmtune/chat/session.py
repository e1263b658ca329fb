"""A conversation with a model: its turns, its images, and answers as they come."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer

from mmtune.data.encoding.encode import check_chat_template, encode_prompt
from mmtune.data.media.media import EmbeddedMedia, ImageView, open_image
from mmtune.data.media.pixels import Window
from mmtune.data.message import Message
from mmtune.models.compute import move_batch, training_autocast
from mmtune.models.generation import generate
from mmtune.utils.errors import UserError


class ChatSession:
    """Holds the turns so far; the prompt is rendered by the very chat template that the model was trained with.

    Args:
        model: in eval mode.
        processor: its processor, with a chat template that `check_chat_template` accepts.
        max_new_tokens: an answer is cut there.
        window: the grey values that become black and white in the images, as a source's `window`.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int = 256, window: Window | None = None
    ) -> None:
        check_chat_template(processor)
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {max_new_tokens}: an answer has at least one token")
        self._model = model
        self._processor = processor
        self._max_new_tokens = max_new_tokens
        self._window = window
        self._messages: list[Message] = []
        self._images: list[dict[str, Any]] = []

    def attach(self, image: Path | EmbeddedMedia) -> tuple[int, int]:
        """Show an image with the next question; returns its (width, height) in pixels.

        Raises:
            UserError: a file that is missing, no image, or damaged.
        """
        shown = ImageView(image, self._window)
        try:
            size = open_image(shown).size  # the whole of it: a question asked later could not say which image failed
        except ValueError as error:
            raise UserError(str(error)) from error
        self._images.append({"type": "image", "image": shown})
        return size

    @property
    def pending_images(self) -> int:
        """How many images go with the next question."""
        return len(self._images)

    @property
    def turns(self) -> int:
        """How many questions and answers the conversation holds."""
        return len(self._messages)

    def reset(self) -> None:
        """Forget every turn and image."""
        self._messages = []
        self._images = []

    def ask(self, question: str) -> Generator[str]:
        """Pieces of the greedy answer as the model generates them; the finished turn joins the conversation.

        An iterator that is closed early, or interrupted by Ctrl-C, stops the model after the token in progress, and returns when
        the generation thread has ended. The turn then joins the conversation with the pieces that were given, so that the model
        reads what the user has read; without any piece the question is dropped, and its images wait for the next one.

        Raises:
            UserError: an image that is gone, or a question that is not valid Unicode.
        """
        turn: Message = {"role": "user", "content": [*self._images, {"type": "text", "text": question}]}
        prompt = encode_prompt("chat", [*self._messages, turn], self._processor)
        streamer = TextIteratorStreamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []
        stopped = Event()

        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

        def answer() -> None:
            try:
                with torch.inference_mode(), training_autocast(self._model):
                    inputs = move_batch(self._model, prompt)
                    generate(self._model, self._processor, inputs, self._max_new_tokens, streamer, [stop])
            except BaseException as error:  # handed to the reader, who would otherwise wait for ever
                failed.append(error)
                streamer.end()

        # A thread that is inside torch when the interpreter ends aborts the process: this one has ended whenever `ask` has.
        thread = Thread(target=answer)
        pieces: list[str] = []
        finished = False
        try:
            thread.start()
            for piece in streamer:
                pieces.append(piece)
                yield piece
            finished = True
        finally:
            stopped.set()
            _wait_for(thread)
            if not failed and (finished or any(pieces)):
                self._messages += [turn, {"role": "assistant", "content": [{"type": "text", "text": "".join(pieces)}]}]
                self._images = []
        if failed:
            raise failed[0]


def _wait_for(thread: Thread) -> None:
    """Until the thread has ended. Ctrl-C meanwhile asks for what is under way: the model has been told to stop."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()
