"""Ask a model every held-out question and score the answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import collate
from mmtune.data.dataset import DataReport, IndexedSamples, check_rows, iterate_rows
from mmtune.data.encoding.encode import encode_prompt
from mmtune.data.message import RowError, Sample, split_question, text_of
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.evaluation.choices import check_choices, most_likely_choice, score_choices
from mmtune.evaluation.evaluation_progress import EvaluationProgress
from mmtune.evaluation.metrics import exact_match, final_answer, majority_accuracy, wilson_interval
from mmtune.models.compute import count_virtual_tokens, in_eval_mode, move_batch, training_autocast
from mmtune.models.generation import generate
from mmtune.recipe.recipe import EvaluateSection
from mmtune.utils.errors import RecipeValueError


@dataclass(frozen=True)
class Answer:
    """One question, what was expected and what came; of several sources, the name of the one it is from."""

    id: str
    task: str | None
    question: str
    images: tuple[str, ...]
    reference: str
    prediction: str
    correct: bool
    source: str | None = None

    @property
    def group(self) -> str:
        """Whose score the answer counts in: its task's, or that of its source where the row names no task."""
        return self.task or self.source or "untitled"


@dataclass(frozen=True)
class Score:
    """Exact match over a set of answers, with a 95% Wilson interval. `task` is the answers' `group`, or overall."""

    task: str
    questions: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    majority_accuracy: float


def generate_answers(
    model: nn.Module,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    max_new_tokens: int,
    batch_size: int,
    what: str = "answering",
) -> list[str]:
    """Greedy answers to the samples' last questions, in their order.

    Args:
        model: in any mode; it is put in eval mode and back.
        samples: conversations that end with the reference answer, which the model does not see.
        max_new_tokens: an answer is cut there.
        batch_size: questions answered at once; of equal length first, so that little is padded.
        what: is asked, for the progress that is shown.
    """
    tokenizer = processor.tokenizer
    answers: dict[int, str] = {}
    order = sorted(range(len(samples)), key=lambda index: sum(len(text_of(m)) for m in samples[index].messages[:-1]))
    starts = range(0, len(order), batch_size)
    with in_eval_mode(model), EvaluationProgress(what, len(order)) as progress:
        for start in starts:
            chosen = order[start : start + batch_size]
            prompts = {i: encode_prompt(samples[i].id, split_question(samples[i])[0], processor) for i in chosen}
            for group in _together(model, prompts):
                batch = move_batch(model, collate([prompts[i] for i in group], tokenizer.pad_token_id, side="left"))
                with torch.inference_mode(), training_autocast(model):
                    output = generate(model, processor, batch, max_new_tokens)
                texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
                answers.update(zip(group, texts, strict=True))
                progress.update(len(group))
    return [answers[index] for index in range(len(samples))]


def _together(model: nn.Module, prompts: dict[int, dict[str, torch.Tensor]]) -> list[list[int]]:
    """Which prompts share a batch: all, or with virtual tokens those of one length. PEFT puts these before the padding, so that
    a padded question would stand at another distance from them than the same question alone."""
    if not count_virtual_tokens(model):
        return [list(prompts)]
    lengths: dict[int, list[int]] = {}
    for index, prompt in prompts.items():
        lengths.setdefault(prompt["input_ids"].shape[1], []).append(index)
    return list(lengths.values())


def check_questions(section: EvaluateSection) -> None:
    """Read every held-out row and its images' headers, with no model.

    Raises:
        UserError: naming the rows that cannot be asked. A figure over fewer questions than announced would be another figure.
    """
    samples = IndexedSamples(section.data)
    report = DataReport(rows=len(samples))
    check_rows(samples, report, len(samples))
    for handle in samples.subset(len(samples)):
        try:
            split_question(handle())
        except RowError as error:
            report.add(error)
    if section.score == "choices" and not report.quarantined:
        for sample in iterate_rows(samples):
            check_choices(sample)
    if report.quarantined:
        raise RecipeValueError(
            "evaluate", f"{len(report.quarantined)} of {len(samples)} rows cannot be asked:\n{report.listing()}"
        )


def evaluate(
    model: nn.Module,
    processor: ProcessorMixin,
    section: EvaluateSection,
    dist: DistributedContext = SINGLE_PROCESS,
    what: str = "evaluating",
) -> list[Answer]:
    """Answer and score every question of the recipe's `evaluate` section.

    Several processes share the questions, and each has all the answers in the end. Under ZeRO-3, where a forward pass takes
    all of them, each asks them all.

    Raises:
        RowError: a held-out row that cannot be read.
    """
    rows = IndexedSamples(section.data)
    samples = list(iterate_rows(rows))
    mine = range(len(samples)) if dist.sharded else range(dist.rank, len(samples), dist.size)
    asked = [samples[index] for index in mine]
    said = _said(model, processor, asked, section, what)
    answered = dict(itertools.chain.from_iterable(dist.all_gather_object(list(zip(mine, said, strict=True)))))
    predictions = [answered[index] for index in range(len(samples))]
    answers = []
    for index, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
        question, reference = split_question(sample)
        concluded = final_answer(prediction, section.answer_after)
        accepted = (reference, *sample.references)
        correct = any(exact_match(concluded, final_answer(answer, section.answer_after)) for answer in accepted)
        answers.append(
            Answer(
                id=sample.id,
                task=sample.task,
                question=text_of(question[-1]),
                images=tuple(str(path) for path in sample.images),
                reference=reference,
                prediction=prediction.strip(),
                correct=correct,
                source=rows.names[rows.source_of(index)] if len(section.data) > 1 else None,
            )
        )
    return answers


def _said(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], section: EvaluateSection, what: str
) -> list[str]:
    """An answer to each sample, generated or chosen."""
    if section.score == "generate":
        return generate_answers(model, processor, samples, section.max_new_tokens, section.batch_size, what)
    scores = score_choices(model, processor, samples, section.batch_size, what)
    return [most_likely_choice(sample, of_it) for sample, of_it in zip(samples, scores, strict=True)]


def score(answers: Sequence[Answer], section: EvaluateSection) -> list[Score]:
    """Scores per task, or per source where rows name no task, in the order of their first question, and last `overall`."""
    names = list(dict.fromkeys(answer.group for answer in answers))
    groups = [(name, [answer for answer in answers if answer.group == name]) for name in names]
    if len(groups) == 1:
        groups = []
    return [_score(name, group, section.answer_after) for name, group in [*groups, ("overall", list(answers))]]


def _score(name: str, answers: Sequence[Answer], marker: str | None) -> Score:
    correct = sum(answer.correct for answer in answers)
    majority = majority_accuracy([final_answer(a.reference, marker) for a in answers], [a.group for a in answers])
    return Score(
        task=name,
        questions=len(answers),
        correct=correct,
        accuracy=correct / len(answers) if answers else 0.0,
        interval=wilson_interval(correct, len(answers)),
        majority_accuracy=majority,
    )


def write_answers(answers: Sequence[Answer], path: Path) -> None:
    """One JSON object a line, in the order asked."""
    path.write_text("".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers), encoding="utf-8")


def read_answers(path: Path) -> list[Answer]:
    """What `write_answers` wrote."""
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also split at U+0085 and U+2028, which answers may hold
        return [Answer(**{**row, "images": tuple(row["images"])}) for row in map(json.loads, lines)]


def scores_to_dicts(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Plain values, for a summary file."""
    return [asdict(item) for item in scores]
