"""Commands of a chat: one table, and what each command does."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

from mmtune.chat.image_paths import file_path, image_paths, is_file
from mmtune.chat.session import ChatSession, ChatState
from mmtune.data.media.media import EmbeddedMedia, ImageView, image_size
from mmtune.data.message import text_of
from mmtune.utils.errors import UserError, closest_name

EMPTY_ANSWER = "(the answer is empty)"
STOPPED = "\n(stopped: the text so far stays in the conversation)"
STOPPED_AT_ONCE = "\n(stopped before the first token: the question is dropped; its images stay attached to the next one)"
STOPPED_REPEAT = "\n(stopped before the first token: the conversation is as before)"
REMOVE = '""'
"""The argument of `/system` that removes the system prompt."""


@dataclass(frozen=True)
class Chat:
    """What a command works on.

    Attributes:
        session: the conversation.
        edit_line: puts a text into the line editor of the next line; None without a line editor.
    """

    session: ChatSession
    edit_line: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: its arguments.
        description: what it does.
        run: does it; takes the argument, without white space around it.
    """

    usage: str
    description: str
    run: Callable[[Chat, str], None]


def run_command(chat: Chat, line: str) -> None:
    """Run the command of a line that begins with a slash.

    Raises:
        UserError: an unknown command, an argument that it does not take, or an error of the command.
    """
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    if name not in COMMANDS:
        close = OTHER_NAMES.get(name.lower()) or closest_name(name, COMMANDS)
        hint = f"did you mean {close}?" if close else "/help lists the commands"
        if is_file(name):
            hint = f"an image is attached with /image {name}"
        raise UserError(f"unknown command {name[:100]}; {hint} (a question that begins with / needs a space before it)")
    command = COMMANDS[name]
    if argument and not command.usage:
        raise UserError(f"{name}: expected no argument, got '{argument[:100]}'")
    command.run(chat, argument)


def ask(chat: Chat, question: str) -> None:
    """Ask a question and print the answer."""
    _print_answer(chat, chat.session.ask(question), STOPPED_AT_ONCE)


def long_prompt_line(session: ChatSession) -> str | None:
    """A line about the last prompt if it is longer than the model's maximum."""
    tokens, maximum = session.prompt_tokens, session.maximum_tokens
    if maximum is None or tokens <= maximum:
        return None
    return f"the prompt had {tokens:,} tokens, more than the model's maximum of {maximum:,}: do not rely on the answer"


def command_help() -> list[str]:
    """One line for each command."""
    return [f"{f'{name} {command.usage}'.rstrip()}: {command.description}" for name, command in COMMANDS.items()]


def _print_answer(chat: Chat, chunks: Generator[str], stopped_at_once: str) -> None:
    before = chat.session.state
    try:
        _print_chunks(chat, chunks)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(STOPPED if chat.session.state is not before else stopped_at_once)


def _print_chunks(chat: Chat, chunks: Generator[str]) -> None:
    answer = ""
    with closing(chunks):
        for chunk in chunks:
            print(chunk, end="", flush=True)
            answer += chunk
    print("" if answer.strip() else EMPTY_ANSWER)
    if line := long_prompt_line(chat.session):
        print(f"({line}; /undo or /reset shortens the conversation)")


def _image(chat: Chat, argument: str) -> None:
    for name, image in image_paths(argument):
        width, height = chat.session.attach(image)
        print(f"({name}, {width} x {height}; {_attached(chat)})")


def _images(chat: Chat, argument: str) -> None:
    conversation = chat.session.state
    for number, view in conversation.images:
        print(f"question {number}: {_described(view)}")
    for block in conversation.attached:
        print(f"attached to your next question: {_described(block['image'])}")
    if not (conversation.images or conversation.attached):
        print("(no images)")


def _detach(chat: Chat, argument: str) -> None:
    attached = chat.session.state.attached
    if not attached:
        raise UserError("/detach: no image is attached to your next question")
    chat.session.detach()
    print(f"(detached {_count(len(attached), 'image')})")


def _described(view: ImageView) -> str:
    name = view.image.name if isinstance(view.image, EmbeddedMedia) else str(view.image)
    width, height = image_size(view)
    return f"{name}, {width} x {height}"


def _attached(chat: Chat) -> str:
    return f"{_count(len(chat.session.state.attached), 'image')} attached to your next question"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.set_system(None if argument == REMOVE else argument)
    system = chat.session.state.system
    print("(no system prompt)" if system is None else f"(system prompt: {system})")


def _set(chat: Chat, argument: str) -> None:
    if argument:
        name, *value = argument.split(maxsplit=1)
        if not value:
            raise UserError(f"/set {name[:100]}: expected a name and a value, such as /set temperature 0.7")
        chat.session.set_value(name, value[0])
    print(f"({chat.session.settings})")


def _undo(chat: Chat, argument: str) -> None:
    question = text_of(chat.session.undo())
    attached = f"; {_attached(chat)}" if chat.session.state.attached else ""
    print(f"(removed the question '{_shortened(question)}' and its answer{attached})")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _retry(chat: Chat, argument: str) -> None:
    _print_answer(chat, chat.session.retry(), STOPPED_REPEAT)


def _edit(chat: Chat, argument: str) -> None:
    if argument:
        _print_answer(chat, chat.session.edit(argument), STOPPED_REPEAT)
        return
    _, question = chat.session.state.last_turn()
    if chat.edit_line is None:
        raise UserError("/edit: expected the new text of the last question: /edit NEW TEXT")
    chat.edit_line(f"/edit {text_of(question)}")


def _save(chat: Chat, argument: str) -> None:
    path = file_path("/save", argument)
    chat.session.save(path)
    conversation = chat.session.state
    left_out = f"; without the {_count(len(conversation.attached), 'attached image')}" if conversation.attached else ""
    print(f"(saved: {path}: {_content(conversation)}{left_out})")


def _load(chat: Chat, argument: str) -> None:
    path = file_path("/load", argument)
    chat.session.load(path)
    print(f"(loaded: {path}: {_content(chat.session.state)})")


def _content(conversation: ChatState) -> str:
    parts = ["a system prompt"] * (conversation.system is not None)
    parts += [_count(len(conversation.messages) // 2, "question"), _count(len(conversation.images), "image")]
    return ", ".join(parts)


def _compare(chat: Chat, argument: str) -> None:
    try:
        for name, chunks in chat.session.compare():
            print(f"({name}:)")
            _print_chunks(chat, chunks)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("\n(stopped: the conversation is as before)")


def _tokens(chat: Chat, argument: str) -> None:
    counts, maximum = chat.session.count_tokens(), chat.session.maximum_tokens
    text, media = _count(counts.tokens - counts.media_tokens, "text token"), _count(counts.media_tokens, "image token")
    limit = "" if maximum is None else f"; the model's maximum is {maximum:,}, with your question and the answer"
    images = f"{media} ({_count(counts.images, 'image')})" if counts.images else "no image"
    print(f"(the prompt so far: {_count(counts.tokens, 'token')}: {text}, {images}{limit})")


def _reset(chat: Chat, argument: str) -> None:
    chat.session.reset()
    system = "" if chat.session.state.system is None else "; the system prompt stays"
    print(f"(new conversation{system})")


def _help(chat: Chat, argument: str) -> None:
    columns = shutil.get_terminal_size().columns
    for line in command_help():
        print(textwrap.fill(line, columns, subsequent_indent="  ") if sys.stdout.isatty() else line)


def _exit(chat: Chat, argument: str) -> None:
    raise EOFError


COMMANDS = {
    "/image": Command("FILE ...", "attaches images to your next question", _image),
    "/images": Command("", "lists the images in the conversation and those attached", _images),
    "/detach": Command("", "removes the images attached to your next question", _detach),
    "/system": Command("[TEXT]", f"shows or sets the system prompt; /system {REMOVE} removes it", _system),
    "/set": Command("[NAME VALUE]", "shows or changes temperature, top_p, seed or max_new_tokens", _set),
    "/undo": Command("", "removes the last question and answer; its images are attached again", _undo),
    "/retry": Command("", "answers the last question again; with a temperature, with the next seed", _retry),
    "/edit": Command("[TEXT]", "asks TEXT in place of the last question; without TEXT, edits that question", _edit),
    "/compare": Command("", "answers the last question with the base and with the tuned model", _compare),
    "/tokens": Command("", "counts the tokens of the prompt so far", _tokens),
    "/save": Command("FILE.jsonl", "writes the conversation as a row for training", _save),
    "/load": Command("FILE.jsonl", "continues a saved conversation", _load),
    "/reset": Command("", "starts a new conversation; the system prompt and the settings stay", _reset),
    "/help": Command("", "lists the commands", _help),
    "/exit": Command("", "ends the chat", _exit),
}
"""The commands, in the order of `/help`."""
OTHER_NAMES = {
    "/?": "/help",
    "/bye": "/exit",
    "/quit": "/exit",
    "/q": "/exit",
    "/clear": "/reset",
    "/new": "/reset",
    "/regen": "/retry",
    "/regenerate": "/retry",
    "/file": "/image",
    "/parameter": "/set",
}
"""Commands of other programs, and what to type instead."""
