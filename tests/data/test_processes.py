"""The parallel map over rows: results in order, also after a process was killed; no process is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mmtune.data.message import RowError
from mmtune.data.processes import map_rows


def test_the_rest_of_the_rows_follows_a_killed_process(capsys: pytest.CaptureFixture[str]) -> None:
    main = os.getpid()

    def function(row: int) -> int:
        if row == 5 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    assert list(map_rows(function, range(9), 1, None, 2)) == list(range(9))
    assert "the rest runs in one process" in capsys.readouterr().out


def test_an_error_of_a_row_is_its_result() -> None:
    def function(row: int) -> int:
        if row == 1:
            raise RowError("r1", "image", "no such file", "image_missing")
        return row

    results = list(map_rows(function, range(3), 1, None, 2))
    assert results[0] == 0 and results[2] == 2
    assert isinstance(results[1], RowError) and "r1" in str(results[1])


def test_processes_end_with_the_iterator(tmp_path: Path) -> None:
    def function(row: int) -> int:
        (tmp_path / str(os.getpid())).touch()
        return row

    results = map_rows(function, range(1000), 1, None, 1)
    assert next(results) == 0
    results.close()
    [pid] = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
