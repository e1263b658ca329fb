"""Verbs `mmtune plan`, `methods`, `assemble` and `mmtune recipe ...`: one function per verb, which calls the library."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import AddVerb, add_recipe_arguments
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import UserError


def add_recipe_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs about recipes, models and methods.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    about = "count the tokens of the data and predict the memory of a training step, without loading weights"
    verb = add(verbs, "plan", _plan, about)
    add_recipe_arguments(verb)
    verb.add_argument(
        "--memory", metavar="SIZE", help="memory of the device, such as 24GB; if the step does not fit, changes are suggested"
    )
    verb.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="also print the memory per device for N devices, by parallelism strategy",
    )
    verb.add_argument("--no-data", action="store_true", help="predict the memory only, without reading the data")
    verb.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of a sample (default: the longest sample's, or data.max_tokens)"
    )
    verb.add_argument("--images", type=int, metavar="N", help="images of a sample (default: the longest sample's, or 1)")
    supervised = "supervised tokens of a sample (default: the maximum in the data, or all text tokens)"
    verb.add_argument("--supervised", type=int, metavar="N", help=supervised)

    add(verbs, "methods", _methods, "list the tuning methods and what each supports")

    verb = add(
        verbs, "assemble", _assemble, "write the assembled model of a recipe (model.vision, model.language) as a checkpoint"
    )
    verb.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    verb.add_argument("out", metavar="OUT", help="the directory of the checkpoint")
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override keys of the recipe")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")

    recipes = verbs.add_parser("recipe", help="validate, list and copy recipes").add_subparsers(required=True, metavar="VERB")
    verb = add(recipes, "check", _recipe_check, "validate a recipe, its files and its templates, without loading weights")
    add_recipe_arguments(verb)
    add(recipes, "schema", _recipe_schema, "print the JSON schema of recipes, for editors")
    add(recipes, "list", _recipe_list, "list the shipped recipes")
    verb = add(recipes, "copy", _recipe_copy, "copy a shipped recipe in order to edit it")
    verb.add_argument("name", metavar="NAME", help="the recipe, as `mmtune recipe list` shows it")
    verb.add_argument("dest", metavar="DEST", nargs="?", help="a file or a folder (default: the working directory)")


def _plan(arguments: argparse.Namespace) -> Any:
    from mmtune.planning.memory_sizes import parse_memory
    from mmtune.preflight import check_recipe, located_errors
    from mmtune.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_recipe(recipe, files=False, libraries=("train.optim",))  # the estimate runs the optimizer
    limit = None if arguments.memory is None else parse_memory(arguments.memory)
    configure_console()
    with located_errors(recipe):
        return _plan_of(recipe, arguments, limit)


def _plan_of(recipe: Any, arguments: argparse.Namespace, limit: int | None) -> Any:
    from mmtune.data.encoding.encoding_checks import check_encoding
    from mmtune.data.sources.source import is_missing_path
    from mmtune.distributed.context import SINGLE_PROCESS
    from mmtune.models.load import resolve_model
    from mmtune.planning.feature_sizes import describe_features, plan_features
    from mmtune.planning.memory import estimate_memory, print_estimate, suggestions
    from mmtune.planning.plan_report import plan_data, print_data_plan
    from mmtune.planning.sharded_memory import memory_by_strategy, print_strategies
    from mmtune.planning.weight_counts import count_weights, describe_weights
    from mmtune.training.dataloader import make_batches, optimizer_steps
    from mmtune.training.training_arguments import build_training_arguments, without_trackers

    missing = [source.path for source in recipe.data.train if is_missing_path(source.path)]
    data = None
    sample: dict[str, Any] = {"tokens": recipe.data.max_tokens, "images": 1, "supervised": None}
    if recipe.data.stream:
        print("memory only: a stream is not read before training")
    elif missing:
        print(f"memory only: no such file: {', '.join(missing)}")
    elif not arguments.no_data:
        settings = build_training_arguments(without_trackers(recipe))
        processor = resolve_model(recipe.model).processor
        check_encoding(processor)
        data, longest, (samples, lengths) = plan_data(recipe.data, processor)
        batches = make_batches(samples, recipe.data, settings, SINGLE_PROCESS, lengths)
        data |= {"steps": optimizer_steps(settings, batches), "largest_batch": batches.largest()}
        print_data_plan(data)
        data["held_out"] = _plan_held_out(recipe, processor)
        data["feature_cache"] = plan_features(recipe, samples, lengths, processor)
        if data["feature_cache"] is not None:
            print(describe_features(data["feature_cache"], recipe.data.cache_features))
        sample |= longest
        recipe = _with_batches_of_the_data(recipe, settings.per_device_train_batch_size, batches.max_batch_rows())
    sample |= {name: value for name in ("tokens", "images", "supervised") if (value := getattr(arguments, name)) is not None}
    if arguments.tokens is not None or arguments.images is not None:
        sample.pop("image_size", None)
    if sample["tokens"] is None:
        raise UserError("the length of the longest sample is unknown: give data.max_tokens in the recipe, or --tokens N")
    counts = count_weights(recipe.model)
    for line in describe_weights(counts, recipe.model.precision):
        print(line)
    estimate = estimate_memory(recipe, **sample)
    print_estimate(estimate, limit)
    strategies = memory_by_strategy(estimate, arguments.processes) if arguments.processes > 1 else {}
    if strategies:
        print_strategies(strategies, arguments.processes, limit)
    changes = [] if limit is None or estimate.fits(limit) else suggestions(recipe, estimate, limit, **sample)
    for change in changes:
        print(f"  {change}")
    by_strategy = {strategy: each.as_json() for strategy, each in strategies.items()}
    weights = {"parameters": counts.stored, "active_parameters": counts.active}
    return estimate.as_json() | weights | {"limit": limit, "strategies": by_strategy, "suggestions": changes, "data": data}


def _plan_held_out(recipe: Any, processor: Any) -> dict[str, int] | None:
    """The rows, tokens and batches of the evaluation while training, which are printed too; None without one."""
    from mmtune.data.sources.source import is_missing_path
    from mmtune.distributed.context import SINGLE_PROCESS
    from mmtune.training.held_out.held_out_rows import plan_held_out

    if not recipe.evaluates_while_training:
        return None
    if missing := [source.path for source in recipe.evaluate.sources if is_missing_path(source.path)]:
        print(f"held-out loss: no such file: {', '.join(missing)}")
        return None
    rows = plan_held_out(recipe, processor, SINGLE_PROCESS)
    assert rows is not None
    batches = len(rows.batches(recipe.evaluate.batch_size, SINGLE_PROCESS))
    tokens = int(rows.lengths.sum())
    print(f"held-out tokens: {tokens:,}; batches in one process: {batches:,}")
    return {"rows": len(rows.chosen), "tokens": tokens, "batches": batches}


def _with_batches_of_the_data(recipe: Any, size: int, max_batch_rows: int) -> Any:
    """The recipe with a batch size of at most the number of rows in the data."""
    if recipe.data.packing or recipe.data.tokens_per_batch is not None or not 0 < max_batch_rows < size:
        return recipe
    print(f"memory of a batch of {max_batch_rows} rows: the data has fewer rows than train.per_device_train_batch_size: {size}")
    return recipe.model_copy(update={"train": {**recipe.train, "per_device_train_batch_size": max_batch_rows}})


def _methods(arguments: argparse.Namespace) -> Any:
    from mmtune.methods.show_methods import method_rows, print_methods

    print_methods()
    return method_rows()


def _assemble(arguments: argparse.Namespace) -> Any:
    from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK
    from mmtune.preflight import check_recipe, located_errors
    from mmtune.recipe.recipe import load_recipe, needed_paths
    from mmtune.utils.files import replaced_directory

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = Path(arguments.out)
    with replaced_directory(out, arguments.overwrite, CHECKPOINT_MARK, needed_paths(recipe)) as fresh:
        check_recipe(recipe, ("model",))
        configure_console()
        from mmtune.models.checkpoints.checkpoint_files import write_checkpoint
        from mmtune.models.load import load_base, resolve_model

        with located_errors(recipe):
            model, processor = load_base(resolve_model(recipe.model), recipe.train.get("seed", 42))
        write_checkpoint(model, processor, fresh)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"assembled: {out}: {type(model).__name__}, {parameters:,} parameters")
    return {"out": str(out), "class": type(model).__name__, "parameters": parameters}


def _recipe_check(arguments: argparse.Namespace) -> Any:
    from mmtune.preflight import check_recipe, is_base_local, located_errors
    from mmtune.recipe.pass_through.library_facts import is_stored
    from mmtune.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_recipe(recipe)
    base = recipe.model.base
    with located_errors(recipe):
        if base is not None and not is_base_local(recipe):
            print(f"not checked without a download: whether {base} exists, and whether its family supports the recipe")
        elif base is not None and not base.startswith("builtin:"):
            _check_base_config(recipe)
        _check_objective(recipe)
        if not is_stored("training_arguments"):  # another version of transformers may have other rules
            _check_training_arguments(recipe)
    print(f"{arguments.recipe}: valid")
    return {"recipe": arguments.recipe, "valid": True}


def _check_objective(recipe: Any) -> None:
    """Compare the models that an objective loads with the base, where all of them are on this machine."""
    from mmtune.preflight import is_base_local, unreachable_checkpoints

    if not recipe.objective.models or (recipe.model.base is not None and not is_base_local(recipe)):
        return
    if any(unreachable_checkpoints(recipe)):
        return
    configure_console()
    from mmtune.models.load import resolve_model
    from mmtune.objectives.objective_table import build_objective

    build_objective(recipe, resolve_model(recipe.model))


def _check_base_config(recipe: Any) -> None:
    """Load the base's configuration with transformers."""
    configure_console()
    from mmtune.models.load import base_config
    from mmtune.models.packed_attention import check_packable_family

    config = base_config(recipe.model)
    if recipe.data.packing:
        check_packable_family(config)


def _check_training_arguments(recipe: Any) -> None:
    configure_console()
    from mmtune.training.training_arguments import build_training_arguments

    build_training_arguments(recipe)


def _recipe_schema(arguments: argparse.Namespace) -> Any:
    from mmtune.recipe.recipe import recipe_schema

    schema = recipe_schema()
    if not arguments.json:
        print(json.dumps(schema, indent=2))
    return schema


def _recipe_list(arguments: argparse.Namespace) -> Any:
    from mmtune.utils.shipped import shipped_recipes

    recipes = shipped_recipes()
    for name, path in recipes.items():
        print(f"{name:20}  {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    return {name: str(path) for name, path in recipes.items()}


def _recipe_copy(arguments: argparse.Namespace) -> Any:
    from mmtune.utils.shipped import copy_recipe

    dest = copy_recipe(arguments.name, Path(arguments.dest or "."))
    print(f"copied: {dest}")
    return {"recipe": str(dest)}
