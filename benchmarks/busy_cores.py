"""Time of a training step on CPU cores that other processes use too, for several settings of the OpenMP runtime.

Each setting runs in its own process, with the same model and batch. The processes take turns, one step each: on idle cores, then
beside one busy process, then beside one busy process per thread. Reported are medians over the rounds of wall time and of CPU
time of all threads.

The settings are those of libgomp, which torch's Linux wheels ship. It reads them from the environment when it is loaded.

Usage: python benchmarks/busy_cores.py [--rounds 9] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
MODELS = ("tiny", "40M")
READ = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def work(name: str) -> None:
    """The process of one setting: a step for each line of standard input; five steps for the tiny model."""
    from mmtune.utils.torchvision_support import prepare_torchvision

    prepare_torchvision()
    from step_cost import build, make_batch, step
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    if name == "tiny":
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = CLIPVisionConfig(**size, image_size=112, patch_size=14)
        text = LlamaConfig(**size, vocab_size=2000, pad_token_id=0)
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
        batch, steps = make_batch(4, 64, 2000), 5
    else:
        model, batch, steps = build(32_000), make_batch(4, 256, 32_000), 1
    for _ in range(2):
        step(model, batch, True)
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step(model, batch, True)
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure(name: str, rounds: int, threads: int) -> None:
    bare = {key: value for key, value in os.environ.items() if key not in READ}
    workers = {}
    for setting, changes in SETTINGS.items():
        environment = bare | {"OMP_NUM_THREADS": str(threads)} | changes
        workers[setting] = subprocess.Popen(
            [sys.executable, __file__, "--work", name], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        for worker in workers.values():
            worker.stdout.readline()  # until it is ready
        for competitors in (0, 1, threads):
            taken = {setting: [] for setting in workers}
            with busy(competitors):
                for _ in range(rounds):
                    for setting, worker in workers.items():
                        worker.stdin.write("\n")
                        worker.stdin.flush()
                        taken[setting].append([float(each) for each in worker.stdout.readline().split()])
            print(f"\n{name}, {threads} threads, {competitors} other busy processes, medians of {rounds} rounds")
            for setting, pairs in taken.items():
                wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratios = [statistics.median(a[i] / b[i] for a, b in zip(pairs, taken["default"], strict=True)) for i in (0, 1)]
                print(
                    f"{setting:26} wall {wall:7.3f} s  cpu {cpu:7.3f} s  ratio: wall {ratios[0]:.2f}  cpu {ratios[1]:.2f}",
                    flush=True,
                )
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
    else:
        print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {metadata.version('torch')}")
        for name in MODELS:
            measure(name, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
