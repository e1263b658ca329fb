"""Signals: no half-written files, and the exit code that a shell expects."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtune import __main__
from mmtune.cli import main as cli
from mmtune.cli import recipe_verbs
from mmtune.cli.main import entry_point
from mmtune.console.signals import ENDING
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.training.callbacks import StopOnSignal
from mmtune.utils.files import replaced_directory


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], int]]:
    """Run `mmtune methods` with another function in its place; signals are as a shell leaves them, and after it too."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}

    def run(act: Callable[[], Any]) -> int:
        monkeypatch.setattr(recipe_verbs, "_methods", lambda arguments: act())
        code = entry_point(["methods"])
        assert all(signal.getsignal(number) is signal.SIG_DFL for number in ENDING)
        return code

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_half_written_files_are_removed(
    verb: Callable[[Callable[[], Any]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def write() -> None:
        with replaced_directory(tmp_path / "out", False, "mark") as fresh:
            (fresh / "mark").touch()
            try:
                signal.raise_signal(number)
            except Exception:
                pytest.fail("a library that continues after any error would continue after the signal")

    assert verb(write) == 128 + number
    assert capsys.readouterr().err == f"stopped: by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_interrupt_the_way_out(verb: Callable[[Callable[[], Any]], int]) -> None:
    def write() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)

    assert verb(write) == 143


def test_a_forked_process_ends_by_the_signal_itself(verb: Callable[[Callable[[], Any]], int]) -> None:
    def fork() -> None:
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    assert verb(fork) == 0


def test_nohup_stays_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nothing: Any = None
    try:
        monkeypatch.setattr(recipe_verbs, "_methods", lambda arguments: signal.raise_signal(signal.SIGHUP))
        assert entry_point(["methods"]) == 0
        stop = StopOnSignal(SINGLE_PROCESS)
        stop.on_train_begin(nothing, nothing, nothing)
        signal.raise_signal(signal.SIGHUP)
        stop.restore()
        assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("imported", ["argparse", "traceback"])
def test_ctrl_c_while_the_command_line_is_imported(tmp_path: Path, imported: str) -> None:
    (tmp_path / f"{imported}.py").write_text("raise KeyboardInterrupt", encoding="utf-8")
    program = "import sys; sys.path.insert(0, sys.argv[1]); from mmtune.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_traceback_of_a_bug_is_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(cli, "entry_point", lambda: 0)
    assert __main__.main() == 0
    error = ValueError("\x1b[2Jx")
    sys.excepthook(ValueError, error, None)
    assert capsys.readouterr().err == "ValueError: \\u001b[2Jx\n"
