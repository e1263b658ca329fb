"""Terminal output: control characters of data and answers are escaped, and a failed output is reported."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from tqdm import tqdm

from mmtune.cli import recipe_verbs
from mmtune.cli.main import entry_point
from mmtune.console.styled_console import StyledConsole
from mmtune.console.terminal_text import EscapedStream, escape_controls
from mmtune.utils.errors import UserError

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\r\u202egnp.exe\u2069"
SHOWN = "\\u001b]0;title\\u0007\\u001b[2J\\u009b31m\\u007f\\u000d\\u202egnp.exe\\u2069"
PLAIN = "tab\tnewline\n한국어 naïve \U0001f469\u200d\U0001f4bb"


def test_control_characters_are_escaped_and_text_is_kept() -> None:
    assert escape_controls(HOSTILE) == SHOWN
    assert escape_controls(PLAIN) == PLAIN
    assert escape_controls("name\udcff") == "name\\udcff"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run `mmtune methods` with another function in its place."""

    def run(act: Callable[[], Any], *options: str) -> int:
        monkeypatch.setattr(recipe_verbs, "_methods", lambda arguments: act())
        return entry_point(["methods", *options])

    yield run


def test_a_command_prints_and_reports_escaped(verb: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def act() -> None:
        print(HOSTILE, PLAIN)
        raise UserError(HOSTILE)

    before = sys.stdout, sys.stderr
    assert verb(act) == 2
    assert (sys.stdout, sys.stderr) == before
    captured = capsys.readouterr()
    assert captured.out == f"{SHOWN} {PLAIN}\n"
    assert captured.err == f"error: {SHOWN}\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_keeps_its_values(verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert verb(lambda: {"answer": HOSTILE + PLAIN}, "--json") == 0
    assert json.loads(written.getvalue().decode(encoding)) == {"answer": HOSTILE + PLAIN}
    assert not set(b"\x1b\x07\x7f") & set(written.getvalue())


def test_a_terminal_without_the_characters_gets_escapes(verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert verb(lambda: print("naïve")) == 0
    assert written.getvalue() == b"na\\xefve\n"


def test_progress_bars_keep_their_cursor_movements() -> None:
    text = io.StringIO()
    stream: Any = EscapedStream(text, "standard error", shows_progress=True)
    with (
        tqdm(total=2, desc=f"outer {HOSTILE}", file=stream) as outer,
        tqdm(total=1, desc="inner", file=stream, position=1) as inner,
    ):
        inner.update()
        outer.update()
    assert "\x1b[A" in text.getvalue()
    assert "\r" in text.getvalue()
    assert f"outer {SHOWN}" in text.getvalue()
    assert "\x1b]0" not in text.getvalue()


def test_a_table_keeps_its_styles_and_its_text_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", EscapedStream(text, "standard output"))
    table = Table("name")
    table.add_row("\x1b[2Jx", style="bold red")
    StyledConsole(force_terminal=True, color_system="standard", width=60).print(table)
    assert "\x1b[1;31m" in text.getvalue()
    assert "\\u00" in text.getvalue()  # a cell as wide as the text that was asked for
    assert "\x1b[2J" not in text.getvalue()


def print_table() -> None:
    table = Table("name")
    table.add_row("naïve" + "x" * 100_000)
    StyledConsole(width=200_000).print(table)


PRINTS: dict[str, Callable[[], None]] = {
    "a character": lambda: print("x"),
    "more than a buffer": lambda: print("x" * 100_000),
    "a table": print_table,
}


def test_a_table_on_a_terminal_without_the_characters(verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert verb(print_table) == 0
    assert b"na\\xefve" in written.getvalue()


@pytest.mark.parametrize("size", list(PRINTS))
def test_a_closed_pipe_ends_the_command_quietly(
    verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], size: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert verb(PRINTS[size]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("size", list(PRINTS))
def test_a_full_disk_behind_the_output_is_named(
    verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], size: str
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert verb(PRINTS[size]) == 2
    assert capfd.readouterr().err == "error: cannot write to standard output: No space left on device\n"


def test_a_closed_terminal_does_not_stop_a_run() -> None:
    master, slave = os.openpty()
    os.close(master)
    with os.fdopen(slave, "w", buffering=1) as gone:
        stream = EscapedStream(gone, "standard output")
        stream.write("the first\n")
        stream.write("the second\n")
        stream.flush()


def test_streams_that_were_closed_before(verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert verb(lambda: print("x")) == 0
    assert verb(print_table, "--json") == 0
