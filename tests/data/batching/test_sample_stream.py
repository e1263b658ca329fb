"""Sample streams: every row once an epoch, the same order at any number of processes and workers, and exact resuming."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mmtune.data.batching.sample_stream import SampleStream
from mmtune.utils.errors import UserError


def rows(name: str, count: int, parsed: list[str] | None, epoch: int) -> Iterator[Callable[[], str]]:
    def read(number: int) -> str:
        if parsed is not None:
            parsed.append(f"{name}{number}")
        return f"{name}{number}"

    return (partial(read, number) for number in range(count))


def make_batch(taken: list[tuple[int, Callable[[], str]]]) -> list[str]:
    return [read() for _, read in taken]


def stream(*counts: int, weights: tuple[float, ...] = (), **settings: Any) -> SampleStream:
    sources = [partial(rows, "abc"[number], count, None) for number, count in enumerate(counts)]
    settings = {"seed": 0, "window": 7, "size": 4} | settings
    return SampleStream(sources, weights or (1.0,) * len(counts), make_batch, **settings)


def taken(of: SampleStream, batches: int, workers: int = 0) -> list[list[str]]:
    return list(islice(DataLoader(of, batch_size=None, num_workers=workers), batches))


def test_an_epoch_has_every_row_once_and_the_next_has_another_order() -> None:
    flat = list(chain.from_iterable(taken(stream(20), 10)))
    assert sorted(flat[:20]) == sorted(flat[20:]) == sorted(f"a{number}" for number in range(20))
    assert flat[:20] != flat[20:]
    assert flat[:7] != [f"a{number}" for number in range(7)]
    assert sorted(flat[:7]) == sorted(f"a{number}" for number in range(7))  # a window is shuffled within itself
    assert flat != list(chain.from_iterable(taken(stream(20, seed=1), 10)))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 3), (3, 1)])
def test_processes_and_workers_share_one_order(world_size: int, workers: int) -> None:
    whole = list(chain.from_iterable(taken(stream(30, 11, size=6), 8)))
    size = 6 // world_size if 6 % world_size == 0 else 1
    ranks = [
        taken(stream(30, 11, size=size, rank=rank, world_size=world_size), 48 // (size * world_size), workers)
        for rank in range(world_size)
    ]
    assert list(chain.from_iterable(chain.from_iterable(step) for step in zip(*ranks, strict=True))) == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [1, 3, 7, 12])
def test_a_stream_resumes_with_the_next_sample(first: int, workers: int) -> None:
    unbroken = taken(stream(20, 9, weights=(3.0, 1.0)), 15)
    resumed = stream(20, 9, weights=(3.0, 1.0))
    resumed.start_at(first)
    assert taken(resumed, 15 - first, workers) == unbroken[first:]


def test_consumed_rows_are_not_parsed_again() -> None:
    parsed: list[str] = []
    again = SampleStream([partial(rows, "a", 1000, parsed)], [1.0], make_batch, seed=0, window=10, size=4)
    again.start_at(200)
    next(iter(again))
    assert len(parsed) == 4


def test_sources_are_mixed_by_their_weights() -> None:
    flat = list(chain.from_iterable(taken(stream(5, 50, 500, weights=(1.0, 2.0, 5.0)), 100)))
    for length in (8, 80, 400):
        assert Counter(row[0] for row in flat[:length]) == {"a": length / 8, "b": length / 4, "c": length * 5 / 8}


def test_a_stream_without_rows_ends_the_run() -> None:
    """Said where the batch is taken: raised in a worker, torch would wrap it in that worker's traceback."""
    for workers in (0, 1):
        (error,) = taken(stream(3, 0), 2, workers)
        assert isinstance(error, UserError) and str(error) == "data.train[1]: the stream has no rows"


@pytest.mark.slow
def test_killed_runs_read_the_rows_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """A process writes the ids of each batch; it is killed at random moments and resumes after the last line that it wrote."""
    lines = [json.dumps({"id": number, "text": "x" * (number % 50)}) for number in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    script = f"""
        import json, os, sys
        from itertools import islice
        from pathlib import Path
        from torch.utils.data import DataLoader
        from mmtune.data.sources.source import stream_rows
        from mmtune.data.batching.sample_stream import SampleStream

        log, done = Path(sys.argv[1]), int(sys.argv[2])
        source = lambda epoch: stream_rows({str(tmp_path / "rows.jsonl")!r})
        batch = lambda taken: [read()[0] for _, read in taken]
        stream = SampleStream([source], [1.0], batch, seed=3, window=64, size=4)
        stream.start_at(done)
        with log.open("a") as file:
            for ids in islice(DataLoader(stream, batch_size=None, num_workers=2), 250 - done):
                file.write(json.dumps(ids) + "\\n")
                file.flush()
                os.fsync(file.fileno())
                print(flush=True)
    """
    script_file = tmp_path / "run.py"
    script_file.write_text(textwrap.dedent(script))

    def start(log: Path) -> subprocess.Popen[bytes]:
        done = len(log.read_bytes().splitlines()) if log.exists() else 0
        command = [sys.executable, str(script_file), str(log), str(done)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    start(unbroken).communicate()
    moments = random.Random(0)
    for _ in range(2):
        process = start(broken)
        assert process.stdout is not None
        for _ in range(moments.randrange(10, 80)):
            process.stdout.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        whole = broken.read_bytes()
        broken.write_bytes(whole[: whole.rfind(b"\n") + 1])  # a line that was cut off was not taken
    start(broken).communicate()
    assert len(unbroken.read_bytes().splitlines()) == 250
    assert broken.read_bytes() == unbroken.read_bytes()
