"""Chat in the terminal: line editing, commands, and Ctrl-C to stop an answer."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing

from prompt_toolkit import PromptSession
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from mmtune.chat.image_paths import ImagePathCompleter, image_paths
from mmtune.chat.session import ChatSession
from mmtune.console.terminal_text import unescaped
from mmtune.utils.errors import UserError

COMMANDS = {
    "/image": "/image FILE ... attaches images to your next question",
    "/reset": "/reset starts a new conversation",
    "/exit": "/exit ends the chat",
}
"""The commands and their help texts."""
HELP = f"{', '.join(COMMANDS.values())}; Ctrl-C stops an answer"
COMMAND_HINTS = {
    **dict.fromkeys(("exit", "quit"), "/exit to end the chat"),
    "reset": "/reset to start a new conversation",
    "help": HELP,
}
"""Lines that are probably meant as commands, and what to type instead."""
PROMPT = "> "
EMPTY_ANSWER = "(the answer is empty)"
STOPPED = "\n(stopped: the text so far stays in the conversation)"
STOPPED_AT_ONCE = "\n(stopped before the first token: the question is dropped; its images stay attached to the next one)"


def run_chat(session: ChatSession) -> None:
    """Read questions and commands from standard input until it ends.

    On a terminal, lines can be edited and have a history, and Ctrl-C during an answer stops it but keeps the conversation.
    Otherwise each line of standard input is a question or a command.

    Raises:
        KeyboardInterrupt: Ctrl-C at the prompt; at any time if standard input is not a terminal.
    """
    is_interactive = sys.stdin.isatty()
    read_line = _line_reader()
    print(textwrap.fill(HELP, shutil.get_terminal_size().columns) if sys.stdout.isatty() else HELP)
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        try:
            _handle_line(session, line, command, argument.strip())
        except UserError as error:
            print(f"({error})")
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            print("\n(stopped)")


def _handle_line(session: ChatSession, line: str, command: str, argument: str) -> None:
    if not line:
        return
    if command == "/reset":
        session.reset()
        print("(new conversation)")
    elif command == "/image":
        for name, image in image_paths(argument):
            width, height = session.attach(image)
            attached = "1 image" if session.pending_images == 1 else f"{session.pending_images} images"
            print(f"({name}, {width} x {height}; {attached} attached to your next question)")
    elif command.startswith("/"):
        raise UserError(f"unknown command {command}; commands: {HELP}")
    elif line.lower() in COMMAND_HINTS:
        print(f"(type {COMMAND_HINTS[line.lower()]})")
    else:
        _ask(session, line)


def _ask(session: ChatSession, question: str) -> None:
    answer, turns = "", session.turns
    try:
        with closing(session.ask(question)) as chunks:
            for chunk in chunks:
                print(chunk, end="", flush=True)
                answer += chunk
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(STOPPED if session.turns > turns else STOPPED_AT_ONCE)
    else:
        print("" if answer.strip() else EMPTY_ANSWER)


def _line_reader() -> Callable[[], str]:
    """A function that reads one line; it raises EOFError at the end of the input and for Ctrl-D on a terminal."""
    is_interactive = sys.stdin.isatty()
    if is_interactive and sys.stdout.isatty() and not is_dumb_terminal():
        output = create_output(unescaped(sys.stdout))
        if isinstance(output, Vt100_Output):
            output.enable_cpr = False  # avoids prompt_toolkit's warning on terminals that do not report the cursor position
        editor: PromptSession[str] = PromptSession(
            PROMPT,
            output=output,
            completer=ImagePathCompleter(list(COMMANDS)),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
        )
        return editor.prompt
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is an error of its own; other lines are read

    def read_line() -> str:
        if is_interactive and sys.stdout.isatty():
            print(PROMPT, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read_line
