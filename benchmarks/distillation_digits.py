"""Distillation with few labelled rows on the built-in task: a student with and without a teacher.

The teacher is the built-in model tuned by LoRA on all training rows. A student is the same model, tuned with the same LoRA for
the same steps on a few rows, with their labels alone (sft) and with the teacher's distribution beside them. Every seed has its
own rows, and both students of a seed see the same ones in the same order. Held-out answers choose nothing. Results are written
as they come, and a second start continues where the first ended.

Usage: mmtune data digits data/digits; python benchmarks/distillation_digits.py [--rows 128] [--steps 160] [--teacher-steps 320]
It writes benchmarks/results/distillation.json and the table in docs/objectives.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from methods_same_budget import interval  # noqa: E402
from page_table import write_table  # noqa: E402

from mmtune.recipe.recipe import load_recipe  # noqa: E402
from mmtune.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distillation.json"
PAGE = ROOT / "docs" / "objectives.md"
STUDENTS = {
    "labels alone (sft)": {},
    "labels and teacher": {"crossentropy_weight": 0.5, "distillation_weight": 0.5},
}
TEMPERATURE = 2.0
KEPT = ("tuned_score", "tuned_interval", "base_score", "baseline", "questions", "train_seconds")


def run(
    rows: Path, out: Path, seed: int, steps: int, budget: argparse.Namespace, objective: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Tune the built-in model on rows of the digits and score it on the held-out questions."""
    overrides = [
        f"data.train=[{{path: {rows}, template: llava, media_root: {ROOT / 'data' / 'digits'}}}]",
        f"train.seed={seed}",
        f"train.max_steps={steps}",
        f"train.per_device_train_batch_size={budget.batch}",
        "train.save_strategy=no",
        "train.disable_tqdm=true",
        "evaluate.before=false",
        f"evaluate.data.0.limit={budget.questions}",
        f"output_dir={out}",
        *([f"objective={json.dumps(objective)}"] if objective else []),
    ]
    start = time.perf_counter()
    summary = train(load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides), ["benchmark"], overwrite=True)
    scores = {name: summary[name] for name in KEPT if name in summary}
    return {**scores, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}


def table(results: dict[str, Any]) -> str:
    """The mean over seeds with its 95% t interval, and the same of the difference from the student without a teacher."""
    lines = ["| student | held-out accuracy | 95% interval over seeds | minus labels alone, same seed |", "|---|---|---|---|"]
    accuracy = {name: {r["seed"]: r["tuned_score"] for r in results["runs"] if r["student"] == name} for name in STUDENTS}
    alone = accuracy[next(iter(STUDENTS))]
    for name, by_seed in accuracy.items():
        seeds = sorted(by_seed.keys() & alone.keys())
        if len(seeds) < 2:
            continue
        mean, half = interval([by_seed[seed] for seed in seeds])
        difference = ""
        if by_seed is not alone:
            centre, width = interval([by_seed[seed] - alone[seed] for seed in seeds])
            difference = f"{100 * centre:+.1f} ({100 * (centre - width):+.1f} to {100 * (centre + width):+.1f}) points"
        lines.append(f"| {name} | {mean:.1%} | {max(0.0, mean - half):.1%} to {min(1.0, mean + half):.1%} | {difference} |")
    teacher = results["teacher"]
    lines.append(f"| (the teacher) | {teacher['tuned_score']:.1%} | one run | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--teacher-steps", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=300, help="held-out questions that a run answers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher", type=Path, default=ROOT / "runs" / "distillation_teacher")
    arguments = parser.parse_args()
    budget = {name: getattr(arguments, name) for name in ("rows", "steps", "teacher_steps", "batch", "questions")} | {
        "temperature": TEMPERATURE
    }
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("budget") != budget:
        results = {"budget": budget, "runs": []}
    results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    results["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    digits = ROOT / "data" / "digits" / "tune.json"
    everything = json.loads(digits.read_text())

    def write() -> None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    if "teacher" not in results or not arguments.teacher.is_dir():
        results["teacher"] = run(digits, arguments.teacher, 0, arguments.teacher_steps, arguments)
        write()
    for student, weights in STUDENTS.items():
        for seed in range(arguments.seeds):
            few = everything[seed * arguments.rows : (seed + 1) * arguments.rows]
            if any((r["student"], r["seed"]) == (student, seed) for r in results["runs"]):
                continue
            objective = {"type": "distillation", "teacher": str(arguments.teacher), "temperature": TEMPERATURE, **weights}
            with tempfile.TemporaryDirectory() as folder:
                rows = Path(folder) / "few.json"
                rows.write_text(json.dumps(few))
                result = run(rows, Path(folder) / "run", seed, arguments.steps, arguments, objective if weights else None)
            results["runs"].append({"student": student, **result})
            write()
            print(json.dumps(results["runs"][-1]), flush=True)
    mean = statistics.fmean(r["seconds"] for r in results["runs"])
    print(f"{len(results['runs'])} runs, {mean:.0f} s each\n{table(results)}")
    write_table(PAGE, "distillation_digits.py", table(results))


if __name__ == "__main__":
    main()
