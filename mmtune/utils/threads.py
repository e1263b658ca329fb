"""The threads of the OpenMP runtime that torch brings: how many there are, and how they wait for each other.

The runtime reads its settings from the environment, once, when it is loaded. `prepare_threads` therefore runs before torch is
imported, and leaves alone what the user or a launcher has set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SPIN_COUNT = "1000"
"""How often a waiting thread of libgomp looks for the others before it sleeps.

libgomp's own value, 300,000 (milliseconds), suits threads that all have a core. Where other processes use the cores too, every
operation has a thread that waits for one without a core, and keeps a core busy while it does. benchmarks/busy_cores.py compares.
"""


def prepare_threads() -> None:
    """Set up the OpenMP runtime for cores that other processes may use too; without effect once torch is imported."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    share = max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if "OMP_NUM_THREADS" not in os.environ and share < _affinity():  # else torch's own number is right: no hyper-threads
        os.environ["OMP_NUM_THREADS"] = str(share)


def usable_cores() -> int:
    """The cores that this process may use at once: those of its affinity, and no more than its control groups' CPU quota.

    `os.cpu_count` gives the machine's, in a container too. A quota is rounded to whole cores: 1.5 counts as
    2, and 1.2 as 1.
    """
    return max(min((_affinity(), *map(round, cpu_quotas()))), 1)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quotas(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """The CPU quotas of the control groups that this process is in, of either version, in cores; none where there is no limit.

    Args:
        groups: lists the process's groups.
        mounted: where the groups' files are. In a container they may lie at the top, whatever path `groups` names.
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
