"""Threads of torch's OpenMP runtime: their number, and how long they spin while waiting.

The runtime reads its settings from environment variables once, when it is loaded. `prepare_threads` therefore runs before torch
is imported. Variables that the user or a launcher has set are not changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SPIN_COUNT = "1000"
"""How many times a waiting thread of libgomp spins before it sleeps.

libgomp's default, 300,000 (milliseconds), suits threads with a core each. If other processes use the cores too, threads of
every operation wait for one that has no core, and occupy cores while they spin. benchmarks/busy_cores.py compares both.
"""


def prepare_threads() -> None:
    """Configure the OpenMP runtime for cores that other processes may use too. Has no effect after torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    share = core_share()
    if (
        "OMP_NUM_THREADS" not in os.environ and share < _affinity()
    ):  # otherwise torch's default applies: one thread per physical core
        os.environ["OMP_NUM_THREADS"] = str(share)


def core_share() -> int:
    """The usable cores of each process that a launcher started on this machine, at least one."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usable_cores() -> int:
    """The number of cores that this process may use at once: its CPU affinity, limited by the CPU quota of its control groups.

    `os.cpu_count` gives the cores of the machine, also in a container. A quota is rounded to whole cores: 1.5 counts as 2,
    and 1.2 as 1.
    """
    return max(min((_affinity(), *map(round, cpu_quotas()))), 1)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quotas(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """The CPU quotas, in cores, of the control groups (v1 and v2) of this process. Groups without a limit are left out.

    Args:
        groups: the file that lists the groups of the process.
        mounted: where the control groups are mounted. In a container, their files may be at the top of the mount.
    """
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path)
        for parent in (group, *group.parents):
            folder = mounted / controllers / str(parent).strip("/")
            if (limit := folder / "cpu.max").is_file():  # version 2
                quota, period = limit.read_text(encoding="utf-8").split()
            elif (limit := folder / "cpu.cfs_quota_us").is_file():  # version 1
                quota, period = limit.read_text(encoding="utf-8"), (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
            else:
                continue
            if quota != "max" and int(quota) > 0:
                yield int(quota) / int(period)
