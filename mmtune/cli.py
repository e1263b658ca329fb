"""`mmtune VERB`: each verb is one thin function over the library.

Exit codes: 0 done, 1 the check failed, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune import __version__
from mmtune.cli_data import add_data_verbs
from mmtune.console import settle_console, speaker
from mmtune.errors import CheckFailed, Stopped, UserError, missing_library
from mmtune.files import expand_user

PATHS = ("recipe", "model", "out", "release", "folder", "dest", "data", "html", "media_root", "image", "adapter", "resume")
"""Arguments that name paths: a leading `~` is the home directory, also where a shell leaves it (`--out=~/x`)."""


def entry_point(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is shown as its message, a bug keeps its traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(given)
    parsed.command_line = ["mmtune", *given]
    run: Callable[[argparse.Namespace], Any] = parsed.run
    if run in (_train, _eval, _merge, _chat, _report, _assemble, _plan, _methods, _recipe_check):
        settle_console()
    who = speaker()
    try:
        if getattr(parsed, "json", False):
            # Standard output holds the JSON and nothing else; other processes than the first have none.
            with nullcontext() if who else redirect_stdout(sys.stderr):
                result = run(parsed)
            print(json.dumps(result, indent=2, ensure_ascii=False))
        else:
            run(parsed)
    except UserError as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        if (reason := missing_library(error)) is None:
            raise
        print(f"{who}error: a library that this needs is missing: {reason}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        if error.result is not None and getattr(parsed, "json", False):
            print(json.dumps(error.result, indent=2, ensure_ascii=False))
        print(f"{who}failed: {error}", file=sys.stderr)
        return 1
    except Stopped as error:
        print(f"{who}stopped: {error}", file=sys.stderr)
        return error.exit_code
    except RuntimeError as error:
        from mmtune.world import is_lost_peer

        if not is_lost_peer(error):
            raise
        print(f"{who}ended, because another process of the run has; see its error, or the launcher's root cause", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{who}interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """argparse takes positional arguments in one run only; overrides may also follow an option."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(given)
    overrides = getattr(parsed, "overrides", None)
    unknown = [argument for argument in rest if overrides is None or argument.startswith("-") or "=" not in argument]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    for name, value in vars(parsed).items():
        if name in PATHS and isinstance(value, (str, list)):
            setattr(parsed, name, [*map(expand_user, value)] if isinstance(value, list) else expand_user(value))
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmtune", description="Parameter-efficient multimodal instruction tuning.")
    parser.add_argument("--version", action="version", version=f"mmtune {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = _verb(verbs, "train", _train, "tune a model by a recipe")
    _recipe_arguments(verb)
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier run at the recipe's output_dir")
    verb.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on with the run at the recipe's output_dir, from its last good checkpoint or this one; with none yet, begin",
    )
    verb.add_argument(
        "--rehearse",
        action="store_true",
        help="run the whole recipe once on tiny random weights and a few made-up rows",
    )

    verb = _verb(verbs, "eval", _eval, "score a run or a model on a recipe's held-out questions")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    verb.add_argument("--recipe", help="the recipe whose `evaluate` section to use; a run's own by default")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")

    verb = _verb(verbs, "merge", _merge, "fold a run's adapter into its base and prove the result")
    verb.add_argument("model", metavar="RUN", nargs="?", help="the run, or a checkpoint of one; none with --adapter")
    verb.add_argument("out", metavar="OUT", help="where the merged model goes")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    verb.add_argument("--samples", type=int, default=32, help="samples to compare on (default 32)")
    verb.add_argument("--adapter", action="append", metavar="RUN:WEIGHT", help="add several runs' changes; repeat it")
    verb.add_argument("--dtype", choices=("fp32", "bf16"), help="of the released weights (default: the run's)")
    verb.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default 5GB)")
    verb.add_argument("--quantize", choices=("int8", "nf4"), help="write a quantized release too, as OUT-int8 or OUT-nf4")
    verb.add_argument("--keep-adapter", action="store_true", help="release the adapter beside its base, unmerged")

    verb = _verb(verbs, "push", _push, "show what a release would upload to the hub, and upload it with --upload")
    verb.add_argument("release", metavar="RELEASE", help="what `mmtune merge` wrote")
    verb.add_argument("repository", metavar="OWNER/NAME", help="on the hub")
    verb.add_argument("--upload", action="store_true", help="upload; without it nothing leaves this machine")
    verb.add_argument("--public", action="store_true", help="a new repository is public")

    verb = _verb(verbs, "chat", _chat, "talk to a run or a model")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    verb.add_argument("--image", action="append", default=[], help="an image to show first; may be repeated")
    told = "the grey values that become black and white, as `window` of the sources that trained; 8 bits take none"
    verb.add_argument("--window", nargs=2, type=float, metavar=("LOW", "HIGH"), help=told)
    verb.add_argument("--prompt", help="one question; without it, a conversation")
    verb.add_argument("--chat-template", metavar="NAME", help="instead of the model's own, as model.chat_template of a recipe")
    verb.add_argument("--max-new-tokens", type=int, default=256, help="an answer is cut there (default 256)")

    about = "count the tokens of the data, and foretell the memory of one training step; no weight is loaded"
    verb = _verb(verbs, "plan", _plan, about)
    _recipe_arguments(verb)
    verb.add_argument("--memory", metavar="SIZE", help="what there is, such as 24GB; suggests changes when it is too little")
    verb.add_argument("--processes", type=int, default=1, metavar="N", help="and what each of N devices takes, by layout")
    verb.add_argument("--no-data", action="store_true", help="foretell the memory only; the data is not read")
    verb.add_argument("--tokens", type=int, help="of the longest sample (default: the data's, or data.max_tokens)")
    verb.add_argument("--images", type=int, help="images in a sample (default: the longest sample's, or 1)")
    verb.add_argument("--supervised", type=int, help="answer tokens in a sample (default: the data's most, or all of its text)")

    _verb(verbs, "methods", _methods, "the tuning methods, and what works with what")

    verb = _verb(verbs, "report", _report, "print what a run achieved")
    verb.add_argument("model", metavar="RUN", help="the run directory")

    verb = _verb(verbs, "assemble", _assemble, "write the model that a recipe assembles from parts as a checkpoint")
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    verb.add_argument("out", metavar="OUT", help="where the checkpoint goes")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")

    recipes = verbs.add_parser("recipe", help="check, list and copy recipes").add_subparsers(required=True, metavar="VERB")
    verb = _verb(recipes, "check", _recipe_check, "check a recipe, its files and its templates, loading no weights")
    _recipe_arguments(verb)
    _verb(recipes, "schema", _recipe_schema, "print the JSON schema of recipes, for editors")
    _verb(recipes, "list", _recipe_list, "list the recipes that ship")
    verb = _verb(recipes, "copy", _recipe_copy, "copy a shipped recipe to edit")
    verb.add_argument("name", metavar="NAME")
    verb.add_argument("dest", metavar="DEST", nargs="?", help="a file or a folder (default: here)")

    add_data_verbs(verbs.add_parser("data", help="data sets").add_subparsers(required=True, metavar="VERB"), _verb)
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], Any], about: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    verb.set_defaults(run=run)
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return verb


def _recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    verb.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as train.learning_rate=1e-4")


def _train(arguments: argparse.Namespace) -> Any:
    from mmtune.recipe import load_recipe

    if isinstance(arguments.resume, str) and "=" in arguments.resume and not Path(arguments.resume).exists():
        arguments.overrides, arguments.resume = [*arguments.overrides, arguments.resume], True  # --resume key=value
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.rehearse:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("a rehearsal runs in one process: mmtune train RECIPE --rehearse")
        from mmtune.rehearse import rehearse

        return rehearse(recipe)
    from mmtune.files import writing
    from mmtune.train import train

    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with the run that --overwrite would replace; give one of them")
    resume = arguments.resume if isinstance(arguments.resume, bool) else Path(arguments.resume)
    with writing(Path(recipe.output_dir)):
        return train(recipe, arguments.command_line, arguments.overwrite, resume)


def _eval(arguments: argparse.Namespace) -> Any:
    from mmtune.data.encode import check_chat_template
    from mmtune.evaluation.report import print_scores
    from mmtune.evaluation.run import as_json, check_questions, evaluate, score
    from mmtune.model.compute import place
    from mmtune.model.load import load_trained, trained_part
    from mmtune.recipe import load_recipe

    trained = trained_part(Path(arguments.model))
    recipe = load_recipe(arguments.recipe or trained.run.recipe, arguments.overrides)
    if recipe.evaluate is None:
        raise UserError(f"{arguments.recipe or arguments.model}: the recipe has no `evaluate` section")
    check_questions(recipe.evaluate)
    model, processor = load_trained(trained, chat_template=recipe.model.chat_template)
    check_chat_template(processor)
    result: dict[str, Any] = {"tuned_scores": as_json(score(evaluate(place(model), processor, recipe.evaluate), recipe.evaluate))}
    print_scores(result)
    if trained.is_checkpoint:
        result |= {"step": trained.step, "steps": trained.steps}
    return result


def _merge(arguments: argparse.Namespace) -> Any:
    from mmtune.release.merge import Form, combine, keep_adapter, merge

    out = Path(arguments.out)
    shared = {"overwrite": arguments.overwrite, "count": arguments.samples}
    form = Form(arguments.dtype, arguments.max_shard_size, arguments.quantize)
    if (arguments.model is None) == (arguments.adapter is None):
        raise UserError("give one RUN, or --adapter RUN:WEIGHT for each of several")
    if arguments.keep_adapter:
        if arguments.adapter or form != Form():
            raise UserError("--keep-adapter releases one RUN as it is: no --adapter, --dtype, --max-shard-size, --quantize")
        figures = keep_adapter(Path(arguments.model), out, **shared)
        print(f"released: {out}: the adapter beside its base, {figures['same_answers']} of {figures['samples']} answers the same")
        return figures
    if arguments.adapter:
        parity = combine([_weighted(text) for text in arguments.adapter], out, form=form, **shared)
    else:
        parity = merge(Path(arguments.model), out, form=form, **shared)
    print(
        f"merged: {out}{_step(parity)}: largest logit difference {parity.merge_max_logit_difference:.2g} on "
        f"{parity.merge_samples} samples, {parity.merge_same_answers} greedy answers the same"
    )
    for name, apart in (("as trained, quantized", parity.trained), (f"{out}-{form.quantize}", parity.quantized)):
        if apart:
            print(
                f"{name}: largest logit difference {apart['max_logit_difference']:.2g} from the merged model, "
                f"{apart['same_answers']} greedy answers the same"
            )
    return asdict(parity)


def _step(parity: Any) -> str:
    return "" if parity.merge_step == parity.merge_steps else f" (step {parity.merge_step} of {parity.merge_steps})"


def _weighted(text: str) -> tuple[Path, float]:
    path, _, weight = text.rpartition(":")
    try:
        return Path(path or text), float(weight) if path else 1.0
    except ValueError as error:
        raise UserError(f"--adapter {text}: expected RUN:WEIGHT, such as runs/a:0.7") from error


def _push(arguments: argparse.Namespace) -> Any:
    from mmtune.release.push import push

    return push(Path(arguments.release), arguments.repository, upload=arguments.upload, private=not arguments.public)


def _chat(arguments: argparse.Namespace) -> Any:
    from mmtune.chat.session import ChatSession
    from mmtune.chat.terminal import converse
    from mmtune.model.compute import place
    from mmtune.model.load import load_trained

    if arguments.json and arguments.prompt is None:
        raise UserError("--json goes with --prompt")
    if arguments.window is not None and not (
        all(map(math.isfinite, arguments.window)) and arguments.window[0] < arguments.window[1]
    ):
        low, high = arguments.window
        raise UserError(f"--window {low:g} {high:g}: expected LOW HIGH, two finite numbers, the lower one first")
    model, processor = load_trained(Path(arguments.model), chat_template=arguments.chat_template)
    window = None if arguments.window is None else (arguments.window[0], arguments.window[1])
    session = ChatSession(place(model), processor, max_new_tokens=arguments.max_new_tokens, window=window)
    for image in arguments.image:
        session.attach(Path(image))
    if arguments.prompt is None:
        converse(session)
        return None
    pieces = []
    for piece in session.ask(arguments.prompt):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return {"prompt": arguments.prompt, "images": arguments.image, "answer": "".join(pieces)}


def _plan(arguments: argparse.Namespace) -> Any:
    from mmtune.data.encode import check_chat_template
    from mmtune.data.plan_report import plan_data, print_data
    from mmtune.data.source import is_missing
    from mmtune.model.load import load_bare_processor
    from mmtune.recipe import load_recipe
    from mmtune.train import training_arguments
    from mmtune.training.rows import make_batches, optimizer_steps
    from mmtune.tuning.layouts import layouts_for, print_layouts
    from mmtune.tuning.memory import estimate_memory, parse_memory, print_estimate, suggestions
    from mmtune.world import ALONE

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    limit = None if arguments.memory is None else parse_memory(arguments.memory)
    missing = [source.path for source in recipe.data.train if is_missing(source.path)]
    data = None
    sample: dict[str, Any] = {"tokens": recipe.data.max_tokens, "images": 1, "supervised": None}
    if recipe.data.stream:
        print("the memory alone: a stream is not looked through before it is trained on")
    elif missing:
        print(f"the memory alone, because there is no data to plan: no such file: {', '.join(missing)}")
    elif not arguments.no_data:
        settings = training_arguments(recipe)
        processor = load_bare_processor(recipe.model)
        check_chat_template(processor)
        data, longest, (samples, lengths) = plan_data(recipe.data, processor)
        batches = make_batches(samples, recipe.data, settings, ALONE, lengths)
        data |= {"steps": optimizer_steps(settings, batches), "largest_batch": batches.largest()}
        print_data(data)
        sample |= longest
    sample |= {name: given for name in ("tokens", "images", "supervised") if (given := getattr(arguments, name)) is not None}
    if arguments.tokens is not None or arguments.images is not None:
        sample.pop("image_size", None)
    if sample["tokens"] is None:
        raise UserError("how long is the longest sample? give data.max_tokens in the recipe, or --tokens")
    estimate = estimate_memory(recipe, **sample)
    print_estimate(estimate, limit)
    layouts = layouts_for(estimate, arguments.processes) if arguments.processes > 1 else {}
    if layouts:
        print_layouts(layouts, arguments.processes, limit)
    changes = [] if limit is None or estimate.fits(limit) else suggestions(recipe, estimate, limit, **sample)
    for change in changes:
        print(f"  {change}")
    divided = {layout: each.as_json() for layout, each in layouts.items()}
    return estimate.as_json() | {"limit": limit, "layouts": divided, "suggestions": changes, "data": data}


def _methods(arguments: argparse.Namespace) -> Any:
    from mmtune.methods.show import method_rows, print_methods

    print_methods()
    return method_rows()


def _report(arguments: argparse.Namespace) -> Any:
    from mmtune.evaluation.report import print_scores
    from mmtune.run_directory import RunDirectory

    run = RunDirectory(Path(arguments.model))
    summary = run.read_summary()
    print_scores(summary)
    print(
        f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters trained in "
        f"{summary['train_seconds']:g} s, peak memory {summary['peak_memory_mb']:,.0f} MB"
    )
    print(f"page: {run.report}")
    return summary


def _assemble(arguments: argparse.Namespace) -> Any:
    from mmtune.files import check_replaceable
    from mmtune.model.checkpoint import CHECKPOINT_MARK, save_checkpoint
    from mmtune.model.load import load_base
    from mmtune.recipe import load_recipe, needed_paths

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    out = Path(arguments.out)
    check_replaceable(out, arguments.overwrite, CHECKPOINT_MARK, needed_paths(recipe))
    model, processor = load_base(recipe.model, recipe.train.get("seed", 42))
    save_checkpoint(model, processor, out, overwrite=arguments.overwrite)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"assembled: {out}: {type(model).__name__}, {parameters:,} parameters")
    return {"out": str(out), "class": type(model).__name__, "parameters": parameters}


def _recipe_check(arguments: argparse.Namespace) -> Any:
    from mmtune.data.reader import check_source
    from mmtune.model.load import UNTRAINED, local_folder, resolve_base
    from mmtune.recipe import check_files, load_recipe
    from mmtune.train import check_method, training_arguments
    from mmtune.world import ALONE

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_files(recipe)
    sources = {"data.train": recipe.data.train, "evaluate.data": recipe.evaluate.data if recipe.evaluate else ()}
    for key, source in ((f"{name}.{number}", each) for name, part in sources.items() for number, each in enumerate(part)):
        try:
            check_source(source)
        except UserError as error:
            raise UserError(f"{recipe.origin(key)}: {key}: {error}") from error
    training_arguments(recipe)
    base = recipe.model.base
    if base is None or base == UNTRAINED or local_folder(resolve_base(base)) is not None:
        check_method(recipe, ALONE)
    else:
        print(f"not checked without a download: that {base} is there, and that its family is supported and takes the method")
    print(f"{arguments.recipe}: good")
    return {"recipe": arguments.recipe, "good": True}


def _recipe_schema(arguments: argparse.Namespace) -> Any:
    from mmtune.recipe import recipe_schema

    schema = recipe_schema()
    if not arguments.json:
        print(json.dumps(schema, indent=2))
    return schema


def _recipe_list(arguments: argparse.Namespace) -> Any:
    from mmtune.shipped import shipped_recipes

    recipes = shipped_recipes()
    for name, path in recipes.items():
        print(f"{name:20}  {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    return {name: str(path) for name, path in recipes.items()}


def _recipe_copy(arguments: argparse.Namespace) -> Any:
    from mmtune.shipped import copy_recipe

    dest = copy_recipe(arguments.name, Path(arguments.dest or "."))
    print(f"copied: {dest}")
    return {"recipe": str(dest)}


if __name__ == "__main__":
    sys.exit(entry_point())
