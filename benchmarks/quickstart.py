"""Quickstart: whether all its steps reach the accuracy that the README states, and whether the merge gives the adapter's answers.

`tests/test_quickstart.py` runs `make quickstart` with fewer steps. Exit code 1 if a bound is missed.

Usage: python benchmarks/quickstart.py [--folder DIR] (four minutes of CPU time)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from mmtune.cli.main import entry_point
from mmtune.utils.shipped import shipped_recipes


def main() -> int:
    """Run the quickstart in a folder, and print and check its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where data and run are written (default: a temporary folder)")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp())
    os.chdir(folder)
    recipe, run = str(shipped_recipes()["quickstart"]), "runs/quickstart"
    for command in (["data", "digits", "data/digits"], ["train", recipe], ["merge", run, f"{run}/merged"]):
        if code := entry_point(command):
            return code
    summary = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))
    bounds = {
        "at least 500 questions": summary["questions"] >= 500,
        "a tuned score of at least 0.85": summary["tuned_score"] >= 0.85,
        "a base score below 0.35": summary["base_score"] < 0.35,
        "an interval above the majority-class baseline": summary["tuned_interval"][0] > summary["baseline"],
        "logits of the merge within 1e-4": summary["merge_max_logit_difference"] < 1e-4,
        "the adapter's answers on all samples": summary["merge_same_answers"] == summary["merge_samples"] == 32,
    }
    for bound, reached in bounds.items():
        print(f"{'reached' if reached else 'MISSED ':8}{bound}")
    return int(not all(bounds.values()))


if __name__ == "__main__":
    sys.exit(main())
