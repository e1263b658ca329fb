"""What a run shows and keeps while it trains: the progress line, `metrics.jsonl`, the loss curve."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.distributed.context import DistributedContext
from mmtune.training.throughput.progress import as_time
from mmtune.utils.errors import CheckFailed, Stopped
from mmtune.utils.files import report_disk_errors

MUCH_CPU_WAIT = 0.1
"""From this share of the time on, the progress line says that a process waited for a core."""


BAR = 6
"""Columns of the bar in the progress line."""


class RecordMetrics(TrainerCallback):
    """Appends every log of the Trainer to `metrics.jsonl`, and shows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._path.touch()
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            layout = f"{{n_fmt}}/{{total_fmt}} |{{bar:{BAR}}}|{{postfix}}"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=layout, dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if state.global_step >= state.max_steps:  # the last loss is kept, whatever `logging_steps` divides
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if state.is_world_process_zero:
            with report_disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            if self._bar is not None:
                self._bar.set_postfix_str(progress_line(logs, _room(self._bar)))
            elif not args.disable_tqdm:
                print(f"step {state.global_step}/{state.max_steps}  {progress_line(logs)}", flush=True)
        if not math.isfinite(logs["loss"]):  # the mean over the processes, so that all of them end
            raise CheckFailed(
                f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate or look at the data"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def _room(bar: tqdm[Any]) -> int | None:
    """Columns of the terminal that the bar and the step count leave; None where the terminal does not tell its width."""
    columns = bar.format_dict["ncols"]
    return columns - len(f"{bar.total}/{bar.total} |{'#' * BAR}|, ") if columns else None


def progress_line(logs: dict[str, Any], room: int | None = None) -> str:
    """A log's figures in one line, those of most value first.

    Args:
        room: how many characters there are; figures that do not fit are left out, from the last one on.
    """
    memory = logs.get("accelerator_memory_mb") or logs["resident_memory_mb"]
    figures = [
        f"{as_time(logs['seconds_left'])} left",
        f"loss {logs['loss']:.4f}",
        f"lr {logs['learning_rate']:.1e}",
        *([f"waits for CPU {logs['cpu_wait']:.0%} of the time"] if logs.get("cpu_wait", 0) >= MUCH_CPU_WAIT else []),
        f"{logs['tokens_per_second']:,.0f} tokens/s",
        f"{memory / 1e3:.1f} GB",
        f"wait {logs['data_wait']:.0%}",
        *([f"MFU {logs['mfu']:.0%}"] if "mfu" in logs else []),
    ]
    while room is not None and len(figures) > 1 and len("  ".join(figures)) > room:
        figures.pop()
    return "  ".join(figures)


class DisableInputRequireGrads(TrainerCallback):
    """Undoes what gradient checkpointing does to frozen inputs.

    Enabling checkpointing on a PEFT model hooks every embedding, the vision tower's patch embedding included, to require
    gradients; the backward pass then runs through a frozen tower for nothing. Non-reentrant checkpointing needs no hook.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.disable_input_require_grads()


ECHO_S = 2.0
"""A scheduler may send a signal to each process of a job, and the launcher again to those it has started."""


STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """SIGTERM, SIGHUP and SIGINT stop the run after the current step, with a checkpoint; a second one, `ECHO_S` later, at once.

    Args:
        dist: the processes, all of which stop when one gets the signal.
    """

    def __init__(self, dist: DistributedContext) -> None:
        self._dist = dist
        self._before: dict[int, Any] = {}
        self._since = 0.0
        self.received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ignored = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_IGN]  # as SIGHUP under nohup
        self._before = {number: signal.signal(number, self._receive) for number in STOPPING if number not in ignored}

    def _receive(self, number: int, frame: object) -> None:
        if not self._since:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO_S:
            self.restore()
            signal.raise_signal(number)

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def raise_if_received(self, step: int) -> None:
        """
        Raises:
            Stopped: a signal ended training after `step`.
        """
        if self.received is not None:
            name = signal.Signals(self.received).name
            advice = "under FSDP2 there is no checkpoint" if self._dist.fsdp else "--resume continues from there"
            raise Stopped(self.received, f"by {name} after step {step}; {advice}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._dist.any_rank(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM
            control.should_save = not self._dist.fsdp
            control.should_training_stop = True


def draw_loss_curve(metrics: Path, out: Path) -> None:
    """Draw the training loss of a `metrics.jsonl` over steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    dot = "." if len(records) == 1 else None  # a line of one point would not be seen
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="#1f6feb", linewidth=1.5, marker=dot)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=144)
