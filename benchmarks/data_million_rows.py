"""Time to the first optimizer step of `mmtune train` and its memory, for 1,000 to 1,000,000 rows.

For each size, the built-in model trains a few steps on a generated JSON Lines file of LLaVA-like rows (a question about one of 64
images, an answer of about 30 words), indexed and streamed. Measured are the seconds until the first line of `metrics.jsonl` and
the peak resident memory of the training process (`ru_maxrss`). The reference is the run on 1,000 rows.

Usage: python benchmarks/data_million_rows.py [--rows 1000 100000 1000000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = """\
model: {{base: builtin:tiny-llava}}
data:
  train: [{{path: {path}, template: llava, media_root: {root}}}]
  stream: {stream}
train: {{max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true}}
output_dir: {out}
"""
WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "house",
    "tree",
    "street",
    "is",
    "are",
    "beside",
    "under",
    "over",
    "left",
    "right",
    "two",
    "three",
    "people",
    "sky",
    "water",
]


def write_rows(path: Path, count: int) -> None:
    """One conversation per line; always the same ones."""
    rng = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            question, answer = (" ".join(rng.choices(WORDS, k=k)) for k in (10, rng.randrange(10, 50)))
            turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
            file.write(json.dumps({"id": number, "image": f"{number % 64}.png", "conversations": turns}) + "\n")


def run(recipe: Path, out: Path) -> tuple[float, float]:
    """Seconds to the first logged step, and the peak resident memory in MB."""
    start = time.perf_counter()
    command = [sys.executable, "-c", "from mmtune.cli.main import entry_point; entry_point()", "train", str(recipe)]
    errors = out.with_suffix(".err")
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        first = None
        while process.poll() is None:
            written = out / "metrics.jsonl"
            if first is None and written.exists() and written.stat().st_size:
                first = time.perf_counter() - start
            time.sleep(0.02)
    if process.returncode or first is None:
        raise SystemExit(errors.read_text())
    peak = float(json.loads((out / "summary.json").read_text())["peak_memory_mb"])
    shutil.rmtree(out)
    return first, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {versions}; medians of {arguments.repeats} runs")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        pictures = np.random.default_rng(0)
        for number in range(64):
            Image.fromarray(pictures.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(place / f"{number}.png")
        for stream in ("false", "true"):
            reference = None
            for count in arguments.rows:
                rows = place / "rows.jsonl"
                write_rows(rows, count)
                recipe, out = place / "recipe.yaml", place / "run"
                recipe.write_text(RECIPE.format(path=rows, root=place, stream=stream, out=out))
                seconds, peaks = zip(*(run(recipe, out) for _ in range(arguments.repeats)), strict=True)
                median, peak = statistics.median(seconds), statistics.median(peaks)
                reference = reference or (median, peak)
                took = f"first step after {median:5.1f} s (ratio {median / reference[0]:.2f})"
                held = f"peak {peak:,.0f} MB ({peak - reference[1]:+.0f} MB)"
                how = "stream" if stream == "true" else "index "
                print(f"{how}  {count:>9,} rows, {rows.stat().st_size / 2**20:4.0f} MiB: {took}, {held}", flush=True)


if __name__ == "__main__":
    main()
