"""Comparison of tuning methods at equal budget on the built-in task: best learning rate and held-out accuracy of each.

Every run trains on the same rows in the same order for the same number of steps, with the projector in full at 1e-3. Each method
tries four learning rates in short runs; the two with the lowest training loss (mean of the last third) train to the end with the
first seed, and the better of these, by training loss, trains the other seeds too. Held-out answers select nothing. Results are
saved after each run; a second start continues there.

Usage: mmtune data digits data/digits; python benchmarks/methods_same_budget.py [--steps 400] [--sweep-steps 60] [--batch 16]
It writes benchmarks/results/methods.json, docs/methods.png and the table in docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from page_table import write_table  # noqa: E402

from mmtune.recipe.recipe import load_recipe  # noqa: E402
from mmtune.run_directory import RunDirectory  # noqa: E402
from mmtune.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
METHODS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "LoRA (r 16)": ("{method: lora, r: 16, lora_alpha: 32}", (1e-3, 2e-3, 5e-3, 1e-2)),
    "LoRA (r 16) on an nf4 base": ("{method: lora, r: 16, lora_alpha: 32}", (1e-3, 2e-3, 5e-3, 1e-2)),
    "DoRA (r 16)": ("{method: lora, r: 16, lora_alpha: 32, use_dora: true}", (2e-3, 5e-3, 1e-2, 2e-2)),
    "IA3": ("{method: ia3}", (1e-2, 3e-2, 1e-1, 3e-1)),
    "bottleneck adapter (64, Houlsby)": ("{method: bottleneck}", (2e-3, 5e-3, 1e-2, 2e-2)),
    "zero-gated prefix (10)": ("{method: gated_prefix}", (3e-2, 1e-1, 3e-1, 1.0)),
    "prefix tuning (20)": ("{method: prefix_tuning}", (3e-2, 1e-1, 3e-1, 1.0)),
    "full tuning of the language model": ("{method: full}", (5e-4, 1e-3, 2e-3, 5e-3)),
}


def one(method: str, rate: float, seed: int, steps: int, batch: int, evaluates: bool) -> dict[str, Any]:
    """Train once; the mean loss of the last third of the steps, and with `evaluates` the held-out accuracy."""
    language, _ = METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"tune.language={language}",
            f"model.precision={'nf4' if 'nf4' in method else 'fp32'}",
            f"train.learning_rate={rate}",
            f"train.seed={seed}",
            f"train.max_steps={steps}",
            f"train.per_device_train_batch_size={batch}",
            "train.logging_steps=1",
            "train.disable_tqdm=true",
            f"output_dir={folder}/run",
            *(["evaluate.before=false"] if evaluates else ["evaluate=null"]),
        ]
        start = time.perf_counter()
        summary = train(load_recipe(ROOT / "recipes" / "quickstart.yaml", overrides), ["benchmark"])
        losses = [json.loads(line)["loss"] for line in RunDirectory(Path(folder, "run")).metrics.read_text().splitlines()]
    tail = losses[-max(1, len(losses) // 3) :]
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "loss": statistics.fmean(tail),
        "accuracy": summary.get("tuned_score"),
        "questions": summary.get("questions"),
        "majority": summary.get("baseline"),
        "trainable": summary["trainable_parameters"],
        "total": summary["total_parameters"],
        "train_seconds": summary["train_seconds"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def best_rates(runs: list[dict[str, Any]], method: str, count: int) -> list[float]:
    """The learning rates of a method's first seed, by training loss, the lowest first."""
    tried = [run for run in runs if run["method"] == method and run["seed"] == 0 and math.isfinite(run["loss"])]
    return [run["learning_rate"] for run in sorted(tried, key=lambda run: run["loss"])[:count]]


def at_its_rate(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's full-length runs at its selected rate."""
    chosen = best_rates(results["runs"], method, 1)
    return [run for run in results["runs"] if run["method"] == method and run["learning_rate"] in chosen]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of a 95% t interval over seeds."""
    critical = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    return statistics.fmean(values), critical * statistics.stdev(values) / math.sqrt(len(values))


def table(results: dict[str, Any]) -> str:
    lines = [
        "| method | trainable | learning rate | training loss | held-out accuracy | 95% interval over seeds |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for method in METHODS:
        runs = at_its_rate(results, method)
        if len(runs) < 2:
            continue
        mean, half = interval([run["accuracy"] for run in runs])
        loss = statistics.fmean(run["loss"] for run in runs)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
        share = runs[0]["trainable"] / runs[0]["total"]
        text = (
            f"| {method} | {runs[0]['trainable']:,} ({share:.1%}) | {runs[0]['learning_rate']:g} "
            f"| {loss:.3f} | {mean:.1%} | {low:.1%} to {high:.1%} |"
        )
        rows.append((mean, text))
    return "\n".join([*lines, *(text for _, text in sorted(rows, reverse=True))]) + "\n"


def plot(results: dict[str, Any], out: Path) -> None:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    shown = [(m, [run["accuracy"] for run in at_its_rate(results, m)]) for m in METHODS]
    shown = sorted(((m, v) for m, v in shown if len(v) > 1), key=lambda item: statistics.fmean(item[1]))
    for height, (_, values) in enumerate(shown):
        mean, half = interval(values)
        axes.errorbar(100 * mean, height, xerr=100 * half, fmt="o", color="#1f6feb", capsize=3)
        axes.plot([100 * v for v in values], [height] * len(values), "|", color="#57606a", markersize=10)
    axes.axvline(
        100 * results["runs"][0]["majority"], color="#cf222e", linestyle="--", linewidth=1, label="majority-class baseline"
    )
    axes.set_yticks(range(len(shown)), [m for m, _ in shown])
    axes.set_xlabel("held-out exact match, % (three seeds: ticks; mean and 95% t interval: dot and bar)")
    axes.set_xlim(0, 100)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=144)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--sweep-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(METHODS), help="methods to run")
    arguments = parser.parse_args()
    budget = {"steps": arguments.steps, "sweep_steps": arguments.sweep_steps, "batch": arguments.batch}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if results.get("budget") != budget:
        results = {"budget": budget, "sweep": [], "runs": []}
    results["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    results["machine"] = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def keep(part: str, result: dict[str, Any]) -> None:
        results[part].append(result)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(result), flush=True)

    chosen = [method for method in METHODS if method in arguments.only]
    for method in chosen:
        for rate in METHODS[method][1]:
            if not any((run["method"], run["learning_rate"]) == (method, rate) for run in results["sweep"]):
                keep("sweep", one(method, rate, 0, arguments.sweep_steps, arguments.batch, evaluates=False))
    for seed in range(arguments.seeds):
        for method in chosen:
            for rate in best_rates(results["sweep"], method, 2) if seed == 0 else best_rates(results["runs"], method, 1):
                if not any((r["method"], r["learning_rate"], r["seed"]) == (method, rate, seed) for r in results["runs"]):
                    keep("runs", one(method, rate, seed, arguments.steps, arguments.batch, evaluates=True))
    write_table(ROOT / "docs" / "methods.md", "methods_same_budget.py", table(results), "<!-- to here -->")
    plot(results, ROOT / "docs" / "methods.png")
    print(table(results))


if __name__ == "__main__":
    main()
