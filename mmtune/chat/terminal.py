"""A conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from mmtune.chat.session import ChatSession
from mmtune.errors import UserError

HELP = "/image FILE shows an image with your next question, /reset starts over, /exit leaves"


def converse(session: ChatSession) -> None:
    """Read questions and commands from standard input until it ends."""
    print(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if not line:
                continue
            if command == "/exit":
                return
            if command == "/reset":
                session.reset()
                print("(a new conversation)")
            elif command == "/image":
                width, height = session.attach(Path(argument.strip()))
                print(f"({argument.strip()}, {width} x {height}: ask about it)")
            elif command.startswith("/"):
                print(f"(no command {command}: {HELP})")
            else:
                for piece in session.ask(line):
                    print(piece, end="", flush=True)
                print()
        except UserError as error:
            print(f"({error})")
