"""`mmtune chat` on a terminal: line editing, Ctrl-C during an answer and at the prompt."""

from __future__ import annotations

import copy
import os
import re
import select
import subprocess
import sys
import termios
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

TIMEOUT_S = 120.0
SEQUENCES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])|\r")


class Terminal:
    """A program on its own pseudo-terminal.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, command: list[str]) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        environment = {**os.environ, "TERM": "xterm"}
        self._process = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(slave), pass_fds=[slave], env=environment)
        os.close(slave)
        self._printed = b""
        self.screen = ""  # what was printed, without terminal sequences
        self._read = 0

    def type(self, keys: str) -> None:
        """Send keys."""
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str) -> None:
        """Wait until the output since the last call matches."""
        end = time.monotonic() + TIMEOUT_S
        while not (match := re.compile(pattern, re.DOTALL).search(self.screen, self._read)):
            ready, _, _ = select.select([self._master], [], [], end - time.monotonic())
            assert ready, f"no {pattern!r} in {self.screen[self._read :]!r}"
            self._printed += os.read(self._master, 4096)
            self.screen = SEQUENCES.sub("", self._printed.decode(errors="replace"))
        self._read = match.end()

    def exit_code(self) -> int:
        """Wait for the program to end and return its exit code."""
        return self._process.wait(TIMEOUT_S)

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()
        os.close(self._master)


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ends_the_chat_at_the_prompt(answering_llava: tuple[Any, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(answering_llava[0])
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False  # otherwise its head is not saved
    save_checkpoint(model, answering_llava[1], tmp_path / "model")
    command = ["chat", str(tmp_path / "model"), "--max-new-tokens", "1000000"]
    with closing(Terminal([sys.executable, "-m", "mmtune.cli.main", *command])) as terminal:
        terminal.wait_for(r"/exit\s+ends\s+the\s+chat.*>")
        terminal.type("what is it?\r")
        terminal.wait_for(r"what is it\?\n\s*\S")
        terminal.type("\x03")
        terminal.wait_for(r"\n\(stopped: the text so far stays in the conversation\)\n.*>")
        terminal.type("\x1b[A")
        terminal.wait_for(r"what is it\?")
        terminal.type("\x7f, really?\r")
        terminal.wait_for(r"really\?\n\s*\S")
        terminal.type("\x03\x03")
        terminal.wait_for(r"\n\(stopped: the text so far stays in the conversation\)\n.*>")
        terminal.type("\x1b[200~one\ntwo 世界\x1b[201~\r")  # a pasted text of two lines is one question
        terminal.wait_for(r"one\n *two 世界\n\s*\S")
        terminal.type("\x03")
        terminal.wait_for(r"\n\(stopped: the text so far stays in the conversation\)\n.*>")
        terminal.type("/edit\r")
        terminal.wait_for(r"> /edit one\n *two 世界")
        terminal.type("\x03\x03")  # discards the line
        terminal.wait_for(r"\n\(Ctrl-C again or /exit ends the chat\)\n.*>")
        terminal.type("\x03")
        terminal.wait_for("\ninterrupted\n")
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.screen
