"""Verbs `mmtune serve` and `mmtune export gguf`: engines, the check of a running one, and the format of llama.cpp."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.cli.comparison_verb import rewrite_page
from mmtune.cli.verb_arguments import AddVerb, add_trust
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import CheckFailed, UserError

SET_HERE = {
    "--port": "the port is an option of mmtune: --port N before --",
    "--host": "an engine listens on 127.0.0.1 only; put a server that checks requests before it",
    "--served-model-name": "the name of the model is its path",
}
"""Options of engines that `mmtune serve` sets itself."""
DEFAULT_ENGINE, DEFAULT_PORT, DEFAULT_SAMPLES = "transformers", 8000, 32


def add_serve_verb(verbs: Any, add: AddVerb) -> None:
    """Declare the verb.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "serve", _serve, "serve a run or a model with an OpenAI-compatible API, or check a running engine")
    help_text = "a run (merged if needed), a checkpoint of one, a model or a hub id; words after -- are options of the engine"
    verb.add_argument("model", metavar="RUN_OR_MODEL", nargs="?", help=help_text)
    verb.add_argument("--engine", metavar="NAME", help="transformers (default) or vllm")
    help_text = "the command that starts the engine, such as 'vllm/bin/vllm serve' of another environment"
    verb.add_argument("--engine-command", metavar="COMMAND", help=help_text)
    verb.add_argument("--port", type=int, metavar="N", help="the port on 127.0.0.1 (default 8000)")
    help_text = "how long the engine may take to start, and for one answer, in seconds (default 600)"
    verb.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=help_text)
    help_text = "compare the engine at this address with the run: its answers to held-out questions and its prompt tokens"
    verb.add_argument("--check", metavar="URL", help=help_text)
    verb.add_argument("--run", dest="trained", metavar="RUN", help="with --check: the run, or one of its checkpoints")
    verb.add_argument("--model-name", metavar="NAME", help="with --check: the model of the engine (default: its only one)")
    verb.add_argument("--samples", type=int, metavar="N", help="with --check: number of questions (default 32)")
    add_trust(verb)
    verb.set_defaults(engine_options=[])


def _serve(arguments: argparse.Namespace) -> Any:
    from mmtune.serving.engines import check_installed

    check_installed(("openai",))
    if not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise UserError(f"--timeout {arguments.timeout:g}: expected a positive number of seconds")
    of_check = {"--run": arguments.trained, "--model-name": arguments.model_name, "--samples": arguments.samples}
    of_start = {"--engine": arguments.engine, "--engine-command": arguments.engine_command, "--port": arguments.port}
    if arguments.check is not None:
        _check_unused(of_start, "starts an engine; --check URL compares a running one")
        return _check(arguments)
    _check_unused(of_check, "belongs to --check URL")
    if arguments.model is None:
        raise UserError("expected RUN_OR_MODEL, or --check URL --run RUN")
    if arguments.json:
        raise UserError("--json belongs to --check URL; the engine runs until Ctrl-C")
    return _start(arguments)


def _check_unused(options: dict[str, Any], reason: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} {reason}")


def _start(arguments: argparse.Namespace) -> None:
    from mmtune.serving.engine_process import check_port, running_engine
    from mmtune.serving.engines import find_engine

    engine = find_engine(arguments.engine or DEFAULT_ENGINE)
    port = DEFAULT_PORT if arguments.port is None else arguments.port
    engine.command("", port, (), arguments.engine_command)  # an engine that is missing is reported before a merge
    check_port(port)
    for word in arguments.engine_options:
        if word.partition("=")[0] in SET_HERE:
            raise UserError(f"{word}: {SET_HERE[word.partition('=')[0]]}; leave it out after --")
    configure_console()
    from mmtune.serving.engine_client import EngineClient
    from mmtune.serving.released_model import check_decoder_only, released_model

    released = released_model(Path(arguments.model), arguments.trust_remote_code)
    trust = ["--trust-remote-code"] if arguments.trust_remote_code else []
    options = [*trust, *arguments.engine_options]
    command = engine.command(released.path, port, options, arguments.engine_command)
    if engine.decoder_only and arguments.engine_command is None:
        check_decoder_only(released.path, arguments.trust_remote_code)
    print(f"starting: {shlex.join(command)}", flush=True)
    with running_engine(command, engine.environment, port) as process:
        process.wait_until_ready(arguments.timeout)
        try:
            EngineClient(process.address, released.path, arguments.timeout).connect()
        except (CheckFailed, UserError):
            process.check_alive("at its first question")
            raise
        print(_usage(process.address, released.path, released.trained), flush=True)
        process.wait()


def _usage(address: str, model: str, trained: Path | None) -> str:
    """How to ask the engine."""
    mark = "IMAGE-IN-BASE64"
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{mark}"}}
    content = [image, {"type": "text", "text": "What is in the image?"}]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0})
    shown = shlex.quote(body).replace(mark, "'$(base64 -w0 image.png)'")
    # The body is not an argument of curl: an argument has at most 128 KiB.
    curl = f"echo {shown} | curl -s {address}/v1/chat/completions -H 'Content-Type: application/json' -d @-"
    lines = [
        f"serving: {model} at {address}/v1; Ctrl-C ends it. Ask it, with your image in place of image.png:",
        "",
        curl,
        "",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{address}/v1", api_key="none")',
        f"answer = client.chat.completions.create(model={model!r}, temperature=0,",
        '    messages=[{"role": "user", "content": "What can you do?"}])',
        "print(answer.choices[0].message.content)",
    ]
    if trained is not None:
        lines += ["", f"mmtune serve --check {address}/v1 --run {shlex.quote(str(trained))}"]
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> Any:
    from mmtune.preflight import check_recipe, located_errors
    from mmtune.recipe.recipe import load_recipe

    if arguments.trained is None:
        raise UserError("--check URL needs --run RUN, the run whose answers are compared")
    if arguments.model is not None or arguments.engine_options:
        raise UserError("--check URL compares a running engine; leave out RUN_OR_MODEL and options of the engine")
    samples = DEFAULT_SAMPLES if arguments.samples is None else arguments.samples
    if samples < 1:
        raise UserError(f"--samples {samples}: expected at least 1")
    from mmtune.serving.engine_client import EngineClient

    engine = EngineClient(arguments.check, arguments.model_name, arguments.timeout)
    engine.connect()
    configure_console()
    from mmtune.data.encoding.native_regions import with_native_regions
    from mmtune.evaluation.predictions.questions import with_prompt
    from mmtune.models.generation import DEFAULT_MAX_NEW_TOKENS
    from mmtune.release.merge import parity_samples
    from mmtune.release.merge_weights import locate_run_weights
    from mmtune.serving.serving_check import check_serving, record_check
    from mmtune.serving.trained_answers import TrainedModel

    trained = locate_run_weights(Path(arguments.trained))
    recipe = load_recipe(trained.run.recipe)
    check_recipe(recipe, ("evaluate",) if recipe.evaluate else ("data",))
    section = recipe.evaluate
    with located_errors(recipe):
        rows = parity_samples(recipe, samples)
    max_new_tokens = section.max_new_tokens if section else DEFAULT_MAX_NEW_TOKENS
    model = TrainedModel(trained, recipe, max_new_tokens, arguments.trust_remote_code)
    written = [with_native_regions(row, model.processor) for row in rows]
    questions = [with_prompt(row, section.prompt if section else None) for row in written]

    def record(values: dict[str, Any], outcome: str) -> None:
        record_check(trained.run.serving, engine.name, trained.path.name, values, outcome)
        if trained.run.report.is_file():
            rewrite_page(trained.run)

    try:
        result = check_serving(engine, model, questions)
    except CheckFailed as error:
        if error.result is not None:
            record(error.result, str(error))
        raise
    record(asdict(result), f"passed: {result.cause}" if result.rounding else "passed")
    print(f"prompt tokens: {result.same_prompt_tokens} of {result.questions} questions have as many as in training")
    print(f"answers: {result.same_answers} of {result.questions} are the trained model's")
    for part, count in result.unread_parts.items():
        print(f"warning: the engine {part} ({count} question{'s' if count > 1 else ''}), and is compared with that prompt")
    if result.failed_answers:
        print(
            f"warning: {result.failed_answers} answers are not compared, because the engine fails at them: such as a tool call "
            f"that ends after {max_new_tokens} new tokens (evaluate.max_new_tokens), which `transformers serve` cannot read"
        )
    if result.not_asked:
        print(f"warning: {result.not_asked} questions are not compared, because the check sends no video or audio")
    if (difference := result.largest_log_probability_difference) is not None:
        print(f"log-probabilities: the largest difference of a token is {difference:.2g}")
    if result.rounding:
        print(f"warning: {result.cause}")
    print("check passed")
    return asdict(result)


def add_export_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs under `mmtune export`.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "gguf", _gguf, "convert a run or a model to GGUF files with llama.cpp's own converter")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run (merged if needed), a checkpoint of one, or a model directory")
    verb.add_argument("out", metavar="OUT", help="the directory of model.gguf and mmproj.gguf")
    verb.add_argument("--llama-cpp", required=True, metavar="DIR", help="a checkout of llama.cpp, with convert_hf_to_gguf.py")
    help_text = "f32, bf16, f16 or q8_0 (default: the precision of the merged weights)"
    verb.add_argument("--outtype", choices=("f32", "bf16", "f16", "q8_0"), help=help_text)
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    add_trust(verb)


def _gguf(arguments: argparse.Namespace) -> Any:
    configure_console()
    from mmtune.serving.gguf_export import PORT, export_gguf, find_converter
    from mmtune.serving.released_model import released_model

    llama_cpp = Path(arguments.llama_cpp)
    find_converter(llama_cpp)  # a wrong directory is reported before a merge
    released = released_model(Path(arguments.model), arguments.trust_remote_code)
    exported = export_gguf(
        released,
        Path(arguments.out),
        llama_cpp,
        outtype=arguments.outtype,
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"exported: {exported.model}, {exported.mmproj}")
    print(exported.server)
    if released.trained is not None:
        print(f"mmtune serve --check http://127.0.0.1:{PORT}/v1 --run {shlex.quote(str(released.trained))}")
    return asdict(exported)
