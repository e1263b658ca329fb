"""Verb `mmtune explain`: the image cells and the words that an answer rests on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.cli.verb_arguments import AddVerb, add_question_arguments, add_trust, check_question_arguments
from mmtune.console.library_output import configure_console
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    from mmtune.explain.explanation import Explanation

METHODS = ("occlusion", "gradient_x_input")
TOP_CELLS, TOP_WORDS = 3, 3


def add_explain_verb(verbs: Any, add: AddVerb) -> None:
    """Declare the verb.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "explain", _explain, "show which image cells and words an answer rests on")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run, a checkpoint of one, an adapter, a model or a hub id")
    add_question_arguments(verb)
    verb.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    verb.add_argument("--answer", metavar="TEXT", help="explain this answer instead of the model's own")
    help_text = "occlusion (default) or gradient_x_input (its first-order estimate, faster for a short answer)"
    verb.add_argument("--method", choices=METHODS, default=METHODS[0], help=help_text)
    help_text = "cells along the longer side of an image (default 8, or the pixels of a smaller image)"
    verb.add_argument("--grid", type=int, metavar="N", help=help_text)
    verb.add_argument("--batch-size", type=int, default=8, metavar="N", help="conversations in a forward pass (default 8)")
    verb.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="maximum length of the model's own answer (default 256)"
    )
    verb.add_argument("--out", metavar="FILE.html", help="also write a page with heat maps")
    add_trust(verb)


def _explain(arguments: argparse.Namespace) -> Any:
    from mmtune.chat.image_paths import resolve_image
    from mmtune.models.checkpoints.trained_weights import locate_trained_weights
    from mmtune.utils.files import check_writable

    out = None if arguments.out is None else Path(arguments.out)
    for name in ("grid", "batch_size", "max_new_tokens"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    window = check_question_arguments(arguments)
    if arguments.answer is not None and not arguments.answer.strip():
        raise UserError("--answer: expected a text, got an empty one")
    if out is not None:
        if out.suffix != ".html" or out.is_dir():
            raise UserError(f"--out {out}: expected a .html file")
        check_writable(out.absolute().parent, f"--out {out}: ")
    images = [resolve_image(image) for image in arguments.image]
    trained = locate_trained_weights(Path(arguments.model))
    configure_console()
    from mmtune.data.encoding.encoding_checks import check_encoding, check_system_prompt
    from mmtune.data.media.media import ImageView
    from mmtune.data.message import Message, Sample, text_message, text_of
    from mmtune.explain.explanation_methods import answer_to_explain, explain
    from mmtune.models.compute import to_best_device
    from mmtune.models.load import load_trained
    from mmtune.report.explanations.explanation_page import write_explanation

    model, processor = load_trained(trained, trust_remote_code=arguments.trust_remote_code)
    check_encoding(processor)
    blocks = [{"type": "image", "image": ImageView(image, window)} for image in images]
    messages: list[Message] = [{"role": "user", "content": [*blocks, {"type": "text", "text": arguments.prompt}]}]
    if arguments.system is not None:
        check_system_prompt(processor, arguments.system.strip())
        messages.insert(0, text_message("system", arguments.system.strip()))
    model = to_best_device(model)
    generated = None
    if arguments.answer is None:
        sample, generated = answer_to_explain(model, processor, Sample("explain", messages), arguments.max_new_tokens)
        if not text_of(sample.messages[-1]):
            raise UserError("the model's answer is empty; explain another one with --answer TEXT")
    else:
        sample = Sample("explain", [*messages, text_message("assistant", arguments.answer.strip())])
    explanation = explain(
        model,
        processor,
        sample,
        arguments.method,
        arguments.grid,
        arguments.batch_size,
        lambda line: print(f"{arguments.method}: {line}", file=sys.stderr, flush=True),
        generated,
    )
    print("\n".join(_lines(explanation)))
    if out is not None:
        write_explanation(explanation, sample.images, arguments.prompt, out)
        print(f"page: {out}")
    return explanation.to_dict()


def _lines(explanation: Explanation) -> Iterator[str]:
    """The answer, then for each of its tokens the cells and words with the largest positive scores."""
    from mmtune.explain.explanation import top_cells, top_words

    total = sum(token.log_probability for token in explanation.tokens)
    yield f"answer: {explanation.answer} (log-probability {total:.2f} nats)"
    for number, token in enumerate(explanation.tokens):
        parts = []
        for image_number, image in enumerate(explanation.images, start=1):
            cells = [
                f"{x1},{y1}-{x2},{y2} {score:+.2f} ({share:.0%})"
                for (x1, y1, x2, y2), score, share in top_cells(image, image.scores[number], TOP_CELLS)
            ]
            name = "image" if len(explanation.images) == 1 else f"image {image_number}"
            parts.append(f"{name}: {', '.join(cells) or 'no cell raises it'}")
        words = top_words(explanation.words, [word.scores[number] for word in explanation.words], TOP_WORDS)
        parts.append(f"words: {', '.join(f'{text} {score:+.2f}' for text, score in words) or 'no word raises it'}")
        yield f"{token.text.strip() or repr(token.text)} ({token.log_probability:.2f}): {'; '.join(parts)}"
