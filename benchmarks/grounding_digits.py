"""Grounding on the built-in task: mean IoU of held-out boxes in two conventions, beside chance.

Each convention trains recipes/grounding.yaml with three seeds; nothing else differs. Chance is what an answer that ignores the
image and the question gets: the mean IoU of a held-out box with the box of another held-out scene, over all pairs of scenes.
The best constant, of the training boxes the one with the largest mean IoU with the others, is a little better. The interval of
a run is that of its evaluation, a bootstrap over questions. The goal: its lower end is at least 3 times chance, in every run.
Results are written as they come, and a second start continues where the first ended.

Usage: mmtune data digits data/digits --boxes; python benchmarks/grounding_digits.py [--steps 400] [--seeds 3]
It writes benchmarks/results/grounding.json and the table in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from page_table import write_table

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()  # before transformers imports a processor

from mmtune.evaluation.metrics.entries.box_overlap import box_iou  # noqa: E402
from mmtune.recipe.recipe import load_recipe  # noqa: E402
from mmtune.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "data" / "digits"
RESULTS = ROOT / "benchmarks" / "results" / "grounding.json"
PAGE = ROOT / "docs" / "evaluation.md"
CONVENTIONS = ("thousandths", "pixels")
GOAL = 3
CANDIDATES = 500
"""Training boxes that are tried as the constant answer."""


def chance() -> dict[str, float]:
    """The mean IoU of answers that ignore the image and the question."""
    held_out, training = (
        np.array([row["boxes"][0] for row in json.loads((DIGITS / f"{name}.json").read_text())], dtype=np.float64)
        for name in ("boxes_eval", "boxes")
    )
    other = box_iou(held_out, held_out)[~np.eye(len(held_out), dtype=bool)].mean()
    constant = training[box_iou(training[:CANDIDATES], training).mean(axis=1).argmax()]
    return {"another_box": float(other), "best_constant": float(box_iou(constant[None], held_out).mean())}


def run(convention: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once, and score the held-out questions."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *(f"{key}.0.values.convention={convention}" for key in ("data.train", "evaluate.data")),
            f"data.train.0.path={DIGITS / 'boxes.json'}",
            f"evaluate.data.0.path={DIGITS / 'boxes_eval.json'}",
            f"train.seed={seed}",
            f"train.max_steps={steps}",
            "train.disable_tqdm=true",
            f"output_dir={folder}/run",
            "evaluate.before=false",
        ]
        start = time.perf_counter()
        summary = train(load_recipe(ROOT / "recipes" / "grounding.yaml", overrides), ["benchmark"])
    names = ("tuned_score", "tuned_interval", "questions", "train_seconds")
    seconds = round(time.perf_counter() - start, 1)
    return {"convention": convention, "seed": seed, **{name: summary[name] for name in names}, "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    lines = ["| convention | seed | mean IoU | 95% interval | lower end over chance |", "|---|---|---|---|---|"]
    for each in results["runs"]:
        low, high = each["tuned_interval"]
        times = low / results["chance"]["another_box"]
        lines.append(
            f"| {each['convention']} | {each['seed']} | {each['tuned_score']:.1%} | {low:.1%} to {high:.1%} | {times:.1f} times |"
        )
    other, constant = results["chance"]["another_box"], results["chance"]["best_constant"]
    return "\n".join([*lines, f"| (chance: the box of another scene) | | {other:.1%} | | |"]) + (
        f"\n| (the best constant box) | | {constant:.1%} | | |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("steps") != arguments.steps:
        results = {"steps": arguments.steps, "runs": []}
    results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    results["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    results["chance"] = chance()
    for seed in range(arguments.seeds):
        for convention in CONVENTIONS:
            if any((each["convention"], each["seed"]) == (convention, seed) for each in results["runs"]):
                continue
            results["runs"].append(run(convention, seed, arguments.steps))
            results["runs"].sort(key=lambda each: (CONVENTIONS.index(each["convention"]), each["seed"]))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_table(PAGE, "grounding_digits.py", table(results))
    reached = all(each["tuned_interval"][0] >= GOAL * results["chance"]["another_box"] for each in results["runs"])
    print(f"{table(results)}every lower end is at least {GOAL} times chance: {reached}")


if __name__ == "__main__":
    main()
