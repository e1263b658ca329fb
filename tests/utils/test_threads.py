"""Thread counts of a process and the wait policy of its threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmtune.utils import threads
from mmtune.utils.threads import SPIN_COUNT, cpu_quotas, prepare_threads, usable_cores


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 16 cores, and an environment that says nothing about threads."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # which is undone, as what is set below is not
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_affinity", lambda: 16)
    monkeypatch.setattr(threads, "cpu_quotas", list)


@pytest.mark.parametrize(
    ("files", "quotas"),
    [
        ({}, []),  # no control groups
        ({"groups": "0::/\n", "cpu.max": "max 100000\n"}, []),
        ({"groups": "0::/\n", "cpu.max": "150000 100000\n"}, [1.5]),
        ({"groups": "0::/a/b\n", "a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, [3]),  # a parent's limit
        ({"groups": "5:cpu,cpuacct:/job\n", "cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n"}, [0.5]),
        ({"groups": "2:cpu:/\n1:cpuset:/\n", "cpu/cpu.cfs_quota_us": "-1\n"}, []),
        # a container of version 1: the path is the host's, the files lie at the top
        ({"groups": "2:cpu:/docker/f00\n", "cpu/cpu.cfs_quota_us": "400000\n"}, [4]),
    ],
)
def test_quotas_of_both_versions_are_read(tmp_path: Path, files: dict[str, str], quotas: list[float]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        if name.endswith("quota_us"):
            (tmp_path / name).with_name("cpu.cfs_period_us").write_text("100000\n")
    assert list(cpu_quotas(tmp_path / "groups", tmp_path)) == quotas


@pytest.mark.parametrize(
    ("quotas", "processes", "cores", "number"),
    [
        ([], None, 16, None),  # torch's own number
        ([1.5], None, 2, "2"),
        ([3.2], None, 3, "3"),
        ([6, 0.5], None, 1, "1"),
        ([99], None, 16, None),
        ([], "4", 16, "4"),
        ([6], "4", 6, "1"),
        ([2], "4", 2, "1"),
    ],
)
def test_threads_are_as_many_as_cores(
    nothing_set: None, monkeypatch: pytest.MonkeyPatch, quotas: list[float], processes: str | None, cores: int, number: str | None
) -> None:
    monkeypatch.setattr(threads, "cpu_quotas", lambda: quotas)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    prepare_threads()
    assert usable_cores() == cores
    assert os.environ.get("OMP_NUM_THREADS") == number
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT


def test_settings_of_the_user_are_unchanged(nothing_set: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quotas", lambda: [2])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "GOMP_SPINCOUNT" not in os.environ
