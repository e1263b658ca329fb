"""Verbs `mmtune train`, `merge`, `push` and `chat`: one function per verb, which calls the library."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from socket import socket
from typing import Any

from mmtune.cli.comparison_verb import rewrite_page
from mmtune.cli.verb_arguments import (
    AddVerb,
    add_question_arguments,
    add_recipe_arguments,
    add_trust,
    check_question_arguments,
)
from mmtune.console.library_output import configure_console, rank_prefix
from mmtune.utils.errors import RecipeValueError, UserError, errors_at_key
from mmtune.utils.hub import missing_path_message


def add_run_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs that train and release a run.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "train", _train, "tune a model with a recipe")
    add_recipe_arguments(verb)
    verb.add_argument("--overwrite", action="store_true", help="replace an earlier run at output_dir")
    verb.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="resume the run at output_dir from its last valid checkpoint, or from CHECKPOINT; start if there is none yet",
    )
    verb.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="profile N steps after a warm-up: the time of a step by part, a trace and advice; training then continues",
    )
    verb.add_argument(
        "--rehearse",
        action="store_true",
        help="run the whole job on a tiny random model and generated rows; also works under a launcher",
    )

    verb = add(verbs, "merge", _merge, "merge a run's adapter into its base and verify the result")
    verb.add_argument("model", metavar="RUN", nargs="?", help="a run or one of its checkpoints; leave out with --adapter")
    verb.add_argument("out", metavar="OUT", help="the directory of the merged model")
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    verb.add_argument(
        "--samples", type=int, default=32, metavar="N", help="number of samples that the result is compared on (default 32)"
    )
    verb.add_argument(
        "--adapter", action="append", metavar="RUN:WEIGHT", help="merge several runs, each with a weight; repeat the option"
    )
    verb.add_argument("--dtype", choices=("fp32", "bf16"), help="precision of the merged weights (default: the run's)")
    verb.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="maximum size of a weight file (default 5GB)")
    verb.add_argument("--quantize", choices=("int8", "nf4"), help="also write a quantized release, OUT-int8 or OUT-nf4")
    verb.add_argument("--keep-adapter", action="store_true", help="write the adapter without merging it")
    add_trust(verb)

    verb = add(verbs, "push", _push, "list the files of a release, and upload them to the hub with --upload")
    verb.add_argument("release", metavar="RELEASE", help="a directory written by `mmtune merge`")
    verb.add_argument("repository", metavar="OWNER/NAME", help="the repository on the hub")
    verb.add_argument("--upload", action="store_true", help="upload the files; without this option nothing is uploaded")
    verb.add_argument("--public", action="store_true", help="make a new repository public (default: private)")

    verb = add(verbs, "chat", _chat, "chat with a run or a model")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    add_question_arguments(verb)
    verb.add_argument("--prompt", metavar="TEXT", help="ask one question and exit (default: a conversation)")
    verb.add_argument("--chat-template", metavar="NAME", help="a shipped chat template or a .jinja file (default: the model's)")
    verb.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="maximum number of new tokens in an answer (default 256)"
    )
    verb.add_argument("--web", action="store_true", help="chat on a page in the browser; needs the extra `web`")
    verb.add_argument("--host", metavar="HOST", help="with --web: where the page listens (default 127.0.0.1)")
    verb.add_argument("--port", type=int, metavar="N", help="with --web: the port (default: the first free one from 7860)")
    help_text = "with --web: the page's password is the first line of FILE; required if --host is not this machine's loopback"
    verb.add_argument("--password-file", metavar="FILE", help=help_text)
    add_trust(verb)


def _train(arguments: argparse.Namespace) -> Any:
    from mmtune.preflight import check_reachable, check_recipe, located_errors
    from mmtune.recipe.recipe import load_recipe
    from mmtune.recipe.train_rules import LIBRARY_KEYS
    from mmtune.run_directory import RunDirectory, check_output_dir, locked_run
    from mmtune.utils.files import check_writable, report_disk_errors, resolve_link

    if isinstance(arguments.resume, str) and "=" in arguments.resume and not Path(arguments.resume).exists():
        arguments.overrides, arguments.resume = [*arguments.overrides, arguments.resume], True  # --resume key=value
    if arguments.profile is not None and arguments.profile < 1:
        raise UserError(f"--profile: expected at least 1 step, got {arguments.profile}")
    if arguments.profile is not None and arguments.rehearse:
        raise UserError("--profile and --rehearse exclude each other: a rehearsal takes one step of a tiny model; give one")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.rehearse:
        check_recipe(recipe, files=False, libraries=set(LIBRARY_KEYS) - {"train.report_to"})
        configure_console()
        from mmtune.rehearse import rehearse

        with located_errors(recipe):
            return rehearse(recipe)
    if arguments.resume and arguments.overwrite:
        raise UserError(
            "--resume and --overwrite exclude each other: --resume continues the run that --overwrite replaces; give one"
        )
    check_recipe(recipe)
    with located_errors(recipe), errors_at_key("output_dir"):
        check_writable(resolve_link(Path(recipe.output_dir)).absolute().parent)
    check_reachable(recipe)
    # The main process holds the lock for all processes of the launch.
    lock = nullcontext() if rank_prefix() else locked_run(recipe)
    with located_errors(recipe), lock, report_disk_errors(Path(recipe.output_dir)):
        if not arguments.resume:
            check_output_dir(recipe, arguments.overwrite)
        configure_console()
        from mmtune.train import train

        resume = arguments.resume if isinstance(arguments.resume, bool) else Path(arguments.resume)
        metrics = train(recipe, arguments.command_line, arguments.overwrite, resume, arguments.profile or 0)
        if not rank_prefix():
            run = RunDirectory(Path(recipe.output_dir))
            weights = run.adapter if run.adapter.is_dir() else run.model
            print(f"run: {run.path} ({run.report.name}, {run.summary.name}, {weights.name}/)")
        return metrics


def _merge(arguments: argparse.Namespace) -> Any:
    if (arguments.model is None) == (arguments.adapter is None):
        raise UserError("expected RUN and OUT, or OUT and an --adapter RUN:WEIGHT for each of several runs")
    runs = [_weighted(text) for text in arguments.adapter or ()]
    for path in [path for path, _ in runs] or [Path(arguments.model)]:
        if not path.is_dir():
            raise UserError(missing_path_message(str(path), "run or model"))
    _check_release(arguments)
    configure_console()
    from mmtune.release.merge import ExportOptions, combine_adapters, merge, merge_line, release_adapter
    from mmtune.run_directory import RunDirectory

    out = Path(arguments.out)
    shared = {
        "overwrite": arguments.overwrite,
        "count": arguments.samples,
        "trust_remote_code": arguments.trust_remote_code,
    }
    options = ExportOptions(arguments.dtype, arguments.max_shard_size, arguments.quantize)
    if arguments.keep_adapter:
        if arguments.adapter or options != ExportOptions():
            raise UserError("--keep-adapter does not support --adapter, --dtype, --max-shard-size and --quantize; leave them out")
        metrics = release_adapter(Path(arguments.model), out, **shared)
        print(f"released: {out}: the adapter, {metrics['same_answers']} of {metrics['samples']} answers are the same")
        return metrics
    if arguments.adapter:
        parity = combine_adapters(runs, out, options=options, **shared)
    else:
        parity = merge(Path(arguments.model), out, options=options, **shared)
    print(merge_line(out, parity))
    if arguments.model is not None:
        run = RunDirectory(Path(arguments.model))
        if run.report.is_file() and run.summary.is_file():
            rewrite_page(run)
    for name, difference in (("as trained, quantized", parity.trained), (f"{out}-{options.quantize}", parity.quantized)):
        if difference:
            print(
                f"{name}: largest logit difference {difference['max_logit_difference']:.2g} from the merged model, "
                f"{difference['same_answers']} greedy answers are the same"
            )
    return asdict(parity)


def _check_release(arguments: argparse.Namespace) -> None:
    """Reject a destination that must not be written, before libraries are imported."""
    from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK
    from mmtune.utils.files import check_replaceable, check_writable
    from mmtune.utils.manifest import MANIFEST

    out = Path(arguments.out)
    directories = [out, out.with_name(f"{out.name}-{arguments.quantize}")] if arguments.quantize else [out]
    for directory in directories:
        check_replaceable(directory, arguments.overwrite, MANIFEST if arguments.keep_adapter else CHECKPOINT_MARK)
        check_writable(directory.absolute().parent, f"{directory}: ")


def _weighted(text: str) -> tuple[Path, float]:
    path, _, weight = text.rpartition(":")
    try:
        return Path(path or text), float(weight) if path else 1.0
    except ValueError as error:
        raise UserError(f"--adapter {text}: expected RUN:WEIGHT, such as runs/a:0.7") from error


def _push(arguments: argparse.Namespace) -> Any:
    release = Path(arguments.release)
    if not release.is_dir():
        raise UserError(missing_path_message(arguments.release, "release"))
    from mmtune.release.push import push

    return push(release, arguments.repository, upload=arguments.upload, private=not arguments.public)


def _chat(arguments: argparse.Namespace) -> Any:
    from mmtune.chat.image_paths import resolve_image
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights

    if arguments.json and arguments.prompt is None:
        raise UserError("--json needs --prompt")
    window = check_question_arguments(arguments)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: expected at least 1")
    images = [resolve_image(image) for image in arguments.image]
    trained = locate_trained_weights(Path(arguments.model))
    listener, password = _page_address(arguments)
    configure_console()
    from mmtune.chat.answer_settings import AnswerSettings
    from mmtune.chat.commands import EMPTY_ANSWER, long_prompt_line
    from mmtune.chat.session import ChatSession
    from mmtune.chat.terminal import run_chat
    from mmtune.models.compute import to_best_device
    from mmtune.models.load import load_trained

    try:
        model, processor = load_trained(
            trained, chat_template=arguments.chat_template, trust_remote_code=arguments.trust_remote_code
        )
    except RecipeValueError as error:
        if arguments.chat_template is None or error.key != "model.chat_template":
            raise
        raise UserError(f"--chat-template: {error.problem}") from error
    model = to_best_device(model)

    def new_session() -> ChatSession:
        session = ChatSession(model, processor, AnswerSettings(arguments.max_new_tokens), window)
        if arguments.system is not None:
            session.set_system(arguments.system.strip())
        return session

    session = new_session()
    if listener is not None:
        from mmtune.chat.web.page_server import run_page

        run_page(new_session, str(arguments.model), listener, password)
        return None
    for image in images:
        session.attach(image)
    if arguments.prompt is None:
        if (errors := run_chat(session)) and not sys.stdin.isatty():
            raise UserError(f"{errors} {'lines' if errors > 1 else 'line'} of standard input failed; see the output")
        return None
    pieces = []
    for piece in session.ask(arguments.prompt):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    answer = "".join(pieces)
    if not answer.strip():
        print(EMPTY_ANSWER, file=sys.stderr)
    if line := long_prompt_line(session):
        print(f"warning: {line}", file=sys.stderr)
    return {"prompt": arguments.prompt, "images": arguments.image, "answer": answer}


def _page_address(arguments: argparse.Namespace) -> tuple[socket | None, str | None]:
    """Where the chat page listens, and its password; (None, None) for a chat in the terminal."""
    of_page = {"--host": arguments.host, "--port": arguments.port, "--password-file": arguments.password_file}
    if not arguments.web:
        for option, value in of_page.items():
            if value is not None:
                raise UserError(f"{option} belongs to --web")
        return None, None
    if arguments.prompt is not None or arguments.image:
        raise UserError("--web: ask and attach images on the page; leave out --prompt and --image")
    from mmtune.chat.web.page_server import LOOPBACK, check_web, listen, read_password

    check_web()
    host = arguments.host or LOOPBACK
    password = read_password(host, arguments.password_file)
    return listen(host, arguments.port), password
