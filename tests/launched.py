"""Recipes trained by several processes: one launch of two, on the CPU, trains them one after another.

`launch` is what tests call. This file is also what the processes run:

    accelerate launch ... tests/launched.py JOBS.json RESULTS.jsonl
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 120.0
COMPILE = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


def launch(recipes: Sequence[tuple[Path, int | None]], folder: Path) -> list[bool | str]:
    """Train each recipe in two processes at its ZeRO stage; None is DDP.

    Args:
        folder: for what the processes are told and print.

    Returns:
        For each recipe true, or the reason why not: the error of the first process that failed, or that there was no end.
    """
    jobs, results = folder / "jobs.json", folder / "results.jsonl"
    found: dict[int, bool | str] = {}
    for deepspeed in (True, False):
        mine = [number for number, (_, stage) in enumerate(recipes) if (stage is not None) == deepspeed]
        while left := [number for number in mine if number not in found]:
            jobs.write_text(json.dumps([[number, str(recipes[number][0]), recipes[number][1]] for number in left]))
            results.write_text("")
            ended = _processes(deepspeed, jobs, results)
            found |= dict(map(json.loads, results.read_text().splitlines()))
            stuck = next((number for number in left if number not in found), None)
            if stuck is not None:  # the first without a result is the one that the launch ended in
                found[stuck] = f"the processes hang or end: {ended}"
    return [found[number] for number in range(len(recipes))]


def _processes(deepspeed: bool, jobs: Path, results: Path) -> str:
    """Two processes, ended when they bring no result for `PATIENCE_S`."""
    if deepspeed:  # compiles at its first use, for minutes; ended meanwhile, it would leave a lock that others wait for
        subprocess.run([sys.executable, "-c", COMPILE], check=True, capture_output=True)
    strategy = ["--use_deepspeed", "--zero_stage", "2"] if deepspeed else ["--multi_gpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *strategy, "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ} if deepspeed else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    command += [str(Path(__file__)), str(jobs), str(results)]
    with results.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        size, since = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            if results.stat().st_size != size:
                size, since = results.stat().st_size, time.monotonic()
            if time.monotonic() - since > PATIENCE_S:
                for each in (
                    *psutil.Process(process.pid).children(recursive=True),
                    process,
                ):  # workers have sessions of their own
                    each.kill()
                process.wait()
                return f"no result for {PATIENCE_S:.0f} s"
    return f"exit code {process.returncode}"


@contextmanager
def nothing_known() -> Iterator[None]:
    """The recipe refuses what the table says does not work; here that is what is asked."""
    from mmtune.methods import table

    real = table.capabilities
    table.capabilities = dict  # type: ignore[assignment]
    try:
        yield
    finally:
        table.capabilities = real


def reason(run: Callable[[], Any]) -> bool | str:
    """True, or the first line of what was raised: what fails is what is looked for."""
    from mmtune.errors import CheckFailed, UserError

    try:
        run()
    except (UserError, CheckFailed, RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError) as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"
    return True


def main(jobs: Path, results: Path) -> None:
    import torch
    from torch import distributed

    from mmtune.console import settle_console
    from mmtune.recipe import load_recipe
    from mmtune.train import train

    settle_console()
    torch.set_num_threads(1)
    for number, recipe, stage in json.loads(jobs.read_text()):
        if stage is not None:
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
        with nothing_known():
            outcome = reason(lambda path=Path(recipe): train(load_recipe(path), ["test"], overwrite=True))
        outcomes: list[bool | str] = [outcome] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, outcome)
        gc.collect()
        if distributed.get_rank() == 0:
            failed = next((each for each in outcomes if each is not True), True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, failed]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
