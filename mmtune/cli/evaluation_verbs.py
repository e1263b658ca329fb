"""Verbs `mmtune eval` and `mmtune tasks`: answers and scores of a model on a recipe's held-out rows, or on benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmtune.cli.conversation_evaluation import add_conversation_arguments, evaluate_conversations
from mmtune.cli.verb_arguments import AddVerb, add_trust
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import UserError
from mmtune.utils.files import expand_user


def add_evaluation_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs that evaluate a model.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "eval", _eval, "evaluate a run or a model on the held-out rows of a recipe, or on benchmarks")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    verb.add_argument("--recipe", metavar="FILE", help="the recipe whose evaluate section is used (default: the run's)")
    help_text = "a benchmark and the folder of its files, such as pope=data/pope; `mmtune tasks` lists the names; or a .yaml file"
    verb.add_argument("--task", action="append", default=[], metavar="NAME=DIR", help=f"{help_text}; repeat for several")
    help_text = "write the answers as JSON Lines (default: in the run directory; for other models, in the working directory)"
    verb.add_argument("--out", metavar="FILE", help=f"{help_text}; with --task, a folder of such files")
    add_conversation_arguments(verb)
    verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override keys of the recipe or the tasks")
    add_trust(verb)

    add(verbs, "tasks", _tasks, "list the benchmarks of `mmtune eval --task`, and the files that each reads")


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of a model.

    Attributes:
        section: the rows and settings.
        out: the file of the answers.
        located_errors: adds to errors where their key was written.
        task: the name of the task; None for a recipe's held-out rows.
    """

    section: Any
    out: Path
    located_errors: Callable[[], AbstractContextManager[None]]
    task: str | None = None


def _eval(arguments: argparse.Namespace) -> Any:
    if arguments.conversation:
        return evaluate_conversations(arguments)
    if arguments.judge or arguments.judge_model:
        raise UserError("--judge: needs --conversation FILE.yaml")
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights
    from mmtune.recipe.recipe import load_recipe
    from mmtune.utils.files import report_disk_errors

    trained = locate_trained_weights(Path(arguments.model))
    of_run = trained.run.recipe.is_file()
    recipe = None
    if arguments.recipe or of_run:
        recipe = load_recipe(arguments.recipe or trained.run.recipe, [] if arguments.task else arguments.overrides)
    evaluations = _of_tasks(arguments, trained) if arguments.task else _of_recipe(arguments, trained, recipe)
    configure_console()
    from mmtune.data.encoding.encoding_checks import check_encoding
    from mmtune.distributed.context import init_inference
    from mmtune.evaluation.answers import group_scores, of_benchmark, scores_to_dicts
    from mmtune.evaluation.answers_file import write_answers
    from mmtune.evaluation.evaluate import check_questions, evaluate, warn_of_leakage
    from mmtune.evaluation.field_groups import field_groups
    from mmtune.evaluation.scores import print_scores
    from mmtune.models.checkpoints.weights_hash import hash_trained
    from mmtune.models.compute import to_best_device
    from mmtune.models.load import load_trained

    trained_by = load_recipe(trained.run.recipe) if of_run else None
    for each in evaluations:
        with each.located_errors():
            check_questions(each.section)
            if trained_by is not None and (arguments.recipe or arguments.overrides or each.task):
                warn_of_leakage(trained_by, each.section)
    with evaluations[0].located_errors():
        dist = init_inference()
        chat_template = None if recipe is None else recipe.model.chat_template
        model, processor = load_trained(trained, chat_template=chat_template, trust_remote_code=arguments.trust_remote_code)
    check_encoding(processor)
    cached = any(each.section.cache for each in evaluations)
    weights = dist.broadcast_object(hash_trained(trained) if cached and dist.is_main_process else None)
    model = to_best_device(model)
    results = []
    for each in evaluations:
        label = str(arguments.model) if each.task is None else f"{arguments.model}: {each.task}"
        try:
            answers = evaluate(model, processor, each.section, dist, label, weights)
        except KeyboardInterrupt:
            if weights is not None and dist.is_main_process:
                print("the same command continues with the answers so far", file=sys.stderr)
            raise
        if not dist.is_main_process:
            continue
        if each.task is not None:
            answers = of_benchmark(answers, each.task)
        with report_disk_errors(each.out):
            each.out.parent.mkdir(parents=True, exist_ok=True)
            write_answers(answers, each.out)
        scores = scores_to_dicts(group_scores(answers))
        result: dict[str, Any] = {"tuned_scores": scores, "groups": field_groups(answers), "answers": str(each.out)}
        print_scores(result, "tuned" if of_run else "score", each.task)
        print(f"answers: {each.out}")
        results.append({"task": each.task, **result} if each.task else result)
    if not dist.is_main_process:
        return {}
    result = {"tasks": results} if arguments.task else {**results[0], "tasks": results[1:]} if results[1:] else results[0]
    if trained.is_checkpoint:
        result |= {"step": trained.step, "steps": trained.steps}
    return result


def _of_recipe(arguments: argparse.Namespace, trained: Any, recipe: Any) -> list[_Evaluation]:
    """The evaluations of a recipe's held-out rows, and of its tasks."""
    from mmtune.evaluation.tasks import recipe_tasks
    from mmtune.preflight import check_recipe, located_errors

    if recipe is None:
        raise UserError(
            f"{arguments.model}: a model has no recipe with held-out rows; give one: --recipe FILE; or a task: --task NAME=DIR"
        )
    if recipe.evaluate is None:
        hint = "add one" if arguments.recipe else "give a recipe that has one: --recipe FILE"
        raise UserError(f"{arguments.recipe or arguments.model}: the recipe has no evaluate section; {hint}")
    of = Path(arguments.recipe).stem if arguments.recipe else "eval"
    out = _answers_file(trained, of, _model_name(arguments)) if arguments.out is None else _checked_out(Path(arguments.out))
    check_recipe(recipe, ("evaluate",))
    evaluations = [_Evaluation(recipe.evaluate, out, partial(located_errors, recipe))]
    for task in recipe_tasks(recipe.evaluate):
        file = _checked_out(out.with_stem(f"{out.stem}_{task.name}"))
        evaluations.append(_Evaluation(task.section, file, task.located_errors, task.name))
    return evaluations


def _of_tasks(arguments: argparse.Namespace, trained: Any) -> list[_Evaluation]:
    """The evaluations of benchmarks, in the order of the command line."""
    from mmtune.evaluation.tasks import load_task

    for override in arguments.overrides:
        if not override.startswith("evaluate."):
            raise UserError(f"command line: {override}: with --task, give keys of the tasks: evaluate.KEY=VALUE")
    folder = None if arguments.out is None else Path(arguments.out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: with --task, expected a folder for the files of answers, got a file")
    evaluations: dict[str, _Evaluation] = {}
    for text in arguments.task:
        name, equals, files = text.partition("=")
        if not (name and equals and files):
            raise UserError(f"--task {text}: expected NAME=DIR, such as pope=data/pope; `mmtune tasks` lists the names")
        task = load_task(expand_user(name), Path(expand_user(files)), arguments.overrides)
        if task.name in evaluations:
            raise UserError(f"--task {text}: expected each task once, got {task.name} again")
        of_model = _model_name(arguments)
        if folder is None:
            of_model = f"{of_model}_{task.name}"
            out = _answers_file(trained, task.name, of_model)
        else:
            out = _checked_out(folder / f"answers_{of_model}_{task.name}.jsonl")
        evaluations[task.name] = _Evaluation(task.section, out, task.located_errors, task.name)
    return list(evaluations.values())


def _tasks(arguments: argparse.Namespace) -> Any:
    from mmtune.evaluation.tasks import print_tasks, task_rows

    rows = task_rows()
    print_tasks(rows)
    return rows


def _model_name(arguments: argparse.Namespace) -> str:
    return Path(arguments.model).absolute().name.rpartition(":")[2]


def _answers_file(trained: Any, of: str, of_model: str) -> Path:
    """The default file of the answers: in the run directory, or for other models in the working directory."""
    if trained.run.recipe.is_file():
        step = f"_step_{trained.step}" if trained.is_checkpoint else ""
        return _checked_out(trained.run.path / f"answers_{of}{step}.jsonl")
    return _checked_out(Path(f"answers_{of_model}.jsonl"))


def _checked_out(out: Path) -> Path:
    """The file for the answers. In a run, only answers of an earlier `mmtune eval` are overwritten.

    Raises:
        UserError: the file must not be overwritten or cannot be written.
    """
    from mmtune.run_directory import RunDirectory
    from mmtune.utils.files import check_writable

    run = RunDirectory(out.parent)
    if run.recipe.is_file() and out in (run.answers("before"), run.answers("after")):
        raise UserError(f"--out {out}: this file holds the run's own answers and is not replaced; give another file")
    if out.is_dir():
        raise UserError(f"--out {out}: expected a .jsonl file, got a directory")
    if out.exists() and out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a new file or a .jsonl file; this one is not replaced; give another file")
    check_writable(out.parent, f"--out {out}: ")
    return out
