"""Training speed and memory of mmtune, LLaMA-Factory, ms-swift and TRL on the same checkpoint and rows.

    python benchmarks/peers/environments.py ../peer-environments     # once: a virtual environment for each program
    python benchmarks/peers/suite.py ../peer-environments            # every part, three rounds: hours on two cores
    python benchmarks/peers/suite.py ../peer-environments --parts lora --rows 64 --steps 8
    python benchmarks/peers/suite.py ../peer-environments --report   # tables and plots again, from the stored results

The programs take turns, and the table has medians over the rounds. Every program is measured in the same way: the time of
optimizer steps from the third on, and the memory and processor time of the process with its workers.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from fixture import write_model, write_rows
from report import RESULTS, write_report

HERE = Path(__file__).resolve().parent
PROGRAMS = ("mmtune", "llamafactory", "swift", "trl")
WARM_UP = 2  # steps that are not measured


@dataclass(frozen=True)
class Part:
    """One comparison: the kind of rows, the options of the training scripts, and the library for malloc where it is not libc."""

    variant: str
    options: tuple[str, ...] = ()
    rounds: int | None = None  # where the result does not depend on time
    allocator: str | None = None


PARTS = {
    "equality": Part("single", ("--in-order",), rounds=1),
    "lora": Part("single"),
    "lora_checkpointing": Part("single", ("--checkpointing",)),
    "lora_tcmalloc": Part("single", allocator="tcmalloc_minimal"),
    "lora_checkpointing_tcmalloc": Part("single", ("--checkpointing",), allocator="tcmalloc_minimal"),
    "full": Part("single", ("--method", "full")),
    "qlora": Part("single", ("--method", "qlora")),
    "text_heavy": Part("text_heavy"),
    "image_heavy": Part("image_heavy"),
    "many_image": Part("many_image"),
    "mixed": Part("mixed"),
    "packing": Part("mixed", ("--packing",)),
}


class Watch(threading.Thread):
    """Memory of a process and its children, read in a thread until the process ends.

    `samples` has (time in s since the epoch, bytes): the resident size of the process, ten times a second, and what only its
    children hold, every two seconds, because that takes milliseconds. Pages that workers share with their parent count once.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True)
        self._process = process
        self.samples: list[tuple[float, int]] = []

    def run(self) -> None:
        root = psutil.Process(self._process.pid)
        children, due = 0, 0.0
        while self._process.poll() is None:
            try:
                if time.time() > due:
                    children, due = sum(private_bytes(child.pid) for child in root.children(recursive=True)), time.time() + 2
                self.samples.append((time.time(), root.memory_info().rss + children))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.1)


def private_bytes(pid: int) -> int:
    """Bytes that no other process shares; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def run_program(program: str, python: Path, folder: Path, model: Path, rows: Path, part: Part, steps: int) -> dict[str, Any]:
    """One run of one program.

    Returns:
        What `measure` returns, or `failure`, the last line of a run that failed.
    """
    record, log = folder / f"{program}.jsonl", folder / f"{program}.log"
    record.unlink(missing_ok=True)
    shutil.rmtree(folder / f"out_{program}", ignore_errors=True)
    command = [python, HERE / f"train_{program}.py", "--model", model, "--rows", rows, "--output", folder / f"out_{program}"]
    command += ["--record", record, "--steps", str(steps), *part.options]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_DISABLED": "true", "CUDA_VISIBLE_DEVICES": ""}
    if part.allocator is not None:
        library = ctypes.util.find_library(part.allocator)
        if library is None:
            raise SystemExit(f"no library {part.allocator}; on Debian and Ubuntu: apt install libtcmalloc-minimal4")
        variables["LD_PRELOAD"] = library
    start = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(each) for each in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | variables | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        )
        watch = Watch(process)
        watch.start()
        code = process.wait()
        watch.join()
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"program": program, "failure": lines[-1][:400], "exit_code": code}
    first, *recorded = [json.loads(line) for line in record.read_text().splitlines()]
    return measure(program, start, first, recorded, watch.samples)


def measure(
    program: str, start: float, first: dict[str, Any], steps: list[dict[str, Any]], samples: Sequence[Any]
) -> dict[str, Any]:
    """The numbers of one run."""
    measured, begin, end = steps[WARM_UP:], steps[WARM_UP - 1]["time"], steps[-1]["time"]
    core_seconds = steps[-1]["processor"] - steps[WARM_UP - 1]["processor"]
    total = {key: sum(step[key] for step in measured) for key in ("samples", "tokens", "padded", "supervised")}
    return {
        "program": program,
        "versions": first["versions"],
        "trainable": first["trainable"],
        "quantized_layers": first["quantized_layers"],
        "start_up_s": first["begin"] - start,
        "seconds": end - begin,
        "samples_per_s": total["samples"] / (end - begin),
        "samples_per_core_s": total["samples"] / core_seconds,
        "tokens_per_s": total["tokens"] / (end - begin),
        "tokens_per_core_s": total["tokens"] / core_seconds,
        "padding": 1 - total["tokens"] / total["padded"],
        "peak_gb": max(size for at, size in samples if first["begin"] <= at <= end) / 1e9,
        "steps": [{key: value for key, value in step.items() if key not in ("time", "processor")} for step in steps],
    }


def run_part(name: str, part: Part, arguments: argparse.Namespace) -> dict[str, Any]:
    """The runs of a part: the programs in turn, `rounds` times."""
    folder = arguments.folder.resolve()
    model, rows = folder / f"model_{arguments.size}", folder / f"rows_{part.variant}_{arguments.rows}"
    if not model.exists():
        write_model(model, arguments.size)
    if not rows.exists():
        write_rows(rows, part.variant, arguments.rows, arguments.size)
    runs = []
    for number in range(part.rounds or arguments.rounds):
        for program in arguments.programs:
            python = Path(sys.executable) if program == "mmtune" else arguments.environments / program / "bin" / "python"
            run = run_program(program, python.absolute(), folder, model, rows, part, arguments.steps)
            runs.append({"round": number, **run})
            print(f"{name} {number + 1}: {program:12} " + (run.get("failure") or describe(run)), flush=True)
    return {
        "part": name,
        "model": arguments.size,
        "variant": part.variant,
        "rows": arguments.rows,
        "steps": arguments.steps,
        "options": list(part.options),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {' '.join(platform.libc_ver())}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "shared": arguments.shared,
        "runs": runs,
        "medians": medians(runs),
    }


def describe(run: dict[str, Any]) -> str:
    return f"{run['samples_per_s']:.2f} samples/s, {run['samples_per_core_s']:.2f} per core second, {run['peak_gb']:.2f} GB"


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each program's rounds, and of mmtune's ratio to it in the same round."""
    result: dict[str, Any] = {}
    for program in dict.fromkeys(run["program"] for run in runs):
        program_runs = [run for run in runs if run["program"] == program]
        if any("failure" in run for run in program_runs):
            result[program] = {"failure": next(run["failure"] for run in program_runs if "failure" in run)}
            continue
        keys = ("samples_per_s", "samples_per_core_s", "tokens_per_s", "tokens_per_core_s", "padding", "peak_gb", "start_up_s")
        result[program] = {key: statistics.median(run[key] for run in program_runs) for key in keys}
        ours = {run["round"]: run for run in runs if run["program"] == "mmtune" and "failure" not in run}
        pairs = [(ours[run["round"]], run) for run in program_runs if run["round"] in ours]
        if pairs:
            for key in ("samples_per_s", "samples_per_core_s", "tokens_per_s", "tokens_per_core_s", "peak_gb"):
                result[program][f"ratio_{key}"] = statistics.median(our[key] / run[key] for our, run in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path, help="folder of the virtual environments, by environments.py")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="where fixture and runs are written")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--programs", nargs="*", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--size", default="60m", help="shapes of the model, by fixture.py")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of 8 rows; the first two are not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shared", action="store_true", help="other load is on the machine: report processor time, no wall clock"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing; write tables and plots from the stored results")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.report else arguments.parts:
        result = run_part(name, PARTS[name], arguments)
        (arguments.results / f"peers_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_report(arguments.results)


if __name__ == "__main__":
    main()
