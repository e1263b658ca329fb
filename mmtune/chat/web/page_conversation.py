"""One conversation of the chat page: its session, its unfinished question, and the answer that is being written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Lock
from typing import Any
from uuid import uuid4

from mmtune.chat.commands import EMPTY_ANSWER, STOPPED, STOPPED_AT_ONCE, STOPPED_REPEAT, long_prompt_line
from mmtune.chat.session import ChatSession
from mmtune.chat.web.model_turns import ModelTurns
from mmtune.chat.web.shown_images import ShownImages, file_name
from mmtune.data.media.media import Media, open_media
from mmtune.data.message import Message, text_of
from mmtune.data.validation.show_sample import SampleView
from mmtune.explain.explanation import Explanation
from mmtune.utils.errors import UserError

MAX_IMAGES = 32
"""Maximum number of images of one question."""

UPDATE_S = 0.05
"""Minimum time between two updates of the page while an answer is written."""

WAIT_S = 0.5
"""Time between two looks at the stop button while another answer is written."""

STOPPED_S = 30.0
"""Maximum time to wait for the end of a stopped answer: its prompt is processed first."""

BUSY = "an answer is being written; stop it first"
NOT_COMPARED = "stopped: the conversation is as before"


@dataclass(frozen=True)
class Draft:
    """A question that was not asked or was taken back: the content of the input field."""

    text: str = ""
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Notice:
    """A line under the conversation."""

    text: str = ""
    is_error: bool = False


@dataclass(frozen=True)
class Writing:
    """An answer that is being written: the messages that the page shows before it, and its text so far."""

    messages: tuple[Message, ...]
    text: str = ""


class PageConversation:
    """A conversation, and what the page shows of it. Its methods that generate yield after every change.

    Attributes:
        session: the conversation.
        folder: its files for the browser; only this page's server reads them.
        draft: the content of the input field.
        notice: the line under the conversation.
        writing: the answer that is being written; None if there is none.
        images: the copies of its images.

    Args:
        session: a new conversation.
        turns: the queue for the model.
        folder: a folder that does not exist.
    """

    def __init__(self, session: ChatSession, turns: ModelTurns, folder: Path) -> None:
        self.session = session
        self.folder = folder
        self.draft = Draft()
        self.notice = Notice()
        self.writing: Writing | None = None
        self.images = ShownImages(session, folder)
        self._turns = turns
        self._stop_requested = Event()
        self._busy = Lock()
        self._has_answer = False
        folder.mkdir(mode=0o700)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being written."""
        return self._busy.locked()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Exclude other changes of the conversation.

        Raises:
            UserError: an answer is being written.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError(BUSY)
        try:
            yield
        finally:
            self._busy.release()

    def stop(self) -> None:
        """Stop the answer after the current token. It stays as far as it was written."""
        self._stop_requested.set()

    def wait_until_stopped(self) -> None:
        """Stop the answer, and wait until the model has stopped; not longer than a long prompt takes."""
        self.stop()
        if self._busy.acquire(timeout=STOPPED_S):
            self._busy.release()

    def close(self) -> None:
        """Stop the answer, wait until the model has stopped, and delete the files."""
        self.wait_until_stopped()
        shutil.rmtree(self.folder, ignore_errors=True)

    def set_values(self, system: str, values: Mapping[str, Any]) -> None:
        """Set the system prompt and the settings; those that are unchanged stay, also the number of repeats of the seed.

        Raises:
            UserError: a value that is not valid, or a chat template without system prompts.
        """
        for name, value in values.items():
            if value != getattr(self.session.settings, name):
                self.session.set_value(name, "" if value is None else str(value))
        if (system.strip() or None) != self.session.state.system:
            self.session.set_system(system.strip() or None)

    def ask(self, text: str, files: Sequence[Path], system: str, values: Mapping[str, Any]) -> Generator[None]:
        """Ask a question with uploaded images. The question stays in the input field if it cannot be asked.

        Raises:
            UserError: no question, an image that training would reject, a setting, or as `ChatSession.ask`.
        """
        with self.exclusive():
            self.draft = Draft(text, tuple(files))
            if not text.strip() and not files:
                raise UserError("type a question, or attach an image")
            self._attach(files)
            state = self.session.state
            messages = (*state.messages, _with_text({"role": "user", "content": list(state.attached)}, text))
            self.draft = Draft()
            try:
                yield from self._answered(messages, lambda: self.session.ask(text), STOPPED_AT_ONCE, system, values)
            finally:
                if not self._has_answer:
                    self._take_back(text)

    def retry(self, system: str, values: Mapping[str, Any]) -> Generator[None]:
        """Answer the last question again.

        Raises:
            UserError: no question was answered, a setting, or as `ChatSession.ask`.
        """
        with self.exclusive():
            self.session.state.last_turn()
            yield from self._answered(self.session.state.messages[:-1], self.session.retry, STOPPED_REPEAT, system, values)

    def compare(self, system: str, values: Mapping[str, Any]) -> Generator[Mapping[str, str]]:
        """The answers of the base and of the tuned model to the last question so far, by name.

        Raises:
            UserError: as `ChatSession.compare`.
        """
        with self.exclusive(), self._turns.ticket() as ticket:
            self._stop_requested.clear()
            answers: dict[str, str] = {}
            yield answers
            for _ in self._wait(ticket.before):
                yield answers
            if self._stop_requested.is_set():  # without its turn at the model
                self.notice = Notice(NOT_COMPARED)
                return
            self.set_values(system, values)
            for name, chunks in self.session.compare():
                for text in self._texts(chunks):
                    answers[name] = text
                    yield answers
                if self._stop_requested.is_set():
                    self.notice = Notice(NOT_COMPARED)
                    return
                answers[name] = answers[name] if answers[name].strip() else EMPTY_ANSWER
            yield answers

    def view_prompt(self) -> SampleView:
        """The prompt of the last question, token by token.

        Raises:
            UserError: no question was answered, or an answer is being written.
        """
        with self.exclusive(), self._turns.ticket() as ticket:
            ticket.before(None)
            return self.session.view_prompt()

    def explain(self) -> Generator[tuple[Explanation, list[Media]] | None]:
        """None while the last answer is explained, then what it rests on and the images of the conversation.

        Raises:
            UserError: as `ChatSession.explain`, or an answer is being written.
        """
        with self.exclusive(), self._turns.ticket() as ticket:
            self._stop_requested.clear()
            for _ in self._wait(ticket.before):
                yield None
            self._check_stop()  # it may have no turn at the model
            self.notice = Notice("explaining the last answer")
            yield None
            self.notice = Notice()
            yield self.session.explain(self._check_stop)

    def _check_stop(self) -> None:
        if self._stop_requested.is_set():
            raise UserError("stopped: the answer is not explained")

    def undo(self) -> None:
        """Remove the last question and its answer; the question returns to the input field.

        Raises:
            UserError: no question was answered, or an answer is being written.
        """
        with self.exclusive():
            question = self.session.undo()
            self._take_back(text_of(question))
            self.notice = Notice()

    def reset(self) -> None:
        """Start a new conversation; the system prompt and the settings stay.

        Raises:
            UserError: an answer is being written.
        """
        with self.exclusive():
            self.session.reset()
            self.images.clear()
            self.draft, self.notice = Draft(), Notice()

    def save(self) -> Path:
        """Write the conversation as a row for training; returns the file.

        Raises:
            UserError: as `ChatSession.save`, or an answer is being written.
        """
        with self.exclusive():
            path = self.folder / f"chat-{datetime.now():%Y%m%d-%H%M%S}-{uuid4().hex[:4]}.jsonl"
            self.session.save(path)
            return path

    def load(self, path: Path) -> None:
        """Continue an uploaded conversation, and delete the uploaded file.

        Raises:
            UserError: as `ChatSession.load`, or an answer is being written.
        """
        with self.exclusive(), self._turns.ticket() as ticket:
            ticket.before(None)
            try:
                self.session.load(path)
            finally:
                path.unlink(missing_ok=True)
            self.notice = Notice(f"loaded: {path.name}")

    def _wait(self, before: Callable[[float], int]) -> Generator[None]:
        """Wait for the model, until the turn or the stop button."""
        while (count := before(WAIT_S)) and not self._stop_requested.is_set():
            noun = "answer" if count == 1 else "answers"
            self.notice = Notice(f"waiting: the model writes {count} other {noun} first")
            yield
        self.notice = Notice()

    def _answered(
        self,
        messages: tuple[Message, ...],
        answer: Callable[[], Generator[str]],
        stopped_at_once: str,
        system: str,
        values: Mapping[str, Any],
    ) -> Generator[None]:
        """Stream an answer after these messages into `writing`."""
        self._stop_requested.clear()
        self.notice = Notice()
        before = self.session.state
        self._has_answer = False
        self.writing = Writing(messages)
        yield
        try:
            with self._turns.ticket() as ticket:
                yield from self._wait(ticket.before)
                if not self._stop_requested.is_set():
                    try:
                        self.set_values(system, values)
                    finally:
                        before = self.session.state
                    for text in self._texts(answer()):
                        self.writing = Writing(messages, text)
                        yield
        finally:
            self.writing = None
            self._has_answer = self.session.state is not before
        if self._stop_requested.is_set():
            self.notice = Notice((STOPPED if self._has_answer else stopped_at_once).strip("\n()"))
        elif line := long_prompt_line(self.session):
            self.notice = Notice(f"{line}; undo or a new chat shortens the conversation")
        elif not text_of(self.session.state.messages[-1]).strip():
            self.notice = Notice(EMPTY_ANSWER.strip("()"))

    def _texts(self, chunks: Generator[str]) -> Generator[str]:
        """The text so far, at most every `UPDATE_S` seconds and at the end; ends at the stop button."""
        text, shown = "", 0.0
        with closing(chunks):
            for chunk in chunks:
                text += chunk
                if self._stop_requested.is_set():
                    break
                if time.monotonic() - shown >= UPDATE_S:
                    yield text
                    shown = time.monotonic()
        yield text

    def _attach(self, files: Sequence[Path]) -> None:
        """Attach uploaded files, and delete them: the session keeps their bytes."""
        self.session.detach()
        if len(files) > MAX_IMAGES:
            raise UserError(f"expected at most {MAX_IMAGES} images in one question, got {len(files)}; remove some")
        errors = []
        for path in files:
            try:
                self.session.attach(path)
            except UserError as error:
                errors.append((path, str(error).replace(str(path), path.name)))
        if errors:
            self.session.detach()
            bad = [path for path, _ in errors]
            self.draft = Draft(self.draft.text, tuple(path for path in files if path not in bad))
            for path in bad:
                path.unlink(missing_ok=True)
            raise UserError("; ".join(message for _, message in errors))
        for path in files:
            path.unlink(missing_ok=True)

    def _take_back(self, text: str) -> None:
        """Put a question and the images that are attached to the next one into the input field."""
        files = []
        for block in self.session.state.attached:
            folder = self.folder / uuid4().hex
            folder.mkdir()
            files.append(folder / (file_name(block["image"]) or "image"))
            with open_media(block["image"]) as file:
                files[-1].write_bytes(file.read())
        self.session.detach()
        self.draft = Draft(text, tuple(files))


def _with_text(message: Message, text: str) -> Message:
    """The message with another text and the same images."""
    images = [block for block in message["content"] if block["type"] != "text"]
    return {**message, "content": [*images, {"type": "text", "text": text}]}
