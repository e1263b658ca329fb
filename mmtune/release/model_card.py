"""The model card that goes with a released model: what it was made from, how, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmtune.evaluation.run_report import generation_line
from mmtune.evaluation.scores import score_rows
from mmtune.methods.method_table import METHODS
from mmtune.models.checkpoints.locate_base import BUILTIN
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.utils.files import read_record
from mmtune.utils.hub import HUB_ID, cached_snapshot


def model_card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory) -> str:
    """A README in the hub's form for one ordinary checkpoint: front matter, use, figures, data and recipe.

    Args:
        recipe: the run's resolved recipe.
        summary: the run's figures, with those of the merge if there was one.
        run: where its data report and environment are.
    """
    about = f"{_base_name(recipe)}, tuned with mmtune: one ordinary checkpoint."
    if "adapters" in summary:
        sums = "; ".join(f"{weight:g} x {name}" for name, weight in summary["adapters"])
        about = (
            f"{_base_name(recipe)} plus the weighted changes of several adapters: {sums}. Figures, data and recipe below "
            "are those of the first; the merge is compared with the same sum in memory."
        )
    return _card(recipe, summary, run, about, USE)


def adapter_card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory, figures: dict[str, Any], own_base: bool) -> str:
    """A README for a release of an adapter beside its base.

    Args:
        figures: of the comparison with the run.
        own_base: whether the base is in the release, or on the hub.
    """
    method = recipe.tune.method or "full"
    known = METHODS.get(method)
    folds = known is None or known.mergeable
    about = f"{_base_name(recipe)} with a {method} adapter, tuned with mmtune. "
    about += (
        "It is released as an adapter beside its base."
        if folds
        else f"A {method} adapter is no change of weights, so it cannot be folded into the base: both are needed."
    )
    ours = known is not None and known.config.startswith("mmtune.")
    base = "base" if own_base else str(recipe.model.base)
    lines = ["import mmtune.methods.tuners  # makes PEFT know the method"] if ours else []
    lines += [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "adapter")',
        'processor = AutoProcessor.from_pretrained("adapter")',
    ]
    code = "\n".join(lines)
    compared = (
        f"Loaded back like this and compared with the run on {figures['samples']} samples: largest logit difference "
        f"{figures['max_logit_difference']:.3g}, {figures['same_answers']} greedy answers the same."
    )
    return _card(recipe, summary, run, about, f"```python\n{code}\n```\n\n{compared}")


def _card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory, about: str, use: str) -> str:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmtune", recipe.tune.method or "full"],
    }
    if recipe.model.base and not recipe.model.base.startswith("builtin:"):
        front["base_model"] = recipe.model.base
    if (licence := base_license(recipe)) is not None:
        front["license"] = licence
    environment = read_record(run.environment, versions=dict, python=str)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.path.name}",
        about,
        *_step(summary),
        "## Use",
        use,
        *_figures(summary),
        *_merge(summary),
        *([line] if (line := generation_line(summary)) else []),
        "## Licence",
        f"The base's: {licence}." if licence else "The base names none where this was made: see the base before sharing.",
        "## Data",
        f"{summary.get('rows', 'unknown')} rows; {summary.get('quarantined', 'unknown')} quarantined, "
        f"{summary.get('dropped_over_length', 'unknown')} dropped as too long.",
        "## Recipe",
        f"```yaml\n{recipe.to_yaml()}```",
        f"Made with Python {environment['python']}, {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def _base_name(recipe: Recipe) -> str:
    return recipe.model.base or f"{recipe.model.vision} + {recipe.model.language}"


def base_license(recipe: Recipe) -> str | None:
    """What the base's own card names as its licence, if that card is on this machine; of parts, that of the language model."""
    name = str(recipe.model.base or recipe.model.language)
    folder = BUILTIN.get(name, Path(name))
    cached = None if folder.is_dir() or not HUB_ID.fullmatch(name) else cached_snapshot(name, "README.md")
    card = (cached or folder) / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    try:
        values = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:  # someone else's file
        return None
    licence = values.get("license_name") or values.get("license") if isinstance(values, dict) else None
    return licence if isinstance(licence, str) else None


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
        f"Before rounding to {summary['merge_dtype']}: {summary['merge_unrounded_difference']:.3g} (allowed: "
        f"{summary['merge_tolerance']:g}). Largest difference from the base: {summary['merge_difference_from_base']:.3g}.",
        *_carried(summary.get("merge_copied_tensors", ())),
        *_extra("The adapter on the quantized base that it was trained on, against this", summary.get("trained")),
        *_extra("The quantized release beside this, against this", summary.get("quantized")),
    ]


def _step(summary: dict[str, Any]) -> list[str]:
    step, steps = summary.get("merge_step"), summary.get("merge_steps")
    if step is None:
        return []
    more = "" if step == steps else ", which is a checkpoint before the run's end"
    return [f"Trained for {step:,} of {steps:,} optimizer steps{more}."]


def _carried(keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    names = ", ".join(f"`{key}`" for key in keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
    return [f"Carried over from the base, unchanged, since the class does not read them (`manifest.json` lists them): {names}."]


def _extra(title: str, figures: dict[str, Any] | None) -> list[str]:
    if not figures:
        return []
    return [
        f"{title}: largest logit difference {figures['max_logit_difference']:.3g}, mean {figures['mean_logit_difference']:.3g}, "
        f"KL divergence {figures['kl']:.3g}, {figures['same_answers']} of {figures['samples']} greedy answers the same."
    ]


def _figures(summary: dict[str, Any]) -> list[str]:
    rows = score_rows(summary)
    if not rows:
        return []
    lines = ["| task or source | questions | commonest answer | base | tuned | 95% interval |", "|---|---|---|---|---|---|"]
    keys = ("task", "questions", "majority", "base", "tuned", "interval")
    lines += ["| " + " | ".join(row[key] for key in keys) + " |" for row in rows]
    return ["## Figures", "Exact match on held-out questions.", "\n".join(lines)]
