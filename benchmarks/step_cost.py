"""Time of a training step compared with plain transformers and PEFT on the same model and batch.

Two optimizations are measured, each in alternation with the plain step:

* logits at supervised positions only; the plain step computes them at every position;
* with activation checkpointing, no backward pass through a frozen vision tower; PEFT's input hooks send gradients through it.

Usage: python benchmarks/step_cost.py [--steps 7] [--vocabulary 32000] [--length 256] [--batch 4]
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmtune.objectives.sft import score_supervised_only

ANSWER = 0.15  # share of the text that is supervised


def build(vocabulary: int) -> torch.nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, image_size=112, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    targets = r".*language_model.*_proj"
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets, modules_to_save=["multi_modal_projector"]))


def make_batch(size: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = (112 // 14) ** 2
    input_ids = torch.randint(10, vocabulary, (size, images + length), generator=generator)
    input_ids[:, :images] = 3
    labels = torch.full_like(input_ids, -100)
    answer = int(length * ANSWER)
    labels[:, -answer:] = input_ids[:, -answer:]
    pixels = torch.randn(size, 3, 112, 112, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], supervised_only: bool) -> float:
    model.zero_grad()
    loss = model(**(score_supervised_only(batch) if supervised_only else batch)).loss
    loss.backward()
    return float(loss)


def compare(name: str, ours: Callable[[], float], plain: Callable[[], float], steps: int) -> None:
    ours(), plain()
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    losses = {}
    for _ in range(steps):
        for kind, run in (("ours", ours), ("plain", plain)):
            gc.collect()
            start = time.perf_counter()
            losses[kind] = run()
            times[kind].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
    print(
        f"{name:36} ours {statistics.median(times['ours']):.3f} s  plain {statistics.median(times['plain']):.3f} s  "
        f"ratio {ratio:.2f} (median of {steps} pairs)  losses differ by {abs(losses['ours'] - losses['plain']):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}"
    )
    print(f"batch {arguments.batch} x (64 image + {arguments.length} text tokens), vocabulary {arguments.vocabulary:,}")
    batch = make_batch(arguments.batch, arguments.length, arguments.vocabulary)
    model = build(arguments.vocabulary).train()
    compare("supervised logits only", lambda: step(model, batch, True), lambda: step(model, batch, False), arguments.steps)

    hooked, free = build(arguments.vocabulary).train(), build(arguments.vocabulary).train()
    for each in (hooked, free):
        each.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    hooked.enable_input_require_grads()
    free.disable_input_require_grads()
    compare(
        "checkpointing, frozen tower skipped",
        lambda: step(free, batch, True),
        lambda: step(hooked, batch, True),
        arguments.steps,
    )
    print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
