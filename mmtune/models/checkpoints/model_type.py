"""The `model_type` of a base: whether it can be tuned, known without importing torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from mmtune.families.family_table import FAMILIES, NOT_SUPPORTED, OUT_OF_SCOPE
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object


def check_model_type(model_type: str, name: str) -> None:
    """Check that a base is an image-text model. A type that transformers does not have is code of the checkpoint.

    Args:
        model_type: `model_type` in the base's config.
        name: the base, as named in the recipe.

    Raises:
        UserError: another kind of model; the message names the recipe key for it, if there is one.
    """
    kind = library_fact("model_types").get(model_type)
    if (reason := OUT_OF_SCOPE.get(model_type) or NOT_SUPPORTED.get(model_type)) is not None:
        advice = reason
    elif kind in (None, "image-text") or any(model_type in family.model_types for family in FAMILIES.values()):
        return
    elif kind == "language":
        advice = f"it is a language model without a vision tower; set model.language: {name} and model.vision"
    elif kind == "vision":
        advice = f"it is a vision encoder without a language model; set model.vision: {name} and model.language"
    else:
        advice = "it is not an image-text model of transformers"
    raise UserError(f"model_type {model_type!r} is not supported as a base: {advice}; docs/families.md lists the types that are")


def local_model_type(folder: Path, trust_remote_code: bool = False) -> str | None:
    """`model_type` in the `config.json` of a checkpoint, or None if it has none.

    Args:
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: a model type that transformers does not have, without code in the checkpoint that may be executed; or a
            `config.json` that is not a JSON object.
    """
    config = read_json_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return None
    has_code = "auto_map" in config
    if model_type not in library_fact("model_types") and not (has_code and trust_remote_code):
        advice = "check config.json, or install a newer transformers"
        if has_code:
            advice = (
                "the model needs its own code: use the release converted for transformers (its name often ends in -hf), or read "
                "the code and set model.trust_remote_code: true"
            )
        version = metadata.version("transformers")
        raise UserError(f"model_type {model_type!r} does not exist in transformers {version}: {advice}")
    return model_type
