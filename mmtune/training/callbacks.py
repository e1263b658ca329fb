"""Trainer callbacks: progress line, `metrics.jsonl`, the live report, stopping on signals."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.distributed.context import DistributedContext
from mmtune.evaluation.metrics.metric_table import is_held_out_loss
from mmtune.report.live_report import LiveReport
from mmtune.training.throughput.progress import format_duration
from mmtune.utils.errors import CheckFailed, Stopped
from mmtune.utils.files import report_disk_errors

EVALUATION_SPEED = ("eval_runtime", "eval_samples_per_second")
MIN_CPU_WAIT = 0.1
"""From this fraction of the time on, the progress line shows the wait for CPU."""


BAR = 6
"""Width of the bar in the progress line, in columns."""


class RecordMetrics(TrainerCallback):
    """Appends every log of the Trainer to `metrics.jsonl` and shows it on the terminal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.touch()
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            bar_format = f"{{n_fmt}}/{{total_fmt}} |{{bar:{BAR}}}|{{postfix}}"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=bar_format, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps:  # always log the last step
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not logs.keys() & {"loss", "eval_loss"}:
            return
        if state.is_world_process_zero:
            with report_disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            if "eval_loss" in logs:
                if not args.disable_tqdm:
                    tqdm.write(f"step {state.global_step}/{state.max_steps}  {evaluation_line(logs)}")
            elif self._bar is not None:
                self._bar.set_postfix_str(progress_line(logs, _room(self._bar)))
            elif not args.disable_tqdm:
                print(f"step {state.global_step}/{state.max_steps}  {progress_line(logs)}", flush=True)
        if not math.isfinite(logs.get("loss", 0.0)):  # the mean over all processes, so all of them stop
            raise CheckFailed(
                f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate or look at the data"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class UpdateReport(TrainerCallback):
    """Writes the report of the run while it trains, with what is in `metrics.jsonl` so far. Only the main process has it."""

    def __init__(self, report: LiveReport) -> None:
        self._report = report

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report.write(f"Training begins: {state.max_steps - state.global_step:,} steps.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._report.is_due:
            left = next((log["seconds_left"] for log in reversed(state.log_history) if "seconds_left" in log), None)
            more = "" if left is None else f", {format_duration(left)} left at the last log"
            self._report.write(f"Training: step {state.global_step:,} of {state.max_steps:,}{more}.")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report.write(f"Trained {state.global_step:,} steps; what follows is the export and the evaluation.")


def _room(bar: tqdm[Any]) -> int | None:
    """Columns of the terminal beside the bar and the step count; None if the width of the terminal is unknown."""
    columns = bar.format_dict["ncols"]
    return columns - len(f"{bar.total}/{bar.total} |{'#' * BAR}|, ") if columns else None


def progress_line(logs: dict[str, Any], room: int | None = None) -> str:
    """The metrics of a log in one line, the most important first.

    Args:
        room: the maximum number of characters; the last metrics are left out if they do not fit.
    """
    memory = logs.get("accelerator_memory_mb") or logs["resident_memory_mb"]
    metrics = [
        f"{format_duration(logs['seconds_left'])} left",
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.1e}",
        *([f"CPU wait {logs['cpu_wait']:.0%}"] if logs.get("cpu_wait", 0) >= MIN_CPU_WAIT else []),
        f"{logs['tokens_per_second']:,.0f} tokens/s",
        f"{memory / 1e3:.1f} GB",
        f"data wait {logs['data_wait']:.0%}",
        *([f"MFU {logs['mfu']:.0%}"] if "mfu" in logs else []),
    ]
    while room is not None and len(metrics) > 1 and len("  ".join(metrics)) > room:
        metrics.pop()
    return "  ".join(metrics)


def is_loss_or_speed(name: str) -> bool:
    """Whether a metric of an evaluation is a loss or a speed, not a score of answers."""
    return is_held_out_loss(name.removeprefix("eval_")) or name in EVALUATION_SPEED


def evaluation_line(logs: dict[str, Any]) -> str:
    """The metrics of an evaluation in one line."""
    named = [f"{name} {value:.4f}" for name, value in logs.items() if name.startswith("eval_") and name not in EVALUATION_SPEED]
    return "  ".join([*named, f"in {format_duration(logs['eval_runtime'])}"])


def early_stopping(train: Mapping[str, Any]) -> list[TrainerCallback]:
    """The callback of `early_stopping_patience`, if a recipe's `train` section has it."""
    patience = train.get("early_stopping_patience")
    return [] if patience is None else [StopEarly(patience, train.get("early_stopping_threshold", 0.0))]


class StopEarly(EarlyStoppingCallback):
    """transformers' EarlyStoppingCallback, whose counter is that of the checkpoint in a resumed run."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        attributes = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = attributes["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:  # the run was killed after its last step
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.is_world_process_zero:
            count, metric = self.early_stopping_patience_counter, args.metric_for_best_model
            print(f"stopped early: {metric} did not improve in {count} evaluations", flush=True)


class DisableInputRequireGrads(TrainerCallback):
    """Removes the hooks of gradient checkpointing on frozen inputs.

    When checkpointing is enabled, PEFT makes the outputs of every embedding require gradients, also of the patch embedding, so
    that the backward pass runs through a frozen vision tower. Non-reentrant checkpointing does not need this.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.disable_input_require_grads()


REPEAT_S = 2.0
"""Signals within this time count as one: a scheduler and the launcher may both send it to a process."""


STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP and SIGINT stop the run after the current step, with a checkpoint. A second signal stops it at once.

    Args:
        dist: all processes stop when one receives a signal.
    """

    def __init__(self, dist: DistributedContext) -> None:
        self._dist = dist
        self._previous: dict[int, Any] = {}
        self._received_at = 0.0
        self.received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ignored = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_IGN]  # as SIGHUP under nohup
        self._previous = {number: signal.signal(number, self._receive) for number in STOPPING if number not in ignored}

    def _receive(self, number: int, frame: object) -> None:
        if not self._received_at:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > REPEAT_S:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def raise_if_received(self, step: int) -> None:
        """Raise Stopped if a signal stopped the training.

        Raises:
            Stopped: training stopped after `step`.
        """
        if self.received is not None:
            name = signal.Signals(self.received).name
            hint = "FSDP2 has no checkpoints" if self._dist.fsdp else "--resume continues from there"
            raise Stopped(self.received, f"by {name} after step {step}; {hint}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)  # a signal during the evaluation; without another step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._dist.any_rank(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is None:
            return
        control.should_save = not self._dist.fsdp  # here, after every evaluation of the step
        if state.epoch is not None and state.epoch % 1:  # the Trainer leaves the epoch early, where it would not evaluate
            control.should_evaluate = False
