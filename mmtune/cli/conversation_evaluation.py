"""`mmtune eval MODEL --conversation FILE.yaml`: answers of a model to a script, and what passes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import check_jsonl
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import CheckFailed, UserError

BATCH_SIZE = 8
"""Questions that are answered together."""
MAX_REPLY_TOKENS = 16
"""A judge's reply is one word."""


def add_conversation_arguments(verb: argparse.ArgumentParser) -> None:
    """Declare the options of `mmtune eval` for conversation scripts."""
    verb.add_argument("--conversation", metavar="FILE.yaml", help="ask the questions of a script, and check its expectations")
    verb.add_argument(
        "--judge", metavar="URL_OR_MODEL", help="with --conversation, an OpenAI-compatible engine or a model that judges"
    )
    verb.add_argument("--judge-model", metavar="NAME", help="the judge's name in an engine with several models")


def evaluate_conversations(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        UserError: a script that is not valid, or a judge that is missing or not needed.
        CheckFailed: expectations that failed.
    """
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights
    from mmtune.utils.files import check_writable, report_disk_errors

    if arguments.recipe or arguments.overrides or arguments.task:
        raise UserError("--conversation: takes its questions from the script; leave out --recipe, --task and key=value")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--conversation: expected one process; run it without torchrun or accelerate launch")
    path, out = Path(arguments.conversation), Path(arguments.out) if arguments.out else None
    if out is not None:
        check_jsonl(out)
        check_writable(out.absolute().parent, f"--out {out}: ")
    configure_console()
    from mmtune.evaluation.conversations.script import question_messages, read_script

    script = read_script(path)
    judged = any(each.judge for conversation in script.conversations for turn in conversation.turns for each in turn.expect)
    if judged and not arguments.judge:
        raise UserError(
            f"{path}: has expectations for a judge; give one: --judge http://127.0.0.1:8000/v1 or --judge RUN_OR_MODEL"
        )
    if arguments.judge and not judged:
        raise UserError(f"--judge {arguments.judge}: no expectation of {path} needs a judge; leave it out")
    if arguments.judge_model and not arguments.judge:
        raise UserError("--judge-model: needs --judge")
    questions = question_messages(script, path)
    trained = locate_trained_weights(Path(arguments.model))
    from mmtune.data.encoding.encoding_checks import check_system_prompt
    from mmtune.evaluation.conversations.run_script import print_results, run_script, summarize_turns, write_turns

    ask = _judge(arguments) if arguments.judge else None
    processor, answer = _answerer(trained, script.max_new_tokens, str(arguments.model), arguments.trust_remote_code)
    for each in script.conversations:
        if each.system is not None:
            check_system_prompt(processor, each.system)
    turns = run_script(script, questions, answer, ask)
    summary = summarize_turns(turns)
    print_results(summary)
    if out is not None:
        with report_disk_errors(out):
            write_turns(turns, out)
        print(f"answers: {out}")
    if summary["failed"]:
        raise CheckFailed(f"{path}: {summary['failed']} of {summary['expectations']} expectations", summary)
    return summary


def _answerer(trained: Any, max_new_tokens: int, label: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The processor of a model, and a function that answers the last questions of samples with it."""
    from mmtune.data.encoding.encoding_checks import check_encoding
    from mmtune.evaluation.predictions.answering import generate_answers
    from mmtune.models.compute import to_best_device
    from mmtune.models.load import load_trained

    model, processor = load_trained(trained, trust_remote_code=trust_remote_code)
    check_encoding(processor)
    model = to_best_device(model)
    return processor, lambda samples: generate_answers(model, processor, samples, max_new_tokens, BATCH_SIZE, label)


def _judge(arguments: argparse.Namespace) -> Any:
    """The judge as a function from prompts to replies.

    Raises:
        UserError, CheckFailed: no engine answers, or the model cannot be loaded.
    """
    from mmtune.data.message import text_message

    if arguments.judge.startswith(("http://", "https://")):
        from mmtune.serving.engine_client import EngineClient, RequestRejected

        client = EngineClient(arguments.judge, arguments.judge_model, model_option="--judge-model")
        client.connect()

        def ask_engine(prompts: Sequence[str]) -> list[str]:
            try:
                return [client.ask([text_message("user", prompt)], MAX_REPLY_TOKENS).text for prompt in prompts]
            except RequestRejected as error:
                raise CheckFailed(f"{arguments.judge}: the judge rejects a question: {error}") from error

        return ask_engine
    if arguments.judge_model:
        raise UserError(f"--judge-model {arguments.judge_model}: needs the address of an engine as --judge")
    from mmtune.data.message import Sample
    from mmtune.data.templates.template import unanswered_turn
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights

    trained = locate_trained_weights(Path(arguments.judge))

    def ask_model(prompts: Sequence[str]) -> list[str]:
        _, answer = _answerer(trained, MAX_REPLY_TOKENS, "judging", arguments.trust_remote_code)
        turns = [[text_message("user", prompt), unanswered_turn()] for prompt in prompts]
        replies: list[str] = answer([Sample(f"judge {number}", each) for number, each in enumerate(turns)])
        return replies

    return ask_model
