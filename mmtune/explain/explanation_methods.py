"""The table of explanation methods, and the explanation of one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.encoding.answer_decoding import AnswerDecoder
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import Sample, text_message, text_of
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.explain.explained_inputs import ExplainedInputs, explained_inputs
from mmtune.explain.explanation import AnswerToken, CellScores, Explanation, PromptWord
from mmtune.explain.gradient_input import count_gradients, gradient_scores
from mmtune.explain.occlusion import count_occlusions, occlusion_scores
from mmtune.models.compute import in_eval_mode, move_batch, training_autocast
from mmtune.models.generation import generate

DEFAULT_METHOD, BATCH_SIZE = "occlusion", 8


@dataclass(frozen=True)
class ExplanationMethod:
    """A method that scores the cells of the images and the words of the prompt for each token of an answer.

    Attributes:
        scores: from model, processor, inputs, batch size and a function that gets each step, to the log-probability of each
            answer token, shape (tokens,), and the score of each cell and word, in nats, shape (cells + words, tokens).
        count: the number of its steps for the inputs.
        steps: what a step is.
    """

    scores: Callable[[nn.Module, ProcessorMixin, ExplainedInputs, int, Callable[[int], None]], tuple[torch.Tensor, torch.Tensor]]
    count: Callable[[ExplainedInputs], int]
    steps: str


EXPLANATION_METHODS: Mapping[str, ExplanationMethod] = {
    "occlusion": ExplanationMethod(occlusion_scores, count_occlusions, "forward passes"),
    "gradient_x_input": ExplanationMethod(gradient_scores, count_gradients, "backward passes"),
}


def explain(
    model: nn.Module,
    processor: ProcessorMixin,
    sample: Sample,
    method: str = DEFAULT_METHOD,
    grid: int | None = None,
    batch_size: int = BATCH_SIZE,
    report: Callable[[str], None] | None = None,
    generated: Sequence[int] | None = None,
    check: Callable[[], None] | None = None,
) -> Explanation:
    """Explain the last answer of a conversation, the model's own or any other.

    Args:
        model: with or without an adapter, quantized or not; it runs in eval mode, and its mode is restored.
        processor: its processor, with a chat template.
        sample: a conversation that ends with the answer.
        method: a key of `EXPLANATION_METHODS`.
        grid: cells along the longer side of each image; None: 8, or the pixels of a smaller image.
        batch_size: conversations in a forward pass; fewer for a long answer.
        report: called with the cost before it is paid, and with a difference from `generated`.
        generated: the tokens of the model's own answer, which can be others than those of its text.
        check: called between batches; an error that it raises ends the explanation.

    Raises:
        UserError: an empty answer, a grid that is too fine, or a method that does not work for the model.
        RowError: the conversation cannot be encoded.
    """
    inputs = explained_inputs(sample, processor, grid)
    chosen = EXPLANATION_METHODS[method]
    count = chosen.count(inputs)
    if report is not None:
        length = inputs.encoded["input_ids"].shape[1]
        steps = chosen.steps if count != 1 else chosen.steps.removesuffix("es")
        report(f"{count:,} {steps} of {length:,} tokens{_excess(model, length)}")
        if generated is not None and tuple(generated[: len(inputs.answer_ids)]) != inputs.answer_ids:
            report("the model generated other tokens, such as a space before the answer; those of training are explained")
    with EvaluationProgress("explaining", count, chosen.steps) as progress:

        def done(steps: int) -> None:
            progress.update(steps)
            if check is not None:
                check()

        log_probabilities, scores = chosen.scores(model, processor, inputs, batch_size, done)
    images, start = [], 0
    for image, (rows, columns) in zip(inputs.images, inputs.grids, strict=True):
        cells = scores[start : start + rows * columns].T.reshape(-1, rows, columns).numpy()
        images.append(CellScores(image.width, image.height, cells))
        start += rows * columns
    texts = _token_texts(processor, inputs.answer_ids)
    return Explanation(
        method,
        text_of(sample.messages[-1]),
        tuple(AnswerToken(*each) for each in zip(texts, log_probabilities.tolist(), strict=True)),
        tuple(images),
        tuple(PromptWord(word.text, tuple(scores[start + number].tolist())) for number, word in enumerate(inputs.words)),
    )


def _excess(model: Any, length: int) -> str:
    """What to add to the cost of a conversation that is longer than the model's maximum."""
    maximum = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(maximum, int) or length <= maximum:
        return ""
    return f"; the model was made for at most {maximum:,}"


def answer_to_explain(
    model: nn.Module, processor: ProcessorMixin, sample: Sample, max_new_tokens: int
) -> tuple[Sample, list[int]]:
    """The conversation with the model's greedy answer as its last message, without white space around it; and its tokens.

    Args:
        sample: a conversation that ends with a question.
    """
    prompt = encode_prompt(sample.id, sample.messages, processor, sample.tools)
    with torch.inference_mode(), in_eval_mode(model), training_autocast(model):
        [tokens] = generate(model, processor, move_batch(model, prompt), max_new_tokens).tolist()
    answer = AnswerDecoder(processor.tokenizer).decode(tokens).strip()
    return replace(sample, messages=[*sample.messages, text_message("assistant", answer)]), tokens


def _token_texts(processor: ProcessorMixin, ids: tuple[int, ...]) -> list[str]:
    """The text of each token: what it adds to the text of those before it.

    The last token of a character that is several tokens adds the character, the others a replacement character.
    """
    texts, before = [], ""
    for count in range(1, len(ids) + 1):
        text = str(processor.tokenizer.decode(list(ids[:count])))
        texts.append(text[len(before) :] if text.startswith(before) else str(processor.tokenizer.decode([ids[count - 1]])))
        before = text.rstrip("\ufffd")
    return texts
