"""Throughput of packed rows compared with padded batches: tokens per second of the same training step on the same samples.

Lengths resemble LLaVA's instruction data: most samples have an image and a short or medium conversation, a few are long and text
only. All lengths are scaled down by nine for the CPU: an image has 64 tokens instead of 576, and rows of 512 tokens at width 512
represent rows of 4,608 at width 4,608. Four kinds of batches take turns:

* padded: batches in random order, padded to their longest sample;
* similar: the same, with samples of similar length together;
* packed: rows filled up to a token budget, with the attention of each sample computed alone, as mmtune trains;
* masked: the same rows, with attention over the full row under a mask, as transformers computes them by itself.

Only the samples' own tokens are counted, so padding lowers the throughput. Time is CPU time of the process, which other processes
affect little.

Usage: python benchmarks/packing_step.py [--samples 64] [--batch 4] [--budget 512] [--width 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import time
from typing import Any

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration  # noqa: E402

from mmtune.data.batching.collate import collate, pack  # noqa: E402
from mmtune.models.packed_attention import attention_by_sample, packed_inputs  # noqa: E402
from mmtune.objectives.sft import score_supervised_only  # noqa: E402

IMAGE, IMAGE_TOKENS, VOCABULARY = 3, 64, 4096
Encoded = dict[str, torch.Tensor]


def build(width: int) -> Any:
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=112, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    return get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*_proj")).train()


def draw(count: int) -> list[Encoded]:
    """Samples with lognormal text lengths: median 24 tokens with an image, 100 in the one of sixteen without."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(count):
        with_image = number % 16 != 7
        median, longest = (24, 163) if with_image else (100, 228)
        length = int((median * torch.exp(0.8 * torch.randn((), generator=generator))).clamp(8, longest))
        ids = torch.randint(10, VOCABULARY, (1, length), generator=generator)
        if with_image:
            ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE), ids], dim=1)
        labels = ids.clone()
        labels[:, : -(length // 2)] = -100
        sample = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        samples.append(sample | ({"pixel_values": torch.randn(1, 3, 112, 112, generator=generator)} if with_image else {}))
    return samples


def tokens(samples: list[Encoded]) -> int:
    return sum(sample["input_ids"].shape[1] for sample in samples)


def rows(samples: list[Encoded], budget: int) -> list[list[Encoded]]:
    """First-fit decreasing: longest first, each into the first row with enough room."""
    filled: list[list[Encoded]] = []
    for sample in sorted(samples, key=lambda sample: -sample["input_ids"].shape[1]):
        row = next((row for row in filled if tokens(row) + tokens([sample]) <= budget), None)
        if row is None:
            filled.append([sample])
        else:
            row.append(sample)
    return filled


def epoch(model: Any, batches: list[Encoded], by_sample: bool) -> float:
    """CPU seconds of a forward and backward pass over every batch."""
    start = time.process_time()
    with attention_by_sample() if by_sample else contextlib.nullcontext():
        for batch in batches:
            model.zero_grad()
            model(**score_supervised_only(packed_inputs(model, batch))).loss.backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Padded batches against packed rows.")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model, samples = build(arguments.width), draw(arguments.samples)
    whole = tokens(samples)

    def padded(order: list[Encoded]) -> list[Encoded]:
        groups = [order[start : start + arguments.batch] for start in range(0, len(order), arguments.batch)]
        return [collate(group, pad_token_id=0) for group in groups]

    ways: dict[str, list[Encoded]] = {
        "padded": padded(samples),
        "similar": padded(sorted(samples, key=lambda sample: sample["input_ids"].shape[1])),
        "packed": [pack(row) for row in rows(samples, arguments.budget)],
    }
    ways["masked"] = ways["packed"]
    computed = {way: sum(batch["input_ids"].numel() for batch in batches) for way, batches in ways.items()}
    room = len(ways["packed"]) * arguments.budget
    print(
        f"CPU ({platform.machine()}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}), "
        f"torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{arguments.samples} samples, {whole:,} tokens, width {arguments.width}; "
        f"padded batches of {arguments.batch}, rows of {arguments.budget} ({whole / room:.1%} of the budget filled)"
    )
    for way in ways:
        epoch(model, ways[way], way == "packed")
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            times[way].append(epoch(model, ways[way], way == "packed"))
    for way in ways:
        ratio = statistics.median(one / two for one, two in zip(times["padded"], times[way], strict=True))
        print(
            f"{way:8} {whole / statistics.median(times[way]):7,.0f} tokens/s  {computed[way]:7,} positions computed  "
            f"{len(ways[way]):3} batches  {ratio:.2f}x padded (median of {arguments.rounds} rounds)"
        )


if __name__ == "__main__":
    main()
