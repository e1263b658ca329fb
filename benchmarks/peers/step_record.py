"""Step times, losses and token counts of a run, recorded alike in every program that trains with transformers' Trainer.

One JSON line per optimizer step: the time at its end (s since the epoch), the processor time until then (s, workers included),
samples, tokens with and without padding, supervised tokens, loss. The first line has the time at which training begins, before
the first batch is read, and the versions of the libraries.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "torchvision", "pillow", "numpy")


def count(batch: dict[str, Any]) -> dict[str, int]:
    """Samples and tokens of a batch. Every row of the fixture has one answer, so a sample is a span of supervised tokens."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    supervised = labels != -100
    starts = supervised[:, 1:] & ~supervised[:, :-1]
    is_padding_free = mask is None or mask.dim() != 2  # packed: block-diagonal, or no mask at all
    return {
        "samples": int(starts.sum() + supervised[:, 0].sum()),
        "supervised": int(supervised[:, 1:].sum()),
        "tokens": labels.numel() if is_padding_free else int((mask != 0).sum()),
        "padded": labels.numel(),
    }


def processor_seconds() -> float:
    """Processor time of this process, its data-loader workers, and the children that have ended."""
    process = psutil.Process()
    return sum(process.cpu_times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))


def record_steps(path: Path) -> None:
    """Let every Trainer that is built from now on write its steps to `path`."""
    from transformers import Trainer, TrainerCallback

    counts: list[dict[str, Any]] = []

    def write(line: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            path.unlink(missing_ok=True)
            versions = {}
            for library in LIBRARIES:
                try:
                    versions[library] = importlib.metadata.version(library)
                except importlib.metadata.PackageNotFoundError:
                    continue
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            quantized = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
            write({"begin": time.time(), "versions": versions, "trainable": trainable, "quantized_layers": quantized})

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            line = {key: sum(each[key] for each in counts) for key in ("samples", "supervised", "tokens", "padded")}
            loss = sum(float(each["loss"]) for each in counts)
            counts.clear()
            write({"step": state.global_step, "time": time.time(), "processor": processor_seconds(), **line, "loss": loss})

    plain_init, plain_step = Trainer.__init__, Trainer.training_step

    @functools.wraps(plain_init)  # ms-swift reads the signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        self.add_callback(Recorder())

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counted = count(inputs)
        loss = plain_step(self, model, inputs, *args, **kwargs)
        counts.append({**counted, "loss": loss.detach()})
        return loss

    Trainer.__init__, Trainer.training_step = init, training_step
