"""Crash test: runs killed with SIGKILL at seeded random moments and resumed give the result of the uninterrupted run.

A tiny recipe on the CPU writes a checkpoint after every step, from indexed rows and from a stream. The moments are in start-up,
in steps, while a checkpoint is written or while results are written; some runs are killed twice. Compared with the uninterrupted
run: the adapter's bytes, every step's loss and gradient norm, the data report, and that no temporary files remain. The exit code
is 1 if anything differs. `tests/training/test_faults.py` runs five of the moments.

Usage: python benchmarks/faults.py [--moments 25] [--seed 0]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from killed import STEPS, draw_moments, kill_and_finish, prepare, run_unbroken

from mmtune.console.library_output import configure_console


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    configure_console()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {versions}; seed {arguments.seed}")
    begun = time.monotonic()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        unbroken = {stream: run_unbroken(folder, stream) for stream in (False, True)}
        for stream, one in unbroken.items():
            print(
                f"{'streamed' if stream else 'indexed '} uninterrupted, {STEPS} steps: start-up {one.start_s:.2f} s, "
                f"steps with checkpoints {one.steps_s:.2f} s, saving alone {STEPS * one.saving_s:.2f} s, "
                f"writing results {one.end_s:.2f} s"
            )
        for number, moment in enumerate(draw_moments(arguments.moments, arguments.seed)):
            hits, differs = kill_and_finish(moment, unbroken[moment.stream], folder, f"killed-{number}")
            wrong += bool(differs)
            how = "streamed" if moment.stream else "indexed "
            print(f"{number + 1:>3}  {how}  {'; '.join(differs) or 'identical'}  killed in: {'; then '.join(hits)}", flush=True)
    print(f"{arguments.moments - wrong} of {arguments.moments} identical, in {time.monotonic() - begun:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.exit(main())
