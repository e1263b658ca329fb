"""The families of bases that mmtune tunes, by `model_type`: what is known of each before its library is imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object

PROJECTORS: dict[str, tuple[str, ...]] = {
    "llava": ("model.multi_modal_projector",),
    "llava_next": ("model.multi_modal_projector", "model.image_newline"),
    "llava_onevision": ("model.multi_modal_projector", "model.image_newline"),
    "qwen2_vl": ("model.visual.merger",),
    "qwen2_5_vl": ("model.visual.merger",),
    "qwen3_vl": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    "idefics3": ("model.connector",),
    "smolvlm": ("model.connector",),
    "internvl": ("model.multi_modal_projector",),
    "gemma3": ("model.multi_modal_projector",),
    "paligemma": ("model.multi_modal_projector",),
    "mistral3": ("model.multi_modal_projector",),
}
"""Projector of each family by `config.model_type`: the main module first, then what else is trained with it."""

UNPACKABLE = {
    "paligemma": "its prompts attend in both directions, and those of all samples in a row would be one prompt",
    "gemma3": "its image tokens attend in both directions by their place in the whole row, and positions start again in a sample",
}
"""Families, by `model_type`, whose masks know no samples in a row, with the reason."""


def check_family(model_type: str, name: str) -> None:
    """Refuse a base that is not one of the families in `PROJECTORS`, before anything else of it is read.

    Args:
        model_type: of the base's config.
        name: the base, as the recipe names it.

    Raises:
        UserError: saying what the base is, and which key takes it if any does.
    """
    if model_type in PROJECTORS:
        return
    kind = library_fact("model_types").get(model_type, "other")
    if kind == "language":
        advice = f"it is a language model without a vision tower; give it as model.language: {name}, beside model.vision"
    elif kind == "image-text":
        advice = "transformers has it as an image-text model, and where its parts are is not known here"
    elif kind == "vision":
        advice = f"it is a vision encoder without a language model; give it as model.vision: {name}, beside model.language"
    else:
        advice = "it is not an image-text model of transformers"
    known = f"mmtune tunes {', '.join(sorted(PROJECTORS))}"
    raise UserError(f"it has model_type {model_type!r}, which is not supported: {advice}; as a base {known}")


def local_model_type(folder: Path) -> str | None:
    """`model_type` of a checkpoint, from its `config.json` alone; None where that does not say it.

    Raises:
        UserError: a model type that transformers does not have, whatever code comes with it; or a `config.json` that is not a
            JSON object.
    """
    config = read_json_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    if model_type not in PROJECTORS and model_type not in library_fact("model_types"):
        advice = "check it, or install a newer transformers"
        if "auto_map" in config:
            advice = "it brings code of its own; take the release converted for transformers (its name often ends in -hf)"
        version = metadata.version("transformers")
        raise UserError(f"it has model_type {model_type!r}, which transformers {version} does not have: {advice}")
    return model_type
