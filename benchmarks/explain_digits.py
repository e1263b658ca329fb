"""Explanations on the digits, where the right region is known: the mass inside the cell that a question names.

The recipe is recipes/quickstart.yaml. Held-out questions of the tasks `same` and `larger` name two places, and their answers
begin with the two digits: "3 7. Answer: 7". So the first token must rest on the first place, the second on the second. A score
is the share of the positive mass of a token that is inside the named quarter of the scene, as the mean of both tokens; chance is
the quarter itself, 25%. The interval is a bootstrap over scenes, one question each. Every model explains the reference answers,
so that all explain the same tokens: the tuned model, its base, and the same architecture with random weights, which must be at
chance (the check of Adebayo et al. 2018, arXiv 1810.03292). The goal: the lower end of the tuned model is at least 1.5 times
chance.

Usage: mmtune data digits data/digits; python benchmarks/explain_digits.py [--questions 300] [--run runs/quickstart]
It writes benchmarks/results/explain.json and the table in docs/explain.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
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

from mmtune.builtin.digits import CELL, POSITIONS  # noqa: E402
from mmtune.builtin.tiny_checkpoint import build_untrained  # noqa: E402
from mmtune.data.message import Sample, text_message  # noqa: E402
from mmtune.explain.explanation import mass_inside  # noqa: E402
from mmtune.explain.explanation_methods import EXPLANATION_METHODS, explain  # noqa: E402
from mmtune.models.checkpoints.trained_weights import locate_trained_weights  # noqa: E402
from mmtune.models.load import load_trained  # noqa: E402
from mmtune.recipe.recipe import load_recipe  # noqa: E402
from mmtune.train import train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "explain.json"
PAGE = ROOT / "docs" / "explain.md"
GOAL = 1.5
CHANCE = 0.25
RESAMPLES = 10_000
TUNED, BASE, RANDOM = "tuned", "base", "random weights"


def questions(data: Path, count: int) -> list[tuple[Sample, list[str]]]:
    """Held-out questions that name two places, with the places in the order of their digits in the answer."""
    named = re.compile("|".join(POSITIONS))
    selected = []
    for row in json.loads((data / "eval.json").read_text()):
        if row["task"] in ("same", "larger"):
            question, answer = (turn["value"] for turn in row["conversations"])
            text = question.removeprefix("<image>\n")
            blocks = [{"type": "image", "image": data / row["image"]}, {"type": "text", "text": text}]
            sample = Sample(row["id"], [{"role": "user", "content": blocks}, text_message("assistant", answer)])
            selected.append((sample, named.findall(text)))
    return selected[:count]


def load(name: str, run: str) -> tuple[Any, Any]:
    if name == RANDOM:
        model, processor = build_untrained(seed=0)
        return model.eval(), processor
    return load_trained(locate_trained_weights(Path(run if name == TUNED else "builtin:tiny-llava")))


def named_mass(model: Any, processor: Any, method: str, asked: list[tuple[Sample, list[str]]]) -> list[list[float]]:
    """For each question, the mass of its first two digits inside the place that each names."""
    masses = []
    for sample, places in asked:
        explanation = explain(model, processor, sample, method)
        [image] = explanation.images
        digits = [number for number, token in enumerate(explanation.tokens) if token.text.strip().isdigit()]
        boxes = []
        for place in places:
            row, column = divmod(POSITIONS.index(place), 2)
            boxes.append((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
        inside = [mass_inside(image, image.scores[token], [box]) for token, box in zip(digits, boxes, strict=False)]
        masses.append(np.nan_to_num(inside).tolist())  # no positive mass at all is none inside
    return masses


def summarize(model: str, method: str, masses: list[list[float]], seconds: float) -> dict[str, Any]:
    by_scene = np.array(masses).mean(axis=1)
    rng = np.random.default_rng(0)
    means = by_scene[rng.integers(len(by_scene), size=(RESAMPLES, len(by_scene)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "model": model,
        "method": method,
        "questions": len(by_scene),
        "inside": float(by_scene.mean()),
        "interval": [float(low), float(high)],
        "other_places": float((1 - by_scene).mean() / 3),
        "seconds": round(seconds, 1),
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| model | method | mass inside the named place | 95% interval | lower end over chance | mean of the other places |",
        "|---|---|---|---|---|---|",
    ]
    for each in results["scores"]:
        low, high = each["interval"]
        lines.append(
            f"| {each['model']} | {each['method']} | {each['inside']:.1%} | {low:.1%} to {high:.1%} | {low / CHANCE:.2f} times "
            f"| {each['other_places']:.1%} |"
        )
    return "\n".join(lines) + f"\n| (chance) | | {CHANCE:.1%} | | | {CHANCE:.1%} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "digits")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--run", help="a finished run of recipes/quickstart.yaml (default: train it)")
    arguments = parser.parse_args()
    asked = questions(arguments.data, arguments.questions)
    results: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "scores": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or f"{folder}/run"
        if arguments.run is None:
            paths = [f"data.train.0.path={arguments.data / 'tune.json'}", f"evaluate.data.0.path={arguments.data / 'eval.json'}"]
            settings = [*paths, "evaluate.before=false", "train.disable_tqdm=true", f"output_dir={run}"]
            train(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings), ["benchmark"])
        for name in (TUNED, BASE, RANDOM):
            model, processor = load(name, run)
            for method in EXPLANATION_METHODS:
                start = time.perf_counter()
                masses = named_mass(model, processor, method, asked)
                results["scores"].append(summarize(name, method, masses, time.perf_counter() - start))
                print(results["scores"][-1], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table(PAGE, "explain_digits.py", table(results))
    tuned = [each for each in results["scores"] if each["model"] == TUNED]
    print(f"{table(results)}every lower end of the tuned model is at least {GOAL} times chance: ", end="")
    print(all(each["interval"][0] >= GOAL * CHANCE for each in tuned))


if __name__ == "__main__":
    main()
