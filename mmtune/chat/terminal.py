"""Chat in the terminal: line editing, and Ctrl-C to stop an answer."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Callable

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.utils import is_dumb_terminal

from mmtune.chat.commands import COMMANDS, Chat, ask, run_command
from mmtune.chat.image_paths import CommandCompleter, is_dropped_file
from mmtune.chat.session import ChatSession
from mmtune.console.terminal_text import unescaped
from mmtune.utils.errors import UserError

HELP = (
    "/image FILE ... attaches images to your next question; /help lists the commands; /exit ends the chat; Ctrl-C stops an answer"
)
COMMAND_HINTS = {
    **dict.fromkeys(("exit", "quit"), "/exit to end the chat"),
    "reset": "/reset to start a new conversation",
    "undo": "/undo to remove the last question and answer",
    "retry": "/retry for another answer",
    "help": "/help for the commands",
}
"""Lines that are probably meant as commands, and what to type instead."""
PROMPT = "> "
INTERRUPTED = "(Ctrl-C again or /exit ends the chat)"


def run_chat(session: ChatSession) -> int:
    """Read questions and commands from standard input until it ends.

    On a terminal, lines can be edited and have a history, and Ctrl-C during an answer stops it but keeps the conversation.
    Otherwise each line of standard input is a question or a command.

    Returns:
        The number of lines that were errors.

    Raises:
        KeyboardInterrupt: Ctrl-C twice at an empty prompt; at any time if standard input is not a terminal.
    """
    edited: list[str] = []  # the text to put into the line editor
    editor = _line_editor()
    read_line = _read_plain_line if editor is None else lambda: editor(edited.pop() if edited else "")
    chat = Chat(session, None if editor is None else edited.append)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is an error of its own; other lines are read
    print(textwrap.fill(HELP, shutil.get_terminal_size().columns) if sys.stdout.isatty() else HELP)
    interrupted, errors = False, 0
    while True:
        try:
            line = read_line()
            interrupted = False
            _handle_line(chat, line)
        except EOFError:
            return errors
        except UserError as error:
            print(f"({error})")
            errors += 1
        except KeyboardInterrupt:  # at the prompt
            if interrupted or not sys.stdin.isatty():
                raise
            interrupted = True  # the first one may have been for an answer that has just ended
            print(INTERRUPTED)


def _handle_line(chat: Chat, line: str) -> None:
    question = line.strip()
    try:
        if is_dropped_file(line):
            raise UserError(f"expected a question, got a file; /image {question[:200]} attaches it")
        if line.startswith("/"):
            run_command(chat, line)
        elif question.lower() in COMMAND_HINTS:
            print(f"(type {COMMAND_HINTS[question.lower()]})")
        elif question:
            ask(chat, question)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("\n(stopped)")


def _line_editor() -> Callable[[str], str] | None:
    """A function that reads a line on a terminal, given the text to edit; None without a terminal that can edit lines.

    It raises EOFError for Ctrl-D.
    """
    if not sys.stdin.isatty() or not sys.stdout.isatty() or is_dumb_terminal():
        return None
    output = create_output(unescaped(sys.stdout))
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # avoids prompt_toolkit's warning on terminals that do not report the cursor position
    editor: PromptSession[str] = PromptSession(
        PROMPT,
        output=output,
        completer=CommandCompleter(COMMANDS, [name for name, command in COMMANDS.items() if "FILE" in command.usage]),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        enable_suspend=True,
        key_bindings=_key_bindings(),
    )
    return lambda text: editor.prompt(default=text)


def _key_bindings() -> KeyBindings:
    """Ctrl-C discards a line that is not empty."""
    bindings = KeyBindings()

    @bindings.add("c-c", filter=has_focus(DEFAULT_BUFFER))
    def discard(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

    return bindings


def _read_plain_line() -> str:
    """A line of standard input. Raises EOFError at its end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        print(PROMPT, end="", flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
