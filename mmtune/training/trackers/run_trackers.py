"""The trackers of a run: started with the Trainer, fed with results and sample answers, and finished however the run ends."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from mmtune.data.data_report import DataReport
from mmtune.data.media.media import Media
from mmtune.data.validation.issues import ISSUE_TYPES, DataIssueError
from mmtune.evaluation.answers import Answer, group_scores, scores_to_dicts
from mmtune.evaluation.answers_file import read_answers
from mmtune.evaluation.scores import format_score, group_rows, score_rows
from mmtune.evaluation.tasks import recipe_tasks
from mmtune.report.answer_cards import drawn_regions, images_of, is_right, select_answers, thumbnail
from mmtune.run_directory import RunDirectory, step_of
from mmtune.training.run_inputs import RunInputs
from mmtune.training.trackers.tensorboard_tracker import TensorBoardTracker
from mmtune.training.trackers.tracker import TrackedAnswer, TrackedRun, Tracker
from mmtune.training.trackers.trackio_tracker import TrackioTracker
from mmtune.training.trackers.wandb_tracker import WandbTracker
from mmtune.utils.files import read_record, replace_text

TRACKED_ANSWERS = 8
"""Held-out rows whose answers and images a tracker on this machine gets by default."""

_TRACKERS: dict[type[TrainerCallback], Any] = {
    TensorBoardCallback: TensorBoardTracker,
    TrackioCallback: TrackioTracker,
    WandbCallback: WandbTracker,
}


class RunTrackers(TrainerCallback):
    """The trackers of a run. The Trainer's own callbacks send its log; this sends the rest.

    A context manager: at its end each tracker is finished, as failed after an error or a signal. In processes other than the
    main one, and without `train.report_to`, it does nothing.

    Args:
        before: the answers of the base.
    """

    def __init__(self, inputs: RunInputs, run: RunDirectory, before: Sequence[Answer]) -> None:
        self._inputs = inputs
        self._run = run
        self._before = {answer.id: answer for answer in before}
        self._trackers: list[Tracker] = []
        self._pending: Sequence[Answer] = ()
        self._chosen: list[str] = []
        self._images: Mapping[str, Sequence[Media]] = {}

    def __enter__(self) -> RunTrackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish(failed=kind is not None)

    def finish(self, failed: bool) -> None:
        """Finish each tracker, if that has not been done."""
        with ExitStack() as stack:  # the others are finished too where one of them fails
            while self._trackers:
                stack.callback(self._trackers.pop().finish, failed)

    def start(self, trainer: Trainer) -> None:
        """Start or continue a run in each tracker, and print where it is.

        Raises:
            UserError: W&B cannot start a run.
        """
        if not self._inputs.dist.is_main_process:
            return
        checkpoint, record = self._inputs.checkpoint, self._run.trackers
        first_step = 0 if checkpoint is None else step_of(checkpoint)
        ids: dict[str, str] = read_record(record) if first_step and record.is_file() else {}
        for callback in [*trainer.callback_handler.callbacks]:
            if (kind := _TRACKERS.get(type(callback))) is None:
                continue
            tracker = kind(callback, TrackedRun(trainer, self._run, self._inputs.recipe, ids.get(kind.name), first_step))
            self._trackers.append(tracker)
            print(f"{tracker.name}: {tracker.started}")
            if tracker.run_id is not None:
                ids[tracker.name] = tracker.run_id
        if not self._trackers:
            return
        if ids:
            replace_text(record, json.dumps(ids) + "\n")
        section = self._inputs.recipe.evaluate
        withheld = [tracker.name for tracker in self._trackers if section and not self._answer_count(tracker)]
        if withheld:
            more = f"to send those of {TRACKED_ANSWERS} rows: evaluate.track_answers: {TRACKED_ANSWERS}"
            print(f"{', '.join(withheld)}: gets no answers and no images of held-out rows; {more}")
        trainer.add_callback(self)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send the scores of the base, as those of step 0."""
        section = self._inputs.recipe.evaluate
        if not self._before or section is None:
            return
        values = _score_values("scores", scores_to_dicts(group_scores([*self._before.values()])))
        for task in recipe_tasks(section):
            answers = read_answers(self._run.answers(f"before_{task.name}"))
            values |= _score_values(f"benchmarks/{task.name}", scores_to_dicts(group_scores(answers)))
        for tracker in self._trackers:
            tracker.log(values, 0)

    def add_answers(self, answers: Sequence[Answer]) -> None:
        """Take the answers of an evaluation while training, which are sent after its metrics."""
        self._pending = answers

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Send sample answers of the evaluation."""
        self._log_answers(self._pending, state.global_step)

    def add_results(self, summary: Mapping[str, Any], after: Sequence[Answer]) -> None:
        """Send the scores after tuning, sample answers, the counts of the data report, and the summary of the run.

        Args:
            summary: as in `summary.json`.
            after: the answers of the tuned model.
        """
        step = summary["steps"]
        scored = {"scores": summary, **{f"benchmarks/{name}": each for name, each in summary.get("tasks", {}).items()}}
        values: dict[str, float] = {}
        tables = {}
        for section, each in scored.items():
            if "tuned_scores" not in each:
                continue
            values |= _score_values(section, each["tuned_scores"])
            tables[f"{section}/table"] = score_rows(each)
            for groups in each.get("groups", ()):
                name = f"{section}/by_{groups['field']}"
                values |= _score_values(name, groups["scores"])
                tables[f"{name}/{groups['metric']}/table"] = group_rows(groups)
        tables["data_report"] = issue_rows(self._inputs.data_report)
        for tracker in self._trackers:
            tracker.log(values, step)
            for name, rows in tables.items():
                if rows:
                    tracker.log_table(name, rows, step)
            tracker.set_summary(_summary_values(summary), step)
        self._log_answers(after, step)

    def _answer_count(self, tracker: Tracker) -> int:
        section = self._inputs.recipe.evaluate
        assert section is not None
        count = section.track_answers
        return count if count is not None else TRACKED_ANSWERS * tracker.is_local

    def _log_answers(self, answers: Sequence[Answer], step: int) -> None:
        """Send the answers to the same rows each time: those chosen from the first evaluation."""
        section = self._inputs.recipe.evaluate
        receiving = [tracker for tracker in self._trackers if section and self._answer_count(tracker)]
        if section is None or not answers or not receiving:
            return
        if not self._chosen:
            chosen = select_answers(answers, self._answer_count(receiving[0]))
            self._chosen = [answer.id for answer in chosen]
            self._images = images_of(chosen, section.sources)
        shown = [self._tracked(answer) for answer in answers if answer.id in self._chosen]
        for tracker in receiving:
            tracker.log_answers("answers", shown, step)

    def _tracked(self, answer: Answer) -> TrackedAnswer:
        base = self._before.get(answer.id)
        drawn = drawn_regions(base, answer, ("base", "tuned"))
        images = []
        for media in self._images.get(answer.id, ()):
            try:
                images.append(thumbnail(media, drawn))
            except DataIssueError:  # the table then has no image
                continue
        return TrackedAnswer(
            row=answer.id,
            question=answer.question,
            reference=" | ".join(dict.fromkeys(answer.references)),
            base=None if base is None else base.prediction,
            answer=answer.prediction,
            right=is_right(answer),
            score=format_score(answer.score, answer.metric) if answer.parsed else "unparsed",
            images=tuple(images),
        )


def _score_values(section: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores by name, `SECTION/METRIC` overall and `SECTION/METRIC/GROUP`, and the bounds of their 95% intervals.

    The bounds of `scores/NAME` are `scores_95_low/NAME` and `scores_95_high/NAME`: trackers show the part before the first `/`
    as a section of its own.
    """
    values = {}
    for score in scores:
        group = "" if score["task"] == "overall" else f"/{score['task']}"
        head, _, rest = f"{section}/{score['metric']}{group}".partition("/")
        values[f"{head}/{rest}"] = score["score"]
        if score["interval"] is not None:
            low, high = score["interval"]
            values |= {f"{head}_95_low/{rest}": low, f"{head}_95_high/{rest}": high}
    return values


def _summary_values(summary: Mapping[str, Any]) -> dict[str, float | str]:
    """The numbers and names of `summary.json`; the bounds of an interval as `NAME_low` and `NAME_high`."""
    values: dict[str, float | str] = {}
    for name, value in summary.items():
        if isinstance(value, (int, float, str)):
            values[name] = value
        elif name.endswith("_interval") and value is not None:
            values |= dict(zip((f"{name}_low", f"{name}_high"), value, strict=True))
    for each in summary.get("comparison", ()):
        if each["task"] == "overall":
            values |= {f"difference_{each['metric']}": each["difference"], f"p_value_{each['metric']}": each["p_value"]}
    return values


def issue_rows(report: DataReport) -> list[dict[str, str]]:
    """The rows that were not used or were changed, counted. Their ids and contents stay in `data_report.json`."""
    counts = Counter(issue.issue for issue in report.quarantined)
    rows = [(f"quarantined: {name}", count, ISSUE_TYPES[name].fix) for name, count in counts.items()]
    limit = "raise data.max_tokens, or choose another data.over_length"
    rows += [
        ("dropped as too long", len(report.dropped_over_length), limit),
        ("media dropped or resized", len(report.media_changed), limit),
    ]
    return [{"issue": name, "rows": f"{count:,}", "what to do": fix} for name, count, fix in rows if count]
