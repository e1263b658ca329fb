"""Verbs `mmtune data ...`: one function per verb, which calls the library."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import AddVerb, add_recipe_arguments
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import CheckFailed, UserError

RECIPE_ENDINGS = (".yaml", ".yml")


def add_data_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs under `mmtune data`.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "check", _check, "validate every row and image header; exit code 1 if a row would stop a run")
    verb.add_argument("data", metavar="RECIPE_OR_FILE", help="a recipe (.yaml), or a file of rows")
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override keys of the recipe")
    verb.add_argument("--template", metavar="NAME", help="the data template of a file of rows (default: detected)")
    verb.add_argument(
        "--media-root",
        metavar="DIR",
        help="the folder that media paths of a file of rows are relative to (default: the file's folder)",
    )
    verb.add_argument("--out", metavar="FILE", help="write the issues as JSON Lines: row, field, issue, detail, fix")
    verb.add_argument("--decode", action="store_true", help="also decode every image; finds all damaged images, much slower")
    verb.add_argument("--processes", type=int, metavar="N", help="number of worker processes (default: one per core)")

    verb = add(verbs, "show", _show, "print one sample as it is trained: supervised, prompt and media tokens marked")
    add_recipe_arguments(verb)
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ID", help="a training or held-out row: train.json[17], or the value of its id field")
    which.add_argument("--index", type=int, default=0, metavar="N", help="the number of a training row, from 0 (default 0)")
    verb.add_argument("--html", metavar="FILE", help="write an HTML page with the images and every token")
    verb.add_argument("--prompt", action="store_true", help="print only the rendered prompt before the last answer")

    verb = add(verbs, "digits", _digits, "write the data set of the quickstart, handwritten digits")
    verb.add_argument("folder", metavar="DIR", help="the folder to write to")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="also write the splits that the built-in checkpoint was trained on")
    which.add_argument("--boxes", action="store_true", help="write digits and their boxes instead, for recipes/grounding.yaml")


def _check(arguments: argparse.Namespace) -> Any:
    validator, recipe = _make_validator(arguments)
    from mmtune.data.sources.held_out_split import describe_split
    from mmtune.data.validation.validate import IssueSummary

    summary, listed = IssueSummary(validator.rows), []
    with _lines(arguments.out) as write:
        for issue in validator.issues(arguments.processes):
            summary.add(issue)
            write(issue.as_json())
            if arguments.json:
                listed.append(issue.as_json())
    summary.show()
    for name, counts in validator.held_out.items():
        print(describe_split(name, counts))
    if arguments.out:
        print(f"issues: {arguments.out}")
    result = {"data": arguments.data, **summary.as_json(), "held_out": validator.held_out, "issues": listed}
    if (failure := summary.failure()) is not None:
        raise CheckFailed(f"{arguments.data}: {failure}", result)
    if recipe is not None and recipe.evaluate:
        from mmtune.evaluation.evaluate import check_questions
        from mmtune.preflight import located_errors

        try:
            with located_errors(recipe):
                check_questions(recipe.evaluate)
        except UserError as error:
            raise CheckFailed(str(error), result) from error
    return result


def _make_validator(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The validator of a recipe or of a file of rows, and the recipe, or None."""
    from mmtune.data.sources.source import is_missing_path
    from mmtune.data.templates.template import load_data_template
    from mmtune.preflight import check_recipe, located_errors, unreachable_checkpoints
    from mmtune.recipe.recipe import Source, load_recipe
    from mmtune.utils.hub import is_local_name, missing_path_message

    if not arguments.data.endswith(RECIPE_ENDINGS):
        if arguments.overrides:
            raise UserError(
                f"{arguments.overrides[0]}: expected no override with a file of rows ({arguments.data}); "
                "give --template and --media-root"
            )
        if is_missing_path(arguments.data):
            raise UserError(missing_path_message(arguments.data, "file or folder"))
        template = arguments.template
        if template is not None:
            load_data_template(template)
        configure_console()
        from mmtune.data.validation.validate import ValidationSettings, Validator, guess_template

        if template is None:
            template = guess_template(arguments.data)
            print(f"{arguments.data}: detected the data template {template}; --template NAME selects another")
        source = Source(path=arguments.data, template=template, media_root=arguments.media_root)
        return Validator([source], settings=ValidationSettings(decode=arguments.decode)), None
    if arguments.template or arguments.media_root:
        raise UserError(
            "--template and --media-root: expected a file of rows, got a recipe; set template and media_root in the recipe"
        )
    recipe = load_recipe(arguments.data, arguments.overrides)
    check_recipe(recipe, ("model", "data", "evaluate"))
    configure_console()
    from mmtune.data.validation.validate import ValidationSettings, Validator

    with located_errors(recipe):
        absent = next((name for _, name, _ in unreachable_checkpoints(recipe) if not is_local_name(name)), None)
        if absent is not None:
            print(f"not checked: tokens and lengths: {absent} is not on this machine and cannot be downloaded")
        processor = None if absent else _processor(recipe)
        settings = ValidationSettings(
            processor,
            recipe.data.max_tokens,
            recipe.data.over_length,
            recipe.data.supervise,
            arguments.decode,
            recipe.evaluate.leakage if recipe.evaluate else "error",
        )
        return Validator(recipe.data.train, recipe.evaluate.sources if recipe.evaluate else (), settings), recipe


def _processor(recipe: Any) -> Any:
    """The recipe's processor, with a chat template that gives exact labels."""
    from mmtune.data.encoding.encoding_checks import check_encoding
    from mmtune.models.load import resolve_model  # slow import, not needed for a file of rows

    processor = resolve_model(recipe.model).processor
    check_encoding(processor)
    return processor


@contextmanager
def _lines(out: str | None) -> Iterator[Callable[[dict[str, str]], None]]:
    """A function that writes objects to a file as JSON Lines; without a file it does nothing."""
    if out is None:
        yield lambda line: None
        return
    try:
        # File names that are not UTF-8 contain lone surrogates in Python; escaped as \udcXX they are valid JSON.
        file = Path(out).open("w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    with file:
        yield lambda line: print(json.dumps(line, ensure_ascii=False), file=file)


def _show(arguments: argparse.Namespace) -> Any:
    from mmtune.preflight import check_recipe, located_errors
    from mmtune.recipe.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_recipe(recipe, ("model", "data", "evaluate"))
    configure_console()
    from mmtune.data.dataset import IndexedSamples
    from mmtune.data.validation.show_sample import escape_invisible, find_sample, print_sample, view_sample
    from mmtune.report.sample_page import write_page

    if arguments.row is not None:
        sample = find_sample(recipe.data.train, recipe.evaluate.sources if recipe.evaluate else (), arguments.row)
    else:
        samples = IndexedSamples(recipe.data.train)
        if not 0 <= arguments.index < len(samples):
            raise UserError(
                f"--index {arguments.index}: expected 0 to {len(samples) - 1}: there are {len(samples):,} training rows"
            )
        sample = samples[arguments.index]
    with located_errors(recipe):
        view = view_sample(sample, _processor(recipe), recipe.data)
    if arguments.html:
        write_page(view, Path(arguments.html))
        print(f"page: {arguments.html}")
    if arguments.prompt:
        print(escape_invisible(view.prompt))
    elif not arguments.json and not arguments.html:
        print_sample(view)
    return view.as_json()


def _digits(arguments: argparse.Namespace) -> Any:
    from mmtune.builtin.digits import BOX_SPLITS, SPLITS, write_digits
    from mmtune.utils.files import resolve_link
    from mmtune.utils.locks import locked

    splits = tuple(BOX_SPLITS) if arguments.boxes else tuple(SPLITS) if arguments.all else ("tune", "eval")
    with locked(resolve_link(Path(arguments.folder))):
        counts = write_digits(Path(arguments.folder), splits)
    for split, rows in counts.items():
        print(f"{arguments.folder}/{split}.json: {rows:,} rows")
    return counts
