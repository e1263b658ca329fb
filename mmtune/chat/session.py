"""Chat session: conversation history, images, and streamed answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TextIteratorStreamer

from mmtune.chat.answer_settings import AnswerSettings
from mmtune.data.encoding.answer_decoding import AnswerDecoder
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.encoding.encoding_checks import check_encoding, check_system_prompt
from mmtune.data.encoding.native_regions import text_extent
from mmtune.data.encoding.token_counts import Counts, count_prompt_tokens
from mmtune.data.media.media import EmbeddedMedia, ImageView, Media, open_image
from mmtune.data.media.pixels import Window
from mmtune.data.message import Message, Sample, has_media, images_in, text_message, text_of, with_images
from mmtune.data.message_rows import check_messages_row, messages_row, read_messages_row
from mmtune.data.validation.show_sample import SampleView, view_prompt
from mmtune.explain.explanation import Explanation
from mmtune.explain.explanation_methods import explain
from mmtune.families.box_convention import RegionKind
from mmtune.models.compute import adapter_disabled, move_batch, training_autocast
from mmtune.models.generation import generate
from mmtune.utils.errors import UserError, reason_of
from mmtune.utils.files import create_file, replace_bytes

Block = dict[str, Any]


@dataclass(frozen=True)
class ChatState:
    """The state of a chat. It is replaced as a whole, so that Ctrl-C leaves the old one or the new one.

    Attributes:
        system: the system prompt; None for the chat template's own.
        messages: questions and answers in turn.
        attached: image blocks of the next question.
        repeats: how often the last question was answered since it was asked or the seed was set: added to the seed by the next
            answer to it.
    """

    system: str | None = None
    messages: tuple[Message, ...] = ()
    attached: tuple[Block, ...] = ()
    repeats: int = 0

    @property
    def images(self) -> list[tuple[int, ImageView]]:
        """Every image in the conversation, with the number of its question, from 1."""
        questions = enumerate(self.messages[::2], start=1)
        return [(number, image) for number, message in questions for image in images_in(message)]

    def last_turn(self) -> tuple[tuple[Message, ...], Message]:
        """The messages before the last question, and that question.

        Raises:
            UserError: no question was answered.
        """
        if not self.messages:
            raise UserError("the conversation has no question yet; ask one first")
        return self.messages[:-2], self.messages[-2]


class ChatSession:
    """The conversation history and its images; prompts are rendered with the processor's chat template, as in training.

    Attributes:
        state: the conversation.
        settings: how answers are generated.
        prompt_tokens: number of tokens of the last prompt.
        maximum_tokens: the model's maximum of prompt and answer; None if its config has none.

    Args:
        model: the model, in eval mode.
        processor: the model's processor, with a chat template that `check_encoding` accepts.
        settings: how answers are generated.
        window: the gray values that map to black and white, as the `window` of a recipe's data source.

    Raises:
        UserError: an unusable chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processor: ProcessorMixin,
        settings: AnswerSettings | None = None,
        window: Window | None = None,
    ) -> None:
        check_encoding(processor)
        self.state = ChatState()
        self.settings = settings or AnswerSettings()
        self.prompt_tokens = 0
        maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.maximum_tokens = maximum if isinstance(maximum, int) else None
        self._model = model
        self._processor = processor
        self._window = window
        self._written: dict[Path, bytes] = {}

    def attach(self, image: Path | EmbeddedMedia) -> tuple[int, int]:
        """Attach an image to the next question; returns its (width, height) in pixels.

        Raises:
            UserError: a file that is missing, damaged or not an image.
        """
        view = ImageView(image, self._window)
        size = _decoded_size(view)
        attached = (*self.state.attached, {"type": "image", "image": _in_memory(view)})
        self.state = replace(self.state, attached=attached)
        return size

    def detach(self) -> None:
        """Remove the images attached to the next question."""
        self.state = replace(self.state, attached=())

    def reset(self) -> None:
        """Delete all messages and images; the system prompt and the settings stay."""
        self.state = ChatState(self.state.system)

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt, for all further answers; None removes it.

        Raises:
            UserError: the chat template does not write it.
        """
        if text is not None:
            check_system_prompt(self._processor, text)
        self.state = replace(self.state, system=text)

    def set_value(self, name: str, text: str) -> None:
        """Change one of the settings. With a new seed, or the old one again, the next answer uses exactly this seed.

        Raises:
            UserError: an unknown name, or a text that is not a valid value.
        """
        self.settings = self.settings.with_value(name, text)
        if name == "seed":
            self.state = replace(self.state, repeats=0)

    def undo(self) -> Message:
        """Delete the last question and its answer, and attach its images to the next question; returns the question.

        Raises:
            UserError: no question was answered.
        """
        before, question = self.state.last_turn()
        attached = (*_images_of(question), *self.state.attached)
        self.state = replace(self.state, messages=before, attached=attached, repeats=1)
        return question

    def ask(self, question: str) -> Generator[str]:
        """Stream the answer in text chunks; question and answer are then added to the conversation.

        If the iterator is closed early or Ctrl-C interrupts it, generation stops after the current token, and the call returns
        when the generation thread has ended. The chunks already yielded are added as the answer, so the model sees what the user
        has read. If none was yielded, the question is dropped and its images stay attached to the next question.

        Raises:
            UserError: a question that is not valid Unicode, or no memory left on the accelerator.
        """
        blocks = (*self.state.attached, {"type": "text", "text": question})
        message: Message = {"role": "user", "content": list(blocks)}
        return self._answer(replace(self.state, attached=(), repeats=0), message)

    def retry(self) -> Generator[str]:
        """Stream another answer to the last question, which replaces the old one as in `ask`. It is sampled with the next seed.

        Raises:
            UserError: no question was answered; otherwise as `ask`.
        """
        before, question = self.state.last_turn()
        return self._answer(replace(self.state, messages=before), question)

    def edit(self, text: str) -> Generator[str]:
        """Stream an answer to another text in place of the last question, with its images, as `retry`.

        Raises:
            UserError: no question was answered; otherwise as `ask`.
        """
        before, question = self.state.last_turn()
        message: Message = {**question, "content": [*_images_of(question), {"type": "text", "text": text}]}
        return self._answer(replace(self.state, messages=before, repeats=0), message)

    def compare(self) -> list[tuple[str, Generator[str]]]:
        """The answers of the base and of the tuned model to the last question, each with its name; the conversation stays.

        Both are generated with the current settings and the seed of the last answer.

        Raises:
            UserError: the model is not an adapter on its base, or no question was answered.
        """
        if not self.is_adapter:
            raise UserError(
                "/compare: expected an adapter on its base, got a full model; chat with an adapter's run, not with a merged model"
            )
        before, question = self.state.last_turn()
        messages, seed = [*before, question], self.settings.seed + max(0, self.state.repeats - 1)
        return [("base", self._stream(messages, seed, tuned=False)), ("tuned", self._stream(messages, seed))]

    @property
    def is_adapter(self) -> bool:
        """Whether the model is an adapter on its base, which `compare` needs."""
        return isinstance(self._model, PeftModel)

    def view_prompt(self) -> SampleView:
        """The prompt of the last question, token by token.

        Raises:
            UserError: no question was answered.
        """
        before, question = self.state.last_turn()
        return view_prompt(Sample("Prompt of your last question", self._prompt([*before, question])), self._processor)

    def text_extent(self, kind: RegionKind, size: tuple[int, int]) -> tuple[int, int] | None:
        """The coordinates of the lower right corner of an image in the model's answers; None if they are unknown.

        Args:
            kind: the regions that the answer names.
            size: (width, height) of the upright image.
        """
        return text_extent(self._processor, kind, size)

    def explain(self, check: Callable[[], None] | None = None) -> tuple[Explanation, list[Media]]:
        """What the last answer rests on, by occlusion, and the images of the conversation.

        Args:
            check: called between batches; an error that it raises ends the explanation.

        Raises:
            UserError: no question was answered, an empty answer, or no memory left on the accelerator.
        """
        before, question = self.state.last_turn()
        messages = self._prompt([*before, question, _saved(self.state.messages[-1])])
        sample = Sample("chat", messages)
        try:
            return explain(self._model, self._processor, sample, check=check), sample.images
        except torch.OutOfMemoryError as error:
            raise _memory_error(error, "shorten the conversation or its images") from error

    def count_tokens(self) -> Counts:
        """The tokens of the next question's prompt without its text."""
        question: Message = {"role": "user", "content": [*self.state.attached, {"type": "text", "text": ""}]}
        return count_prompt_tokens(Sample("chat", self._prompt([*self.state.messages, question])), self._processor)

    def save(self, path: Path) -> None:
        """Write the conversation as a file of one row in the form of the data template `messages`.

        Images inside the file's folder are written as relative paths, others as `data:` URIs, also those whose file was deleted
        or changed since. White space around an answer is removed, as in predicted rows. Attached images are not part of the row.

        Raises:
            UserError: no question was answered, an answer is empty, an image is too large for a `data:` URI, the file exists and
                was not written by this chat, or it cannot be written.
        """
        if path.suffix != ".jsonl":
            raise UserError(f"/save {path}: expected a file name that ends in .jsonl")
        self.state.last_turn()  # an error if there is none
        try:
            root = path.parent.resolve()
            is_folder = root.is_dir()
        except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a null character, a loop of links
            raise UserError(f"/save {str(path)[:100]}: {reason_of(error)}") from error
        if not is_folder:
            raise UserError(f"/save {path}: no such folder: {root}")
        messages = [_saved(message) for message in self._prompt([*self.state.messages])]
        try:
            row = messages_row(Sample(path.stem, messages), root)
            check_messages_row(row, root, path.name)
            content = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            self._write(path, content)
        except (OSError, ValueError) as error:
            raise UserError(f"/save {path}: {reason_of(error)}") from error

    def _write(self, path: Path, content: bytes) -> None:
        target = path.resolve()
        if self._written.get(target) is not None and target.is_file() and _digest(target.read_bytes()) == self._written[target]:
            replace_bytes(target, content)
        else:
            try:
                create_file(path, content)
            except FileExistsError as error:
                raise UserError(f"/save {path}: exists, and was not written by this chat; give another name") from error
        self._written[target] = _digest(content)

    def load(self, path: Path) -> None:
        """Replace system prompt and messages by those of a file of one row in the form of the data template `messages`.

        Attached images stay. Every image is decoded, and the whole conversation is encoded once before anything changes.

        Raises:
            UserError: a file, a row or an image that cannot be read, a conversation with tool calls, or one that the model's
                chat template or processor rejects.
        """
        sample = read_messages_row(path)
        if sample.tools or any("tool_calls" in message or message["role"] == "tool" for message in sample.messages):
            raise UserError(f"/load {path}: tool calls are not supported in a chat")
        first = sample.messages[0]
        if first["role"] == "system" and has_media(first):
            raise UserError(f"/load {path}: images in a system prompt are not supported in a chat")
        system = text_of(first) if first["role"] == "system" else None
        turns = sample.messages[system is not None :]
        messages = [with_images(turn, lambda image: ImageView(image, self._window)) for turn in turns]
        if system is not None:
            check_system_prompt(self._processor, system)
        question: Message = text_message("user", "?")
        encode_prompt(sample.id, _with_system(system, [*messages, question]), self._processor)
        loaded = tuple(with_images(message, _in_memory) for message in messages)
        self.state = replace(self.state, system=system, messages=loaded, repeats=0)

    def _prompt(self, messages: list[Message]) -> list[Message]:
        return _with_system(self.state.system, messages)

    def _answer(self, before: ChatState, question: Message) -> Generator[str]:
        """Stream the answer to a question after a conversation, which then replaces the present one, with both."""
        chunks: list[str] = []

        def answered() -> ChatState:
            answer: Message = text_message("assistant", "".join(chunks))
            return replace(before, messages=(*before.messages, question, answer), repeats=before.repeats + 1)

        try:
            with closing(self._stream([*before.messages, question], self.settings.seed + before.repeats)) as stream:
                for chunk in stream:
                    chunks.append(chunk)
                    yield chunk
        except (GeneratorExit, KeyboardInterrupt):
            if any(chunks):
                self.state = answered()
            raise
        self.state = answered()

    def _stream(self, messages: list[Message], seed: int, tuned: bool = True) -> Generator[str]:
        """Stream an answer; the generation thread has ended when the generator returns or is closed."""
        prompt = encode_prompt("chat", self._prompt(messages), self._processor)
        self.prompt_tokens = prompt["input_ids"].shape[-1]
        streamer = TextIteratorStreamer(AnswerDecoder(self._processor.tokenizer), skip_prompt=True)
        errors: list[BaseException] = []
        stop_requested = Event()
        settings = self.settings

        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop_requested.is_set(), device=input_ids.device)

        def generate_answer() -> None:
            model: Any = self._model
            try:
                with nullcontext() if tuned else adapter_disabled(model), torch.inference_mode(), training_autocast(model):
                    inputs = move_batch(model, prompt)
                    if settings.temperature:
                        torch.manual_seed(seed)
                    generate(
                        model,
                        self._processor,
                        inputs,
                        settings.max_new_tokens,
                        streamer,
                        [stop],
                        settings=settings.generation(),
                    )
            except BaseException as error:  # raised again in the calling thread, which would otherwise wait forever
                errors.append(error)
                streamer.end()

        # A thread that is inside torch when the interpreter exits aborts the process, so it must end before this returns.
        thread = Thread(target=generate_answer)
        try:
            thread.start()
            yield from streamer
        finally:
            stop_requested.set()
            _join(thread)
        if errors and isinstance(errors[0], torch.OutOfMemoryError):
            raise _memory_error(errors[0], "shorten the conversation or its images, or lower max_new_tokens") from errors[0]
        if errors:
            raise errors[0]


def _memory_error(error: torch.OutOfMemoryError, advice: str) -> UserError:
    return UserError(f"{str(error).partition('. ')[0]}; {advice}")


def _with_system(system: str | None, messages: list[Message]) -> list[Message]:
    if system is None:
        return messages
    return [text_message("system", system), *messages]


def _images_of(message: Message) -> list[Block]:
    return [block for block in message["content"] if block["type"] == "image"]


def _saved(message: Message) -> Message:
    """The message as it is written: an answer without white space around it, and the files of images that are unchanged."""
    if message["role"] == "assistant":
        return {**message, "content": [{"type": "text", "text": text_of(message).strip()}]}
    return with_images(message, _file_of)


def _in_memory(view: ImageView) -> ImageView:
    """The image with its file's present content: the file may be deleted or replaced before a later question or `/save`."""
    if isinstance(view.image, EmbeddedMedia):
        return view
    try:
        return replace(view, image=EmbeddedMedia(view.image, str(view.image), data=view.image.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read {view.image}: {reason_of(error)}") from error


def _file_of(view: ImageView) -> Path | EmbeddedMedia:
    """The file of an image; its bytes if it has none, or if the file was deleted or changed."""
    media = view.image
    with suppress(OSError):
        if isinstance(media, EmbeddedMedia) and media.data is not None and media.container.read_bytes() == media.data:
            return media.container
    return media


def _decoded_size(view: ImageView) -> tuple[int, int]:
    """(width, height) of an image that is decoded completely: an error during a later question would not name the image."""
    try:
        return open_image(view).size
    except ValueError as error:
        raise UserError(str(error)) from error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content).digest()


def _join(thread: Thread) -> None:
    """Wait for the thread to end, ignoring Ctrl-C: generation has already been asked to stop."""
    while thread.is_alive():
        with suppress(KeyboardInterrupt):
            thread.join()
