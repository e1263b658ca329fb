"""Loading and validating a recipe: YAML and `key=value` overrides in, frozen typed objects out.

    recipe = load_recipe("recipes/quickstart.yaml", ["train.max_steps=10"])
    check_files(recipe)

`tune` takes the arguments of PEFT and `train` those of TrainingArguments; `mmtune.recipe.sections` declares all other keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmtune.methods.method_table import METHODS
from mmtune.recipe.pass_through.arguments import Settings, method_arguments, train_arguments
from mmtune.recipe.prompt_sections import Shots
from mmtune.recipe.sections import (
    BUILTIN_BASES,
    DataSection,
    EvaluateSection,
    ModelSection,
    Projector,
    Recipe,
    Source,
)
from mmtune.recipe.source_section import source_names
from mmtune.recipe.tune_section import DEFAULT_METHODS, ComponentTuning, TuneSection
from mmtune.recipe.unknown_keys import error_messages, override_error, split_override_error
from mmtune.recipe.yaml_lines import Origin, apply_override, read_document
from mmtune.utils.errors import UserError
from mmtune.utils.hub import is_local_name, missing_path_message

__all__ = [
    "BUILTIN_BASES",
    "SECTIONS",
    "ComponentTuning",
    "DataSection",
    "EvaluateSection",
    "ModelSection",
    "Projector",
    "Recipe",
    "Settings",
    "Shots",
    "Source",
    "TuneSection",
    "check_files",
    "load_recipe",
    "located",
    "needed_paths",
    "recipe_schema",
    "source_names",
]

SECTIONS = ("model", "tune", "objective", "data", "evaluate", "train")
_ROWS_FILE = re.compile(r"[^*?\[{]+\.(json|jsonl|ndjson|csv|tsv|parquet|arrow|feather|tar)", re.IGNORECASE)
_HUB_PARTS = re.compile(r"[@:].*")
"""The part of a data set's hub id after the repository: `@config:split`."""
_SHORTHANDS = {f"tune.{component}": "method" for component in ("vision", "projector", "language")} | {"model.projector": "type"}


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides and check every key. Whether its files exist is not checked (`check_files`).

    Args:
        path: the YAML file.
        overrides: `key.sub=value`, the value as YAML; list items by index (`data.train.0.path=rows.jsonl`).

    Raises:
        UserError: all errors of the recipe, one per line: where it was written, the key, what was wrong, what was expected.
    """
    if (message := split_override_error(overrides)) is not None:
        raise UserError(message)
    document = read_document(Path(path))
    for number, override in enumerate(overrides):
        if (message := override_error(override)) is not None:
            document.problems.append((Origin(f"command line: {override}", (1, number)), f"command line: {override}: {message}"))
        else:
            apply_override(document, override, number, _SHORTHANDS)
    recipe = None
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        for key, message in error_messages(error.errors()):
            document.report(key, message)
    document.raise_problems()
    assert recipe is not None
    recipe._origins.update({key: origin.place for key, origin in document.origins.items()})
    return recipe


def check_files(recipe: Recipe, sections: Collection[str] = SECTIONS) -> None:
    """Check that every local file and directory of the recipe exists.

    Args:
        sections: those that are checked.

    Raises:
        UserError: each missing path with its key and line.
    """
    errors = []
    for key, named, kind in _named_files(recipe):
        if key.partition(".")[0] not in sections:
            continue
        if kind == "rows" and not (_ROWS_FILE.fullmatch(named) or is_local_name(_HUB_PARTS.sub("", named))):
            continue  # a data set on the hub: checked when it is opened
        if kind == "rows" and any(character in named for character in "*?[{"):
            continue  # several files: checked when they are opened
        if kind == "checkpoint" and not is_local_name(named):
            continue
        if not (Path(named).is_dir() if kind == "directory" else Path(named).exists()):
            rows = "file" if _ROWS_FILE.fullmatch(named) else "file or folder"
            what = {"rows": rows, "checkpoint": "directory"}.get(kind, kind)
            errors.append(located(recipe, key, missing_path_message(named, what)))
    if errors:
        raise UserError("\n".join(errors))


def needed_paths(recipe: Recipe) -> list[Path]:
    """Every path that a recipe reads. A hub id is among them as a path that does not exist."""
    checkpoints = (recipe.model.base, recipe.model.vision, recipe.model.language)
    return [Path(name) for name in (*checkpoints, *(named for _, named, _ in _named_files(recipe))) if name is not None]


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON schema (draft 2020-12) for editors, with the pass-through arguments of PEFT and TrainingArguments."""
    schema = Recipe.model_json_schema(mode="validation")
    definitions = schema["$defs"]
    _add_methods(definitions)
    projector = definitions["ModelSection"]["properties"]["projector"]
    projector["anyOf"].insert(0, {"enum": ["mlp"]})
    definitions["ModelSection"]["oneOf"] = [
        {"required": ["base"], "not": {"anyOf": [{"required": ["vision"]}, {"required": ["language"]}]}},
        {"required": ["vision", "language"]},
    ]
    train = schema["properties"]["train"]
    schema["properties"]["train"] = {
        "description": train["description"],
        **_closed(train_arguments().json_schema()),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mmtune recipe"}


def _add_methods(definitions: dict[str, Any]) -> None:
    """Add the schema of each component: a method's name, or a mapping with the arguments of that method."""
    fields = definitions.pop("ComponentTuning")["properties"]
    rate = {"learning_rate": fields["learning_rate"]}
    plain = {
        "frozen": {},
        "full": {
            **rate,
            "target_modules": {
                "description": "Only these modules; null trains the whole component.",
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            },
        },
    }
    pass_through = {name: {**rate, **method_arguments(name).json_schema()} for name in METHODS}
    for name, properties in {**plain, **pass_through}.items():
        about = METHODS[name].about if name in METHODS else fields["method"]["description"]
        definitions[f"tune_{name}"] = {
            "description": about,
            **_closed({"method": {"const": name, "description": fields["method"]["description"]}, **properties}),
        }
    for component, default in DEFAULT_METHODS.items():
        names = [*plain, *(name for name in METHODS if component in METHODS[name].components)]
        kinds = [{"$ref": f"#/$defs/tune_{name}", **({} if name == default else {"required": ["method"]})} for name in names]
        definitions["TuneSection"]["properties"][component] |= {"anyOf": [{"enum": names}, *kinds], "default": default}
        definitions["TuneSection"]["properties"][component].pop("$ref", None)


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _named_files(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    model = recipe.model
    for name, value in model.checkpoints.items():
        yield f"model.{name}", value, "checkpoint"
    if model.projector is not None and model.projector.weights is not None:
        yield "model.projector.weights", model.projector.weights, "directory"
    if model.chat_template is not None and model.chat_template.endswith(".jinja"):
        yield "model.chat_template", model.chat_template, "file"
    for key, name in recipe.objective.models.items():
        if not name.startswith("builtin:"):
            yield f"objective.{key}", name, "checkpoint"
    if isinstance(recipe.train.get("deepspeed"), str):
        yield "train.deepspeed", recipe.train["deepspeed"], "file"
    lists = {"data.train": recipe.data.train, "evaluate.data": recipe.evaluate.data if recipe.evaluate else ()}
    for key, sources in lists.items():
        for index, source in enumerate(sources):
            yield f"{key}.{index}.path", source.path, "rows"
            if source.template.endswith((".yaml", ".yml")):
                yield f"{key}.{index}.template", source.template, "data template"
            if source.media_root is not None:
                yield f"{key}.{index}.media_root", source.media_root, "directory"
            if source.join is not None:
                yield f"{key}.{index}.join", source.join, "rows"
            if source.shots is not None:
                yield f"{key}.{index}.shots.path", source.shots.path, "rows"
            if source.shots is not None and source.shots.join is not None:
                yield f"{key}.{index}.shots.join", source.shots.join, "rows"
            if source.shots is not None and (source.shots.template or "").endswith((".yaml", ".yml")):
                yield f"{key}.{index}.shots.template", str(source.shots.template), "data template"
            if source.shots is not None and source.shots.media_root is not None:
                yield f"{key}.{index}.shots.media_root", source.shots.media_root, "directory"


def located(recipe: Recipe, key: str, message: str) -> str:
    """A message about a key of a recipe, with the location where the key, or its nearest written parent, was written."""
    location = recipe.location(key)
    if location is None:
        return f"{key}: {message}"
    value = location.removeprefix(f"command line: {key}=")
    if value == location:
        return f"{location}: {key}: {message}"
    return f"{location}: {message.removeprefix(f'{value}: ')}"  # the location shows the value already
