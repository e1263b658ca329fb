"""The model card that goes with a released model: what it was made from, how, and what was measured."""

from __future__ import annotations

import json
from typing import Any

import yaml

from mmtune.evaluation.report import score_rows
from mmtune.recipe import Recipe
from mmtune.run_directory import RunDirectory


def model_card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory) -> str:
    """A README in the hub's form: front matter, use, figures, data and recipe.

    Args:
        recipe: the run's resolved recipe.
        summary: the run's figures, with those of the merge if there was one.
        run: where its data report and environment are.
    """
    base = recipe.model.base or f"{recipe.model.vision} + {recipe.model.language}"
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmtune", recipe.tune.language.method],
    }
    if recipe.model.base and not recipe.model.base.startswith("builtin:"):
        front["base_model"] = recipe.model.base
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.path.name}",
        f"{base}, tuned with mmtune: one ordinary checkpoint.",
        "## Use",
        USE,
        *_figures(summary),
        *_merge(summary),
        "## Data",
        f"{summary.get('rows', 'unknown')} rows; {summary.get('quarantined', 'unknown')} quarantined, "
        f"{summary.get('dropped_over_length', 'unknown')} dropped as too long.",
        "## Recipe",
        f"```yaml\n{recipe.to_yaml()}```",
        f"Made with Python {environment['python']}, {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


USE = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
content = [{"type": "image", "image": Image.open("picture.png")}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _merge(summary: dict[str, Any]) -> list[str]:
    if "merge_samples" not in summary:
        return []
    return [
        "## Merge",
        f"Weights in {summary['merge_dtype']}, compared with the adapter after loading back from disk, on "
        f"{summary['merge_samples']} samples, computing in fp32: largest logit difference "
        f"{summary['merge_max_logit_difference']:.3g}, mean {summary['merge_mean_logit_difference']:.3g}, KL divergence "
        f"{summary['merge_kl']:.3g}, {summary['merge_same_answers']} of {summary['merge_samples']} greedy answers the same. "
        f"Before rounding to {summary['merge_dtype']}: {summary['merge_fold_difference']:.3g} (allowed: "
        f"{summary['merge_tolerance']:g}). Largest difference from the base: {summary['merge_difference_from_base']:.3g}.",
    ]


def _figures(summary: dict[str, Any]) -> list[str]:
    rows = score_rows(summary)
    if not rows:
        return []
    lines = ["| task | questions | commonest answer | base | tuned | 95% interval |", "|---|---|---|---|---|---|"]
    keys = ("task", "questions", "majority", "base", "tuned", "interval")
    lines += ["| " + " | ".join(row[key] for key in keys) + " |" for row in rows]
    return ["## Figures", "Exact match on held-out questions.", "\n".join(lines)]
