"""The error of a launched run: one process prints it, and the launcher's report has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mmtune.distributed import launch_errors
from mmtune.distributed.launch_errors import ERROR_FILE, leaves_bugs, print_error, print_lost_peer


class Launch:
    """The processes of one machine, one after another in this one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch

    def be(self, rank: int) -> Path:
        """Become a process; returns its error file."""
        file = self._folder / str(rank) / "error.json"
        file.parent.mkdir(exist_ok=True)
        self._monkeypatch.setenv("RANK", str(rank))
        self._monkeypatch.setenv(ERROR_FILE, str(file))
        return file


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setattr(launch_errors, "FIRST_S", 0.0)
    monkeypatch.setattr(launch_errors, "LAUNCHER_S", 0.0)
    return Launch(tmp_path, monkeypatch)


def test_the_same_error_is_printed_once(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not launch.be(0).exists()
    print_error("error: r.yaml:1: unknown key")
    assert not launch.be(1).exists()
    print_error("error: r.yaml:1: unknown key")
    assert not launch.be(1).exists()  # the launcher's report has it once
    assert capsys.readouterr().err == "error: r.yaml:1: unknown key\n"
    print_error("error: another")
    assert launch.be(1).exists()
    assert capsys.readouterr().err == "[rank 1] error: another\n"


def test_without_a_launcher_an_error_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ERROR_FILE, raising=False)
    print_error("error: x")
    assert capsys.readouterr().err == "error: x\n"


def test_the_launchers_report_shows_the_error(launch: Launch) -> None:
    """As torch reads it."""
    files = {rank: launch.be(rank) for rank in (1, 0)}
    print_error("error: r.yaml:1:\nunknown \x1b[31mkey")
    failures = {rank: ProcessFailure(rank, 7, 2 if rank == 0 else -15, str(file)) for rank, file in sorted(files.items())}
    report = str(ChildFailedError("train.py", failures))
    root_cause = report.rpartition("Root Cause")[2]
    assert "traceback : error: r.yaml:1:\n  unknown \\u001b[31mkey\n" in root_cause
    assert "exitcode  : 2 " in root_cause


def test_a_lost_peer_is_reported_once_and_not_over_an_error(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    file = launch.be(0)
    print_lost_peer()
    assert "aborted: another process of the run ended" in capsys.readouterr().err
    launch.be(1)
    print_lost_peer()  # of the others nobody says it too
    print_error("error: its own")
    launch.be(0)
    print_lost_peer()
    assert capsys.readouterr().err == "[rank 1] error: its own\n"
    assert not file.exists()  # it is not the root cause


def test_a_bug_in_a_launched_run_keeps_its_traceback(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which is undone

    def fail(rank: int) -> Path:
        file = launch.be(rank)
        with pytest.raises(ZeroDivisionError), leaves_bugs():
            1 / 0  # noqa: B018
        return file

    message = json.loads(fail(0).read_text())["message"]
    assert message["message"] == "ZeroDivisionError: division by zero"
    assert message["extraInfo"]["py_callstack"].startswith("Traceback (most recent call last):")
    assert sys.excepthook is sys.__excepthook__  # Python prints it
    assert not fail(1).exists()
    assert sys.excepthook is not sys.__excepthook__
