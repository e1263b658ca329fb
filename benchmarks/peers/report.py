"""Tables and plots of the suite's stored results: peers_PART.txt, the tables of docs/performance.md, and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = Path(__file__).resolve().parents[1] / "results"
NAMES = {"mmtune": "mmtune", "llamafactory": "LLaMA-Factory", "swift": "ms-swift", "trl": "TRL"}
TITLES = {
    "lora": "LoRA",
    "lora_checkpointing": "LoRA, activation checkpointing",
    "lora_tcmalloc": "LoRA, with tcmalloc",
    "lora_checkpointing_tcmalloc": "LoRA, activation checkpointing, with tcmalloc",
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
    """Write every table, and the figure, from `results`/peers_*.json; those of docs/ only from benchmarks/results."""
    stored = {path.stem.removeprefix("peers_"): json.loads(path.read_text()) for path in sorted(results.glob("peers_*.json"))}
    for name, result in stored.items():
        table = equality_table(result) if name == "equality" else speed_table(result)
        lines = [conditions(result), "", *table]
        (results / f"peers_{name}.txt").write_text("\n".join([*lines, "", *version_lines(result)]) + "\n")
    if results.resolve() != RESULTS:  # a trial
        return
    page = DOCS / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    sections = ["![Losses of the programs on the same rows](performance.png)", ""]
    if "equality" in stored:
        result = stored["equality"]
        sections += ["### Equality", "", *equality_table(result), ""]
        sections += [f"Model `{result['model']}`, {result['rows']} rows in the order of the file, {result['steps']} steps.", ""]
    for name, title in TITLES.items():
        if name in stored:
            sections += [f"### {title[0].upper()}{title[1:]}", "", *speed_table(stored[name]), "", conditions(stored[name]), ""]
    page.write_text(before + BEGIN + "\n" + "\n".join(sections) + "\n" + END + rest.partition(END)[2])
    draw(stored, DOCS / "performance.png")


def conditions(result: dict[str, Any]) -> str:
    rounds = 1 + max(run["round"] for run in result["runs"])
    medians = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    remark = "; other load on the machine, so no wall clock" if result["shared"] else ""
    return f"Model `{result['model']}`, {result['rows']} rows, {result['steps']} steps, {medians}; {result['machine']}{remark}."


def speed_table(result: dict[str, Any]) -> list[str]:
    """Medians of each program in Markdown; the ratio is mmtune's number divided by the program's.

    On a machine with other load, the columns of the wall clock are left out.
    """
    columns = [
        ("samples per core second", "samples_per_core_s", ".2f", True),
        ("tokens per core second", "tokens_per_core_s", ".0f", True),
        ("padding", "padding", ".0%", False),
        ("peak memory, GB", "peak_gb", ".2f", True),
    ]
    if not result["shared"]:
        columns = [("samples/s", "samples_per_s", ".2f", True), ("tokens/s", "tokens_per_s", ".0f", True), *columns]
    header = [f"{title} | ratio" if has_ratio else title for title, _, _, has_ratio in columns]
    width = sum(1 + has_ratio for *_, has_ratio in columns)
    lines = [f"| program | {' | '.join(header)} |", "|---" * (1 + width) + "|"]
    for program, values in result["medians"].items():
        if "failure" in values:
            failure = values["failure"].replace("|", "/").replace("`", "'")
            lines.append(f"| {NAMES[program]} | does not run: `{failure}` |" + " |" * (width - 1))
            continue
        cells = []
        for _, key, form, has_ratio in columns:
            cells.append(format(values[key], form))
            if has_ratio:
                cells.append(format(values.get(f"ratio_{key}", float("nan")), ".2f"))
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
    """Losses of the same rows, and once measured, speed and memory with and without activation checkpointing."""
    parts = [(name, stored[name]["medians"]) for name in ("lora", "lora_checkpointing") if name in stored]
    bars = (("samples_per_core_s", "samples per core second"), ("peak_gb", "peak memory, GB")) if parts else ()
    count = 1 + len(bars)
    figure, axes = plt.subplots(1, count, figsize=(2 + 3.4 * count, 3.4), layout="constrained", squeeze=False)
    styles = {"mmtune": ("C0", "-", 4), "llamafactory": ("C1", "--", 2.5), "swift": ("C2", "-.", 1.8), "trl": ("C3", ":", 1.8)}
    losses = axes[0, 0]
    losses.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="the same rows in each step")
    for run in stored["equality"]["runs"] if "equality" in stored else []:
        if "steps" in run:
            color, line, width = styles[run["program"]]
            points = [step["loss"] for step in run["steps"]]
            losses.plot(
                range(1, len(points) + 1), points, color=color, linestyle=line, linewidth=width, label=NAMES[run["program"]]
            )
            losses.legend(fontsize=8)
    for axis, (key, title) in zip(axes[0, 1:], bars, strict=True):
        for offset, (name, medians) in enumerate(parts):
            programs = [program for program in NAMES if key in medians.get(program, {})]
            places = [list(NAMES).index(program) + 0.4 * offset - 0.2 for program in programs]
            colors = [styles[program][0] for program in programs]
            heights = [medians[program][key] for program in programs]
            axis.bar(places, heights, 0.38, color=colors, alpha=1 - 0.5 * offset, label=TITLES[name])
        axis.set_xticks(range(len(NAMES)), list(NAMES.values()), fontsize=8)
        axis.set_title(title)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
