"""The parallel map over rows: results in order, also after a process was lost at any moment; no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtune.data.message import RowError
from mmtune.data.processes import map_rows
from mmtune.utils.errors import UserError

MAIN = os.getpid()


@pytest.mark.parametrize(("processes", "chunk"), [(1, 1), (2, 3), (3, 2), (4, 100)])
def test_results_come_in_order_from_other_processes(processes: int, chunk: int) -> None:
    results = list(map_rows(lambda row: (row, os.getpid()), range(10), processes, None, chunk))
    assert [row for row, _ in results] == list(range(10))
    assert MAIN not in {process for _, process in results}
    assert len({process for _, process in results}) == min(processes, -(-10 // chunk))


def test_the_rest_of_the_rows_follows_a_killed_process(capsys: pytest.CaptureFixture[str]) -> None:
    def function(row: int) -> int:
        if row == 5 and os.getpid() != MAIN:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    assert list(map_rows(function, range(9), 2, None, 2)) == list(range(9))
    printed = capsys.readouterr().out
    assert "a worker process ended (SIGKILL); probably the machine ran out of memory; the rest is done in one process" in printed


def test_a_process_that_is_killed_while_the_main_one_computes_ends_nothing(tmp_path: Path) -> None:
    """torch's data loader raises in the main process then, in whatever it does."""

    def function(row: int) -> tuple[int, int]:
        return row, os.getpid()

    results = map_rows(function, range(200), 1, None, 1)
    _, process = next(results)
    os.kill(process, signal.SIGKILL)
    for child in multiprocessing.active_children():
        child.join(30)
    assert sum(range(1000)) == 499500  # a signal handler would run here
    assert [row for row, _ in results] == list(range(1, 200))


def test_a_process_that_crashes_is_an_error_with_its_rows() -> None:
    def function(row: int) -> int:
        if row == 5:
            os.kill(os.getpid(), signal.SIGSEGV)
        return row

    with pytest.raises(UserError, match=r"crashed \(SIGSEGV\) in one of the rows 4 to 5, counted from 0"):
        list(map_rows(function, range(9), 1, None, 2))


def test_an_error_of_a_row_is_its_result_and_others_are_raised() -> None:
    def function(row: int) -> int:
        if row == 1:
            raise RowError("r1", "image", "no such file", "image_missing")
        if row == 3:
            raise UserError("not about a row")
        return row

    results = map_rows(function, range(5), 1, None, 2)
    assert next(results) == 0
    assert isinstance(error := next(results), RowError) and "r1" in str(error)
    assert next(results) == 2
    with pytest.raises(UserError, match="not about a row"):
        next(results)


def test_a_bug_is_raised_as_itself(capfd: pytest.CaptureFixture[str]) -> None:
    def function(row: int) -> int:
        return 1 // (row - 3)

    with pytest.raises(ZeroDivisionError):
        list(map_rows(function, range(6), 1, None, 2))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_result_that_cannot_be_sent_is_made_here() -> None:
    assert [result() for result in map_rows(lambda row: lambda: row, range(4), 1, None, 2)] == [0, 1, 2, 3]


def test_without_processes_all_rows_are_done_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    assert list(map_rows(lambda row: row, range(5), 2, None, 2)) == list(range(5))
    assert "cannot start a worker process (Resource temporarily unavailable)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "platform", "darwin")
    assert list(map_rows(lambda row: os.getpid(), range(2), 2, None, 2)) == [MAIN, MAIN]


def test_processes_end_with_the_iterator() -> None:
    results = map_rows(lambda row: os.getpid(), range(1000), 1, None, 1)
    process = next(results)
    results.close()
    assert not Path(f"/proc/{process}").exists()
