"""Model card of a release: base, use, evaluation, merge parity, data and recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mmtune.evaluation.scores import further_lines, generation_line, metric_lines, score_rows, score_title
from mmtune.methods.method_table import METHODS
from mmtune.models.checkpoints.locate_base import BUILTIN
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.utils.files import read_record
from mmtune.utils.hub import HUB_ID, cached_snapshot


def model_card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory) -> str:
    """The model card of a full checkpoint, as a README with front matter.

    Args:
        recipe: the run's resolved recipe.
        summary: the run's metrics, and those of the merge, if any.
        run: the run directory, for its environment.
    """
    description = f"{_base_name(recipe)}, tuned with mmtune; a full checkpoint."
    if "adapters" in summary:
        terms = "; ".join(f"{weight:g} x {name}" for name, weight in summary["adapters"])
        description = (
            f"{_base_name(recipe)} with a weighted sum of several adapters merged into it: {terms}. Evaluation, data and recipe "
            "below are those of the first adapter; the merge is compared with the sum in memory."
        )
    return _card(recipe, summary, run, description, USE)


def adapter_card(
    recipe: Recipe, summary: dict[str, Any], run: RunDirectory, comparison: dict[str, Any], includes_base: bool
) -> str:
    """The model card of an adapter that is released next to its base.

    Args:
        recipe, summary, run: as for `model_card`.
        comparison: the release compared with the run, from `release_adapter`.
        includes_base: whether the release contains the base; otherwise it is on the hub.
    """
    name = recipe.tune.method or "full"
    method = METHODS.get(name)
    description = f"{_base_name(recipe)} with a {name} adapter, tuned with mmtune. "
    description += (
        "The adapter is released next to its base."
        if method is None or method.mergeable
        else f"A {name} adapter cannot be merged into the base's weights: both are needed."
    )
    is_own_tuner = method is not None and method.is_own_tuner
    base = "base" if includes_base else str(recipe.model.base)
    lines = ["import mmtune.methods.tuners  # registers the method with PEFT"] if is_own_tuner else []
    lines += [
        "from peft import PeftModel",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(model, "adapter")',
        'processor = AutoProcessor.from_pretrained("adapter")',
    ]
    code = "\n".join(lines)
    parity = (
        f"Reloaded from disk like this and compared with the run on {comparison['samples']} samples: largest logit difference "
        f"{comparison['max_logit_difference']:.3g}, {comparison['same_answers']} greedy answers identical."
    )
    return _card(recipe, summary, run, description, f"```python\n{code}\n```\n\n{parity}")


def _card(recipe: Recipe, summary: dict[str, Any], run: RunDirectory, description: str, use: str) -> str:
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmtune", recipe.tune.method or "full"],
    }
    if recipe.model.base and not recipe.model.base.startswith("builtin:"):
        front["base_model"] = recipe.model.base
    if (license_name := base_license(recipe)) is not None:
        front["license"] = license_name
    environment = read_record(run.environment, versions=dict, python=str)
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {run.path.name}",
        description,
        *_step(summary),
        "## Use",
        use,
        *_evaluation(summary),
        *_merge(summary),
        *([line] if (line := generation_line(summary)) else []),
        "## License",
        f"License of the base: {license_name}."
        if license_name
        else "Unknown: no local model card of the base names a license. Check the base before sharing.",
        "## Data",
        f"{summary.get('rows', 'unknown')} rows; {summary.get('quarantined', 'unknown')} quarantined, "
        f"{summary.get('dropped_over_length', 'unknown')} dropped as too long.",
        "## Recipe",
        f"```yaml\n{recipe.to_yaml()}```",
        f"Created with Python {environment['python']}, {versions}.",
    ]
    return "\n\n".join(sections) + "\n"


def _base_name(recipe: Recipe) -> str:
    return recipe.model.base or f"{recipe.model.vision} + {recipe.model.language}"


def base_license(recipe: Recipe) -> str | None:
    """The license in the base's model card, or None if no card is on this machine or it names none.

    For an assembled base, the license of the language model.
    """
    name = str(recipe.model.base or recipe.model.language)
    folder = BUILTIN.get(name, Path(name))
    cached = None if folder.is_dir() or not HUB_ID.fullmatch(name) else cached_snapshot(name, "README.md")
    card = (cached or folder) / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    try:
        values = yaml.safe_load(front.group(1)) if front else None
    except yaml.YAMLError:  # the base's card is not ours to correct
        return None
    license_name = values.get("license_name") or values.get("license") if isinstance(values, dict) else None
    return license_name if isinstance(license_name, str) else None


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
        f"Weights in {summary['merge_dtype']}. Reloaded from disk and compared with the adapter on {summary['merge_samples']} "
        f"samples in fp32: largest logit difference {summary['merge_max_logit_difference']:.3g}, mean "
        f"{summary['merge_mean_logit_difference']:.3g}, KL divergence {summary['merge_kl']:.3g}, "
        f"{summary['merge_same_answers']} of {summary['merge_samples']} greedy answers identical. Largest logit difference "
        f"before rounding to {summary['merge_dtype']}: {summary['merge_unrounded_difference']:.3g} (limit "
        f"{summary['merge_tolerance']:g}). Largest logit difference from the base: "
        f"{summary['merge_difference_from_base']:.3g}.",
        *_copied_tensors(summary.get("merge_copied_tensors", ())),
        *_comparison_line("This release compared with the adapter on its quantized base, as trained", summary.get("trained")),
        *_comparison_line("The quantized release compared with this release", summary.get("quantized")),
    ]


def _step(summary: dict[str, Any]) -> list[str]:
    step, steps = summary.get("merge_step"), summary.get("merge_steps")
    if step is None:
        return []
    note = "" if step == steps else " (a checkpoint, not the end of the run)"
    return [f"Trained for {step:,} of {steps:,} optimizer steps{note}."]


def _copied_tensors(keys: Sequence[str]) -> list[str]:
    if not keys:
        return []
    names = ", ".join(f"`{key}`" for key in keys[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
    return [f"Tensors that the model class does not read, copied from the base unchanged (listed in `manifest.json`): {names}."]


def _comparison_line(title: str, comparison: dict[str, Any] | None) -> list[str]:
    if not comparison:
        return []
    return [
        f"{title}: largest logit difference {comparison['max_logit_difference']:.3g}, mean "
        f"{comparison['mean_logit_difference']:.3g}, KL divergence {comparison['kl']:.3g}, {comparison['same_answers']} of "
        f"{comparison['samples']} greedy answers identical."
    ]


def _evaluation(summary: dict[str, Any]) -> list[str]:
    rows = score_rows(summary)
    if not rows:
        return []
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    about = f"{score_title(summary)}. {' '.join(metric_lines(summary))}".rstrip()
    return ["## Evaluation", about, "\n".join(lines), *further_lines(summary)]
