"""Recipes trained by several processes on the CPU, one after another, and the commands that start such processes.

`launch` forks the processes, so that they start at once. accelerate's launcher runs in each of them, up to where it would start
programs: what a shipped configuration of it says reaches the run by the environment it makes, as it does a user's.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
from forked import forking, settle

TIMEOUT_S = 120.0
CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


def launcher(config: str, processes: int = 2) -> list[str]:
    """The beginning of a command that starts a program in several processes on this machine."""
    if config == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-m", "accelerate.commands.launch", *_arguments(config, processes)]


def _arguments(config: str, processes: int) -> list[str]:
    file = str(CONFIGS / f"{config}.yaml")
    return ["--config_file", file, "--num_processes", str(processes), "--main_process_port", "0"]


@functools.cache
def compile_cpu_adam() -> None:
    """DeepSpeed compiles it at its first use, for minutes; ended meanwhile, it would leave a lock that others wait for."""
    process = forking.Process(target=_compile)
    process.start()
    process.join()
    assert process.exitcode == 0


def _compile() -> None:
    settle(Path(os.devnull))
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()


def launch(
    recipes: Sequence[tuple[Path, str] | tuple[Path, str, int | str]],
    folder: Path,
    processes: int = 2,
    timeout_s: float = TIMEOUT_S,
) -> list[bool | str]:
    """Train each recipe in several processes.

    Args:
        recipes: with the launch of each: the name of a shipped configuration of accelerate, or `torchrun`, where a recipe may
            name DeepSpeed itself. A third value is the step after which the last process gets SIGTERM, `resume`,
            `rehearse`, or `profile`.
        folder: for the processes' input and output.
        timeout_s: seconds that a recipe may take.

    Returns:
        For each recipe true, or the reason why not: the error of the process that failed first, or that there was no end.
    """
    jobs, results = folder / "jobs.json", folder / "results.jsonl"
    outcomes: dict[int, bool | str] = {}
    for config in dict.fromkeys(strategy for _, strategy, *_ in recipes):
        numbers = [number for number, (_, strategy, *_) in enumerate(recipes) if strategy == config]
        while left := [number for number in numbers if number not in outcomes]:
            jobs.write_text(json.dumps([[number, str(recipes[number][0]), *recipes[number][2:]] for number in left]))
            results.write_text("")
            ended = _processes(config, jobs, results, processes, timeout_s)
            outcomes |= dict(map(json.loads, results.read_text().splitlines()))
            stuck = next((number for number in left if number not in outcomes), None)
            if stuck is not None:  # the first without a result is the one that the launch ended in
                outcomes[stuck] = f"the processes hang or end: {ended}"
    return [outcomes[number] for number in range(len(recipes))]


def _processes(config: str, jobs: Path, results: Path, processes: int, timeout_s: float) -> str:
    if config.endswith("offload"):
        compile_cpu_adam()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [forking.Process(target=_work, args=(config, rank, processes, port, jobs, results)) for rank in range(processes)]
    for process in started:
        process.start()
    try:
        return _wait(started, results, timeout_s)
    finally:
        for process in started:
            if process.is_alive():
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
            process.join()


def _wait(started: list[ForkServerProcess], results: Path, timeout_s: float) -> str:
    """Until all have ended, one has failed, or there was no new result for `timeout_s`."""
    size, since = 0, time.monotonic()
    while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
        time.sleep(0.05)
        if results.stat().st_size != size:
            size, since = results.stat().st_size, time.monotonic()
        if time.monotonic() - since > timeout_s:
            return f"no result for {timeout_s:.0f} s"
    return f"exit codes {[process.exitcode for process in started]}"


def _work(config: str, rank: int, size: int, port: int, jobs: Path, results: Path) -> None:
    settle(results.with_suffix(".log"))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run

    run.run = lambda arguments: train_all(jobs, results)  # type: ignore[assignment]
    if config == "torchrun":
        run.run(None)
    else:
        if not config.startswith("zero"):  # DeepSpeed would be switched off by it
            os.environ["ACCELERATE_USE_CPU"] = "true"
        launch_command(launch_command_parser().parse_args([*_arguments(config, size), __file__]))


@contextmanager
def nothing_known() -> Iterator[None]:
    """The recipe refuses what the table says does not work; here that is what is asked."""
    from mmtune.methods import capability_table

    real = capability_table.capabilities
    capability_table.capabilities = dict  # type: ignore[assignment]
    try:
        yield
    finally:
        capability_table.capabilities = real


def reason(run: Callable[[], Any]) -> bool | str:
    """True, or the first line of what was raised: what fails is what is looked for."""
    from mmtune.utils.errors import CheckFailed, Stopped, UserError

    try:
        run()
    except (
        UserError,
        CheckFailed,
        Stopped,
        RuntimeError,
        ValueError,
        AttributeError,
        TypeError,
        LookupError,
        AssertionError,
    ) as e:
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:120]}"
    return True


@contextmanager
def signalled(step: int | None) -> Iterator[None]:
    """The last process gets SIGTERM in a step."""
    from torch import distributed
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from mmtune.training.callbacks import StopOnSignal

    def begin(self: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step + 1 == step and distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    StopOnSignal.on_step_begin = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        del StopOnSignal.on_step_begin


def train_all(jobs: Path, results: Path) -> None:
    """What each of the processes does."""
    import torch
    from torch import distributed

    from mmtune.console.library_output import configure_console
    from mmtune.distributed.accelerate_private import fsdp_on_cpu
    from mmtune.recipe.recipe import load_recipe
    from mmtune.rehearse import rehearse
    from mmtune.train import train

    configure_console()
    torch.set_num_threads(1)
    launched = {**os.environ}
    for number, recipe, *how in json.loads(jobs.read_text()):
        os.environ.clear()
        os.environ.update(launched)  # without the DeepSpeed that a recipe has asked for
        resume, profile, step = (
            how == ["resume"],
            2 * (how == ["profile"]),
            next((each for each in how if isinstance(each, int)), None),
        )
        with nothing_known(), signalled(step), fsdp_on_cpu():
            if how == ["rehearse"]:
                outcome = reason(lambda path=Path(recipe): rehearse(load_recipe(path)))
            else:
                outcome = reason(
                    lambda path=Path(recipe), resume=resume, profile=profile: train(
                        load_recipe(path), ["test"], overwrite=not resume, resume=resume, profile=profile
                    )
                )
        outcomes: list[bool | str] = [outcome] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, outcome)
        gc.collect()
        if distributed.get_rank() == 0:
            failed = next((each for each in outcomes if each is not True), True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, failed]) + "\n")
