"""A conversation in the terminal: line editing, commands, and Ctrl-C that stops an answer."""

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
    "/image": "/image FILE ... shows images with your next question",
    "/reset": "/reset starts over",
    "/exit": "/exit leaves",
}
"""The commands, each with its help."""
HELP = f"{', '.join(COMMANDS.values())}; Ctrl-C stops an answer"
COMMAND_HINTS = {**dict.fromkeys(("exit", "quit"), "/exit to leave"), "reset": "/reset to start over", "help": HELP}
"""Words that alone in a line are meant as commands, and what to type for them."""
PROMPT = "> "
EMPTY_ANSWER = "(the answer is empty)"
STOPPED = "\n(stopped: what was answered stays in the conversation)"
STOPPED_AT_ONCE = "\n(stopped before an answer began: the question is dropped, its images wait for the next one)"


def run_chat(session: ChatSession) -> None:
    """Read questions and commands from standard input until it ends.

    At a terminal a line can be edited, earlier lines come back, and Ctrl-C during an answer stops it and keeps the conversation.
    Otherwise each line of standard input is a question or a command.

    Raises:
        KeyboardInterrupt: Ctrl-C while a line is awaited; at any time when standard input is not a terminal.
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
            _act(session, line, command, argument.strip())
        except UserError as error:
            print(f"({error})")
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            print("\n(stopped)")


def _act(session: ChatSession, line: str, command: str, argument: str) -> None:
    if not line:
        return
    if command == "/reset":
        session.reset()
        print("(a new conversation)")
    elif command == "/image":
        for name, image in image_paths(argument):
            width, height = session.attach(image)
            waiting = "1 image waits" if session.pending_images == 1 else f"{session.pending_images} images wait"
            print(f"({name}, {width} x {height}; {waiting} for your question)")
    elif command.startswith("/"):
        raise UserError(f"no command {command}: {HELP}")
    elif line.lower() in COMMAND_HINTS:
        print(f"(type {COMMAND_HINTS[line.lower()]})")
    else:
        _ask(session, line)


def _ask(session: ChatSession, question: str) -> None:
    answer, turns = "", session.turns
    try:
        with closing(session.ask(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(STOPPED if session.turns > turns else STOPPED_AT_ONCE)
    else:
        print("" if answer.strip() else EMPTY_ANSWER)


def _line_reader() -> Callable[[], str]:
    """Reads one line; raises EOFError where there is none, and at a terminal for Ctrl-D."""
    is_interactive = sys.stdin.isatty()
    if is_interactive and sys.stdout.isatty() and not is_dumb_terminal():
        output = create_output(unescaped(sys.stdout))
        if isinstance(output, Vt100_Output):
            output.enable_cpr = False  # a terminal that does not report its cursor would be warned of
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
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused by itself, and the others are read

    def read_line() -> str:
        if is_interactive and sys.stdout.isatty():
            print(PROMPT, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read_line
