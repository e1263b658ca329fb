"""Tables and plots of the suite's stored results: peers_PART.txt, the tables of docs/performance.md, and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = {"mmtune": "mmtune", "llamafactory": "LLaMA-Factory", "swift": "ms-swift", "trl": "TRL"}
TITLES = {
    "lora": "LoRA",
    "lora_checkpointing": "LoRA, activation checkpointing",
    "full": "the language model in full",
    "qlora": "QLoRA (nf4)",
    "text_heavy": "LoRA, long answers",
    "image_heavy": "LoRA, short answers",
    "many_image": "LoRA, two to five images a row",
    "mixed": "LoRA, rows of all kinds",
    "packing": "LoRA, packed, rows of all kinds",
}
BEGIN, END = "<!-- tables: written by benchmarks/peers/suite.py --report -->\n", "<!-- end of the tables -->\n"


def write_report(results: Path) -> None:
    """Write every table, and the figure, from `results`/peers_*.json."""
    stored = {path.stem.removeprefix("peers_"): json.loads(path.read_text()) for path in sorted(results.glob("peers_*.json"))}
    for name, result in stored.items():
        table = equality_table(result) if name == "equality" else speed_table(result)
        lines = [
            f"{result['machine']}; {result['conditions']}",
            f"model {result['model']}, {result['steps']} steps of 8 rows",
            *table,
        ]
        (results / f"peers_{name}.txt").write_text("\n".join([*lines, "", *version_lines(result)]) + "\n")
    page = DOCS / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    sections = ["![Losses, speed and memory of the programs](performance.png)", ""]
    if "equality" in stored:
        sections += ["### The same training", "", *equality_table(stored["equality"]), ""]
    for name, title in TITLES.items():
        if name in stored:
            sections += [f"### {title[0].upper()}{title[1:]}", "", *speed_table(stored[name]), "", conditions(stored[name]), ""]
    page.write_text(before + BEGIN + "\n" + "\n".join(sections) + "\n" + END + rest.partition(END)[2])
    draw(stored, DOCS / "performance.png")


def conditions(result: dict[str, Any]) -> str:
    rounds = 1 + max(run["round"] for run in result["runs"])
    medians = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    return f"{result['rows']} rows, {result['steps']} steps, {medians}; {result['conditions']}."


def speed_table(result: dict[str, Any]) -> list[str]:
    """Medians of each program in Markdown; the ratio is mmtune's number divided by the program's."""
    lines = [
        "| program | samples/s | ratio | samples per core second | ratio | tokens/s | padding | peak memory, GB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for program, values in result["medians"].items():
        if "failure" in values:
            lines.append(f"| {NAMES[program]} | does not run: `{values['failure'].replace('|', '/')}` | | | | | | | |")
            continue
        ratio = {key: f"{value:.2f}" for key, value in values.items() if key.startswith("ratio_")}
        cells = [
            f"{values['samples_per_s']:.2f}",
            ratio.get("ratio_samples_per_s", ""),
            f"{values['samples_per_core_s']:.2f}",
            ratio.get("ratio_samples_per_core_s", ""),
            f"{values['tokens_per_s']:.0f}",
            f"{values['padding']:.0%}",
            f"{values['peak_gb']:.2f}",
            ratio.get("ratio_peak_gb", ""),
        ]
        lines.append(f"| {NAMES[program]} | " + " | ".join(cells) + " |")
    return lines


def equality_table(result: dict[str, Any]) -> list[str]:
    """Tokens of the same rows in every program, and the largest difference of a step's loss from mmtune's."""
    runs = {run["program"]: run for run in result["runs"]}
    reference = [step["loss"] for step in runs["mmtune"]["steps"]]
    lines = ["| program | supervised tokens | tokens | loss, first and last step | largest difference |", "|---|---|---|---|---|"]
    for program, run in runs.items():
        if "failure" in run:
            lines.append(f"| {NAMES[program]} | does not run: `{run['failure']}` | | | |")
            continue
        losses = [step["loss"] for step in run["steps"]]
        difference = max(abs(a - b) for a, b in zip(reference, losses, strict=True))
        supervised, tokens = (sum(step[key] for step in run["steps"]) for key in ("supervised", "tokens"))
        lines.append(f"| {NAMES[program]} | {supervised:,} | {tokens:,} | {losses[0]:.4f}, {losses[-1]:.4f} | {difference:.1e} |")
    return lines


def version_lines(result: dict[str, Any]) -> list[str]:
    versions = {run["program"]: run["versions"] for run in result["runs"] if "versions" in run}
    return [
        f"{NAMES[name]}: " + ", ".join(f"{key} {value}" for key, value in libraries.items())
        for name, libraries in versions.items()
    ]


def draw(stored: dict[str, Any], path: Path) -> None:
    """Losses of the same rows in one plot; speed and memory with and without activation checkpointing beside it."""
    figure, (losses, speed, memory) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    styles = {"mmtune": ("C0", "-", 4), "llamafactory": ("C1", "--", 2.5), "swift": ("C2", "-.", 1.8), "trl": ("C3", ":", 1.8)}
    for run in stored["equality"]["runs"] if "equality" in stored else []:
        if "steps" in run:
            color, line, width = styles[run["program"]]
            points = [step["loss"] for step in run["steps"]]
            losses.plot(
                range(1, len(points) + 1), points, color=color, linestyle=line, linewidth=width, label=NAMES[run["program"]]
            )
    losses.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="the same rows in each step")
    if losses.lines:
        losses.legend(fontsize=8)
    for axis, key, title in ((speed, "samples_per_s", "samples/s"), (memory, "peak_gb", "peak memory, GB")):
        for offset, (part, label, alpha) in enumerate((("lora", "LoRA", 1.0), ("lora_checkpointing", "with checkpointing", 0.5))):
            values = stored.get(part, {}).get("medians", {})
            for place, program in enumerate(NAMES):
                if key in values.get(program, {}):
                    position = place + 0.4 * offset - 0.2
                    axis.bar(
                        position,
                        values[program][key],
                        0.38,
                        color=styles[program][0],
                        alpha=alpha,
                        label=label if not place else "",
                    )
        axis.set_xticks(range(len(NAMES)), list(NAMES.values()), fontsize=8)
        axis.set_title(title)
        if axis.patches:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
