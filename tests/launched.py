"""Recipes trained by several processes: one launch of two, on the CPU, trains them one after another.

`launch` is what tests call. This file is also what the processes run:

    accelerate launch ... tests/launched.py JOBS.json RESULTS.jsonl
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import socket
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
FAULTS = (RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError)
CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate"


def launch(
    recipes: Sequence[tuple[Path, int | str | None] | tuple[Path, int | str | None, int | str]],
    folder: Path,
    processes: int = 2,
    patience_s: float = PATIENCE_S,
) -> list[bool | str]:
    """Train each recipe in several processes.

    Args:
        recipes: with the layout of each: a ZeRO stage, None for DDP, the name of a shipped configuration of accelerate, or
            `torchrun`, where a recipe may name DeepSpeed itself. A third value is the step after which the last process gets
            SIGTERM, or `resume`.
        folder: for what the processes are told and print.
        patience_s: seconds that a recipe may take.

    Returns:
        For each recipe true, or the reason why not: the error of the first process that failed, or that there was no end.
    """
    jobs, results = folder / "jobs.json", folder / "results.jsonl"
    found: dict[int, bool | str] = {}
    configs = ["ddp" if layout is None else layout if isinstance(layout, str) else "zero2" for _, layout, *_ in recipes]
    for config in dict.fromkeys(configs):
        mine = [number for number, of in enumerate(configs) if of == config]
        while left := [number for number in mine if number not in found]:
            jobs.write_text(json.dumps([[number, str(recipes[number][0]), *recipes[number][1:]] for number in left]))
            results.write_text("")
            ended = _processes(config, jobs, results, processes, patience_s)
            found |= dict(map(json.loads, results.read_text().splitlines()))
            stuck = next((number for number in left if number not in found), None)
            if stuck is not None:  # the first without a result is the one that the launch ended in
                found[stuck] = f"the processes hang or end: {ended}"
    return [found[number] for number in range(len(recipes))]


def launcher(config: str, processes: int = 2) -> list[str]:
    """The beginning of a command that starts a program in several processes on this machine."""
    if config == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*accelerate, "--num_processes", str(processes), "--main_process_port", "0"]


@functools.cache
def compile_deepspeed() -> None:
    """It compiles at its first use, for minutes; ended meanwhile, it would leave a lock that others wait for."""
    subprocess.run([sys.executable, "-c", COMPILE], check=True, capture_output=True)


def _commands(config: str, processes: int) -> list[list[str]]:
    if config != "multi_node":
        return [launcher(config, processes)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    return [[*launcher(config, processes), *place, "--machine_rank", rank] for rank in ("0", "1")]


def _processes(config: str, jobs: Path, results: Path, processes: int, patience_s: float) -> str:
    """Ended when they bring no result for `patience_s`."""
    deepspeed = config == "torchrun" or config.startswith("zero")
    if deepspeed:
        compile_deepspeed()
    environment = {**os.environ} if deepspeed else {**os.environ, "ACCELERATE_USE_CPU": "true"}
    program = [str(Path(__file__)), str(jobs), str(results)]
    with results.with_suffix(".log").open("a") as log:
        started = [
            subprocess.Popen([*command, *program], env=environment, stdout=log, stderr=subprocess.STDOUT)
            for command in _commands(config, processes)
        ]
        size, since = 0, time.monotonic()
        while all(process.poll() is None for process in started):
            time.sleep(0.1)
            if results.stat().st_size != size:
                size, since = results.stat().st_size, time.monotonic()
            if time.monotonic() - since > patience_s:
                for process in started:
                    for each in (*psutil.Process(process.pid).children(recursive=True), process):  # workers have own sessions
                        each.kill()
                    process.wait()
                return f"no result for {patience_s:.0f} s"
    return f"exit code {max(process.wait() for process in started)}"


def have_fsdp_on_cpu() -> None:
    """accelerate makes DDP of FSDP without GPUs, though torch shards on the CPU as well; here it shards."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    made = AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = make  # type: ignore[method-assign]


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
    from mmtune.errors import CheckFailed, Stopped, UserError

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


def main(jobs: Path, results: Path) -> None:
    import torch
    from torch import distributed

    from mmtune.console import settle_console
    from mmtune.recipe import load_recipe
    from mmtune.train import train

    settle_console()
    torch.set_num_threads(1)
    have_fsdp_on_cpu()
    for number, recipe, layout, *how in json.loads(jobs.read_text()):
        resume, step = how == ["resume"], next((each for each in how if isinstance(each, int)), None)
        if isinstance(layout, int):
            os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(layout)
        if layout == "torchrun":
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # which the recipe before has left
        with nothing_known(), signalled(step):
            outcome = reason(
                lambda path=Path(recipe), resume=resume: train(load_recipe(path), ["test"], overwrite=not resume, resume=resume)
            )
        outcomes: list[bool | str] = [outcome] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, outcome)
        gc.collect()
        if distributed.get_rank() == 0:
            failed = next((each for each in outcomes if each is not True), True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, failed]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
