"""Verbs `mmtune predict` and `mmtune score`: answers to rows without answers, and a metric on answers made elsewhere."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import AddVerb, add_trust, check_jsonl
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import UserError
from mmtune.utils.hub import missing_path_message


def add_answer_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs that work on files of answers.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "predict", _predict, "answer rows without answers, and write them as rows to train on")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    verb.add_argument("data", metavar="FILE", help="a file of rows, or what else `path` of a source takes")
    verb.add_argument("--out", required=True, metavar="OUT.jsonl", help="the file to write, in the form of the template messages")
    verb.add_argument("--template", metavar="NAME", help="the data template of the rows (default: detected)")
    verb.add_argument(
        "--media-root", metavar="DIR", help="the folder that media paths are relative to (default: the folder of the file)"
    )
    verb.add_argument("--batch-size", type=int, default=16, metavar="N", help="answers per batch (default 16)")
    verb.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="maximum length of an answer (default 256)")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl, and discard an unfinished one")
    add_trust(verb)

    verb = add(verbs, "score", _score, "score answers that were made elsewhere")
    verb.add_argument(
        "data",
        metavar="FILE.jsonl",
        help="JSON Lines: `prediction`, `references`, optionally `id`, `cluster`, `task`, `source`, and what the metric needs",
    )
    verb.add_argument("--metric", required=True, metavar="NAME", help="a metric of docs/evaluation.md, or FILE.py:function")
    verb.add_argument(
        "--answer-after",
        metavar="TEXT",
        help="score only the text after this, in predictions and references (default: the lines' `answer_after`)",
    )


def _predict(arguments: argparse.Namespace) -> Any:
    from mmtune.data.templates.template import load_data_template
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights
    from mmtune.recipe.recipe import Source
    from mmtune.utils.files import check_writable, report_disk_errors
    from mmtune.utils.locks import locked

    out = Path(arguments.out)
    check_jsonl(out)
    if out.exists() and not arguments.overwrite:
        raise UserError(f"--out {out}: the file exists; give another one, or --overwrite to replace it")
    for name in ("batch_size", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    check_writable(out.absolute().parent, f"--out {out}: ")
    if arguments.template is not None:
        load_data_template(arguments.template)
    trained = locate_trained_weights(Path(arguments.model))
    configure_console()
    from mmtune.data.encoding.encoding_checks import check_encoding
    from mmtune.data.validation.validate import guess_template
    from mmtune.distributed.context import init_inference
    from mmtune.evaluation.predictions.decoding import DecodingSettings
    from mmtune.evaluation.predictions.predict_rows import UnansweredRows, parts_of, predict_rows
    from mmtune.models.checkpoints.weights_hash import hash_trained
    from mmtune.models.compute import to_best_device
    from mmtune.models.load import load_trained

    template = arguments.template or guess_template(arguments.data, answered=False)
    source = Source(path=arguments.data, template=template, media_root=arguments.media_root)
    if arguments.template is None:
        print(f"{arguments.data}: detected the data template {template}; --template NAME selects another")
    rows = UnansweredRows(source)
    dist = init_inference()
    model, processor = load_trained(trained, trust_remote_code=arguments.trust_remote_code)
    check_encoding(processor)
    weights = dist.broadcast_object(hash_trained(trained) if dist.is_main_process else None)
    job = {"model": weights or str(trained.path), "source": source.model_dump(mode="json")}
    decoding = DecodingSettings(arguments.max_new_tokens)
    with report_disk_errors(out), locked(out) if dist.is_main_process else nullcontext():
        if dist.is_main_process:
            out.parent.mkdir(parents=True, exist_ok=True)
            for path in parts_of(out) if arguments.overwrite else ():
                path.unlink()
        result = predict_rows(to_best_device(model), processor, rows, out, decoding, arguments.batch_size, job, dist)
    print(f"predicted: {out}: {result.rows:,} rows; train on them with {_as_source(result)}")
    if result.empty:
        shown = ", ".join(result.empty[:5]) + (", ..." if len(result.empty) > 5 else "")
        print(f"left out: {len(result.empty):,} rows with an empty answer, which cannot train: {shown}")
    if result.near_ties:
        print(f"{result.near_ties:,} answers are near ties: another batch size or number of processes can change them")
    return {**asdict(result), "path": str(out), "media_root": str(result.media_root)}


def _as_source(result: Any) -> str:
    """The source of a recipe that reads the predicted rows."""
    inside = result.media_root == result.path.parent.resolve()
    return f"{{path: {result.path}, template: messages{'' if inside else f', media_root: {result.media_root}'}}}"


def _score(arguments: argparse.Namespace) -> Any:
    from mmtune.evaluation.answers import group_scores, score_answers, scores_to_dicts
    from mmtune.evaluation.answers_file import read_answers
    from mmtune.evaluation.field_groups import field_groups
    from mmtune.evaluation.metrics.metric_table import find_metric
    from mmtune.evaluation.scores import print_scores
    from mmtune.run_directory import RunDirectory

    path = Path(arguments.data)
    if path.is_dir():
        file = RunDirectory(path).answers("after")
        hint = f"; did you mean {file}?" if file.is_file() else ""
        raise UserError(f"{path}: expected a file of answers, got a directory{hint}")
    if not path.exists():
        raise UserError(missing_path_message(str(path), "file of answers"))
    answers = score_answers(read_answers(path, find_metric(arguments.metric), arguments.answer_after))
    if not answers:
        raise UserError(f"{arguments.data}: expected one JSON object per line, got no line with text")
    scores, groups = scores_to_dicts(group_scores(answers)), field_groups(answers)
    print_scores({"tuned_scores": scores, "groups": groups}, column="score")
    return {
        "scores": scores,
        "groups": groups,
        "answers": [{"id": answer.id, "score": answer.score, "parsed": answer.parsed} for answer in answers],
    }
