"""Kill -9 at seeded random moments: every run, started again by the same command, comes to what the unbroken one came to.

A tiny recipe on the CPU writes a checkpoint after every step, from indexed rows and from a stream. Each moment falls into the
start-up, the steps, the writing of a checkpoint or the writing of the results, and some runs are killed twice. Compared with the
unbroken run: the adapter's bytes, every step's loss and gradient norm, the data report, and that nothing is left behind. The exit
code is 1 when anything differs. `tests/training/test_faults.py` runs five of the same moments.

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
                f"{'streamed' if stream else 'indexed '} unbroken, {STEPS} steps: start-up {one.start_s:.2f} s, "
                f"steps with their checkpoints {one.steps_s:.2f} s, of which saving {STEPS * one.saving_s:.2f} s, "
                f"final writing {one.end_s:.2f} s"
            )
        for number, moment in enumerate(draw_moments(arguments.moments, arguments.seed)):
            hits, differs = kill_and_finish(moment, unbroken[moment.stream], folder, f"killed-{number}")
            wrong += bool(differs)
            how = "streamed" if moment.stream else "indexed "
            print(f"{number + 1:>3}  {how}  {'; '.join(differs) or 'the same'}  killed in: {'; then '.join(hits)}", flush=True)
    print(f"{arguments.moments - wrong} of {arguments.moments} the same, in {time.monotonic() - begun:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MPLBACKEND="Agg")
    sys.exit(main())
