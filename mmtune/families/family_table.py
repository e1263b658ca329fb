"""The model families that mmtune supports as bases, by `model_type`; available without importing a library."""

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
"""Paths of the projector by `model_type`: the main module, then further modules and parameters that are trained with it."""

UNPACKABLE = {
    "paligemma": "its prompts attend in both directions, so the prompts of all samples in a row would attend to each other",
    "gemma3": "its image tokens attend in both directions by their position in the row, but positions restart in every sample",
}
"""Families whose attention masks do not separate packed samples, by `model_type`, with the reason."""


def check_family(model_type: str, name: str) -> None:
    """Check that the family of a base is in `PROJECTORS`.

    Args:
        model_type: `model_type` in the base's config.
        name: the base, as named in the recipe.

    Raises:
        UserError: an unsupported family; the message names the recipe key for it, if there is one.
    """
    if model_type in PROJECTORS:
        return
    kind = library_fact("model_types").get(model_type, "other")
    if kind == "language":
        advice = f"it is a language model without a vision tower; set model.language: {name} and model.vision"
    elif kind == "image-text":
        advice = "transformers supports this image-text model, mmtune does not"
    elif kind == "vision":
        advice = f"it is a vision encoder without a language model; set model.vision: {name} and model.language"
    else:
        advice = "it is not an image-text model of transformers"
    raise UserError(f"model_type {model_type!r} is not supported as a base: {advice}; supported: {', '.join(sorted(PROJECTORS))}")


def local_model_type(folder: Path) -> str | None:
    """`model_type` in the `config.json` of a checkpoint, or None if it has none.

    Raises:
        UserError: a model type that transformers does not have, with or without code in the checkpoint; or a `config.json` that
            is not a JSON object.
    """
    config = read_json_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    if model_type not in PROJECTORS and model_type not in library_fact("model_types"):
        advice = "check config.json, or install a newer transformers"
        if "auto_map" in config:
            advice = "the model needs its own code; use the release converted for transformers (its name often ends in -hf)"
        version = metadata.version("transformers")
        raise UserError(f"model_type {model_type!r} does not exist in transformers {version}: {advice}")
    return model_type
