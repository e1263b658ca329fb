"""Start-up: CPU time of mmtune's commands relative to importing torch, transformers and PEFT.

Every command, and the import, runs in its own process; all take turns. Reported are medians over the rounds of user plus system
time of the process and its children. A command with a mistake must end with exit code 2.

With a CPU build of torch, a CUDA wheel of torchvision cannot be imported directly, and then neither can transformers. The
reference therefore calls `prepare_torchvision` first; this is part of its time.

Usage: python benchmarks/startup.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from PIL import Image

REFERENCE = (
    "from mmtune.utils.torchvision_support import prepare_torchvision; prepare_torchvision(); import torch, transformers, peft"
)
RECIPE = """\
model: {base: "builtin:tiny-llava"}
data: {train: [{path: rows.json, template: llava}]}
train: {max_steps: 2}
output_dir: run
"""
COMMANDS = {
    "--help": 0,
    "train --help": 0,
    "recipe check --help": 0,
    "recipe check x.yaml": 0,
    "recipe schema": 0,
    "recipe list": 0,
    "recipe copy quickstart copied.yaml": 0,
    "methods": 0,
    "trian x.yaml": 2,
    "recipe check x.yaml train.learning_rte=1": 2,
    "train x.yaml train.learning_rte=1": 2,
    "train x.yaml data.train.0.path=no_such.json": 2,
    "train x.yaml data.train.0.template=lava": 2,
    "plan x.yaml train.lr_scheduler_type=warmup_stable_decay": 2,
    "data check x.yaml data.train.0.path=no_such.json": 2,
    "eval ./no_such": 2,
    "chat ./no_such": 2,
    "data check rows.json --template llava": 0,
    "data check x.yaml": 0,
}
"""The commands and their exit codes. The last two check a thousand rows with images, which is more than start-up."""


def cpu_seconds(command: list[str], folder: Path, expected: int) -> float:
    """User and system time of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != expected:
        raise SystemExit(f"{' '.join(command)}: expected exit code {expected}, got {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_rows(folder: Path) -> None:
    """A thousand rows in LLaVA's format, each with an image."""
    (folder / "x.yaml").write_text(RECIPE, encoding="utf-8")
    rows = []
    for number in range(1000):
        name = f"{number % 20}.png"
        if number < 20:
            Image.new("RGB", (64, 64), (12 * number, 0, 0)).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\nQuestion {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]
        rows.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    names = ("torch", "transformers", "peft", "accelerate", "pydantic")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    reference: list[float] = []
    times: dict[str, list[float]] = {command: [] for command in COMMANDS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder)
        for number in range(rounds + 1):
            first = number == 0  # warm-up, not counted
            spent = cpu_seconds([sys.executable, "-c", REFERENCE], folder, 0)
            reference += [] if first else [spent]
            for command, expected in COMMANDS.items():
                (folder / "copied.yaml").unlink(missing_ok=True)
                spent = cpu_seconds([sys.executable, "-m", "mmtune.cli.main", *command.split()], folder, expected)
                times[command] += [] if first else [spent]
    whole = statistics.median(reference)
    spread = f"from {min(reference):.2f} to {max(reference):.2f}"
    print(f"import torch, transformers, peft: {whole:.2f} s of CPU time, median of {rounds} ({spread})\n")
    print("CPU time   relative   exit code   mmtune ...")
    for command, seconds in times.items():
        spent = statistics.median(seconds)
        print(f"{spent:6.2f} s   {spent / whole:8.1%}   {COMMANDS[command]:9}   {command}")


if __name__ == "__main__":
    main()
