"""What a run shows and keeps while it trains: the progress line, `metrics.jsonl`, the loss curve."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

from peft import AdaLoraModel
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmtune.errors import CheckFailed
from mmtune.world import World


class RecordMetrics(TrainerCallback):
    """Appends every log of the Trainer to `metrics.jsonl`, with the time and the rate of tokens, and shows it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bar: tqdm[Any] | None = None
        self._start = 0.0
        self._tokens_seen = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start = self._last = time.perf_counter()
        self._first_step, self._tokens_seen = state.global_step, float(state.num_input_tokens_seen)
        if state.is_world_process_zero:
            self._path.touch()
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True)

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
            self._record(args, state, logs)
        if not math.isfinite(logs["loss"]):  # the mean over the processes, so that all of them end
            raise CheckFailed(
                f"the loss is {logs['loss']} at step {state.global_step}; lower the learning rate or look at the data"
            )

    def _record(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> None:
        now = time.perf_counter()
        tokens = float(state.num_input_tokens_seen)
        record = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": int(tokens),
            "tokens_per_second": round((tokens - self._tokens_seen) / max(now - self._last, 1e-9), 1),
            "seconds": round(now - self._start, 3),
            **{name: value for name, value in logs.items() if name.startswith("loss/")},
        }
        self._last, self._tokens_seen = now, tokens
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        elif not args.disable_tqdm:
            done = max(state.global_step - self._first_step, 1)
            left = (now - self._start) / done * (state.max_steps - state.global_step)
            print(f"step {state.global_step}/{state.max_steps}  {shown}  {left:.0f} s left", flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class FrozenInputsStayFrozen(TrainerCallback):
    """Undoes what gradient checkpointing does to frozen inputs.

    Enabling checkpointing on a PEFT model hooks every embedding, the vision tower's patch embedding included, to require
    gradients; the backward pass then runs through a frozen tower for nothing. Non-reentrant checkpointing needs no hook.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.disable_input_require_grads()


class MoveRanks(TrainerCallback):
    """AdaLoRA's step: ranks move by the importance of the gradients that the optimizer has just used."""

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tuner = getattr(kwargs["model"], "base_model", None)
        if isinstance(tuner, AdaLoraModel):
            tuner.update_and_allocate(state.global_step)


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end the run after the present step, with a checkpoint; a second one ends it at once.

    Args:
        world: the processes, all of which stop when one is asked to.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._before: dict[int, Any] = {}
        self.received: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame: object) -> None:
        self.received = number
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whom they had belonged."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._world.any(self.received is not None, args.device):
            self.received = self.received or signal.SIGTERM
            control.should_save = not self._world.fsdp
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
