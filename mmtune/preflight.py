"""Preflight: validate files, data templates, the family of the base and optional libraries before any weight is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from mmtune.data.sources.reader import check_source
from mmtune.data.templates.template import load_data_template
from mmtune.evaluation.metrics.metric_table import check_template_metric, find_metric, metric_name
from mmtune.evaluation.tasks import recipe_tasks
from mmtune.families.box_convention import RegionKind, unknown_convention
from mmtune.families.family_table import ASSEMBLED_TYPE, family_of
from mmtune.models.checkpoints.locate_base import UNTRAINED, local_folder, resolve_base
from mmtune.models.checkpoints.model_type import check_model_type, local_model_type
from mmtune.recipe.recipe import SECTIONS, EvaluateSection, Recipe, Source, check_files, located, source_names
from mmtune.recipe.train_rules import LIBRARY_KEYS, missing_libraries
from mmtune.utils.errors import RecipeValueError, UserError, errors_at_key, nearest
from mmtune.utils.hub import is_local_name, locate_checkpoint


def check_recipe(
    recipe: Recipe, sections: Collection[str] = SECTIONS, files: bool = True, libraries: Collection[str] = tuple(LIBRARY_KEYS)
) -> None:
    """Check the files, templates, libraries and base of a recipe, without importing torch or transformers.

    Args:
        sections: the sections whose files and templates are checked.
        files: whether the files must exist.
        libraries: keys of `LIBRARY_KEYS` whose libraries must be installed.

    Raises:
        UserError: all errors, one per line, with file, line and key.
    """
    errors: list[str] = []
    native_kinds: list[tuple[str, str, list[RegionKind]]] = []
    if files:
        with _collected(errors):
            check_files(recipe, sections)
    sources = {"data.train": recipe.data.train, "evaluate.data": recipe.evaluate.data if recipe.evaluate else ()}
    for name, part in sources.items():
        for number, source in enumerate(part if name.partition(".")[0] in sections else ()):
            try:
                with errors_at_key("template"):
                    check_source(source)
                    check_template_metric(source.template, load_data_template(source.template).metric)
                for key, template in _templates(source).items():
                    native_kinds.append((f"{name}.{number}.{key}", template, load_data_template(template).native_kinds))
            except RecipeValueError as error:
                errors.append(located(recipe, f"{name}.{number}.{error.key}", error.problem))
    if recipe.evaluate and recipe.evaluate.metric is not None and "evaluate" in sections:
        with _collected(errors), located_errors(recipe), errors_at_key("evaluate.metric"):
            find_metric(recipe.evaluate.metric)
    if recipe.evaluate and recipe.evaluates_while_training and not errors:
        with _collected(errors), located_errors(recipe):
            _check_best_metric(recipe.evaluate, recipe)
    if recipe.evaluate and files and "evaluate" in sections:
        with _collected(errors), located_errors(recipe):
            recipe_tasks(recipe.evaluate)
    missing = missing_libraries(recipe.train, recipe.model.attn_implementation) if "train" in sections else ()
    errors += [located(recipe, key, message) for key, message in missing if key in libraries]
    if "model" in sections:
        with _collected(errors), located_errors(recipe):
            _check_base(recipe, native_kinds)
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))


def _templates(source: Source) -> dict[str, str]:
    """The data templates of a source and of its examples, by key."""
    templates = {"template": source.template}
    return (
        templates
        if source.shots is None or source.shots.template is None
        else {**templates, "shots.template": source.shots.template}
    )


@contextmanager
def _collected(errors: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        errors.append(str(error))


def _check_best_metric(section: EvaluateSection, recipe: Recipe) -> None:
    """Check that an evaluation while training reports `train.metric_for_best_model`."""
    names = source_names(section.sources)
    losses = ["loss", *(f"loss_{source}" for source in names if len(names) > 1)]
    scores = {metric_name(section.metric, load_data_template(source.template).metric) for source in section.sources}
    name, best = recipe.train.get("metric_for_best_model"), recipe.best_metric
    key = "train.metric_for_best_model"
    if best in scores and not section.while_training.answers:
        raise RecipeValueError(key, f"{name} needs answers while training: give evaluate.while_training: {{answers: true}}")
    if best not in (*losses, *scores):
        raise RecipeValueError(key, f"unknown metric '{name}'{nearest(best, (*losses, *scores))}")


def _check_base(recipe: Recipe, native_kinds: Sequence[tuple[str, str, Sequence[RegionKind]]]) -> None:
    """Check by the base's `model_type` that its family is supported, and supports the method, packing and native regions.

    Args:
        native_kinds: of each data template the recipe's key, its name, and the kinds of regions that it declares if it writes
            regions in the convention of the family.
    """
    base = recipe.model.base
    model_type: str | None = ASSEMBLED_TYPE
    if base not in (None, UNTRAINED):
        resolve_base(str(base))
        if (folder := local_folder(str(base))) is None:
            return
        try:
            model_type = local_model_type(folder, recipe.model.trust_remote_code)
            if model_type is not None:
                check_model_type(model_type, str(base))
        except UserError as error:
            raise RecipeValueError("model.base", f"{base}: {error}") from error
    known = {kind for convention in family_of(model_type or "").box_conventions.values() for kind in convention.forms}
    for key, template, kinds in native_kinds:
        if model_type is not None and kinds and not known & {*kinds}:
            raise RecipeValueError(key, f"{template}: {model_type}: {unknown_convention(kinds[0])}")
    reason = None if model_type is None else family_of(model_type).unpackable
    if recipe.data.packing and reason is not None:
        raise RecipeValueError("data.packing", f"packing is not supported: {model_type}: {reason}; set data.packing: false")
    if (problem := recipe.tune.incompatibility(recipe.model.precision, model_type=model_type)) is not None:
        component, reason = problem
        raise RecipeValueError(f"tune.{component}", reason)


def check_reachable(recipe: Recipe) -> None:
    """Check that the checkpoints of a recipe's models are on this machine or on a hub that answers.

    Raises:
        UserError: for the first that is not, with line and key.
    """
    for key, name, error in unreachable_checkpoints(recipe):
        with located_errors(recipe):
            tiny = " or model.base=builtin:tiny-llava" if key == "model.base" else ""
            hint = "" if is_local_name(name) else f"; --rehearse{tiny} tries the recipe without a download"
            raise RecipeValueError(key, f"{error}{hint}") from error


def unreachable_checkpoints(recipe: Recipe) -> Iterator[tuple[str, str, UserError]]:
    """The checkpoints of a recipe's models that are neither on this machine nor on a hub that answers: key, name and reason."""
    names = {f"model.{key}": name for key, name in recipe.model.checkpoints.items()}
    names |= {f"objective.{key}": name for key, name in recipe.objective.models.items() if not name.startswith("builtin:")}
    for key, name in names.items():
        try:
            locate_checkpoint(name)
        except UserError as error:
            yield key, name, error


def is_base_local(recipe: Recipe) -> bool:
    """Whether the configuration of the recipe's base is on this machine, so that its family is known."""
    base = recipe.model.base
    return base in (None, UNTRAINED) or local_folder(resolve_base(str(base))) is not None


@contextmanager
def located_errors(recipe: Recipe) -> Iterator[None]:
    """Add to each RecipeValueError of the block where its key was written: the file and line, or the command line."""
    try:
        yield
    except RecipeValueError as error:
        raise UserError(located(recipe, error.key, error.problem)) from error
