"""The memory estimate compared with measured peaks of real training steps.

    OMP_NUM_THREADS=1 python benchmarks/memory_estimate.py > benchmarks/results/memory_estimate_cpu.txt

Every case is a LLaVA with random weights, written as a checkpoint and trained for two steps by mmtune's trainer. On a CPU the
peak is that of torch's allocator, as its profiler records it; on CUDA it is `torch.cuda.max_memory_allocated`. oneDNN's
convolution of the patch embedding uses scratch memory that is not a tensor and differs between libraries: the ratio excludes it,
and the scratch column has its size.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import itertools
import platform
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PrinterCallback,
    ProgressCallback,
)
from transformers.utils import logging

from mmtune.data.batching.batch_sampler import Mixture, MixtureBatchSampler
from mmtune.data.batching.collate import Collator
from mmtune.data.data_report import DataReport
from mmtune.families.structure import find_components
from mmtune.models.load import load_weights
from mmtune.objectives.sft import SupervisedTuning
from mmtune.planning.memory import estimate_memory
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import LIBRARIES
from mmtune.training.callbacks import DisableInputRequireGrads
from mmtune.training.trainer import TuningTrainer
from mmtune.training.training_arguments import build_training_arguments
from mmtune.tuning.apply import apply_tuning, learning_rates

PATCH = 14
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vision": (64, 2), "image": 56, "text": (128, 2), "vocab": 512, "tokens": 64, "batch": 2},
    "small": {"vision": (128, 3), "image": 112, "text": (256, 4), "vocab": 2048, "tokens": 256, "batch": 4},
    "large": {"vision": (512, 6), "image": 224, "text": (768, 8), "vocab": 8192, "tokens": 384, "batch": 2},
}
TUNES: dict[str, dict[str, str]] = {
    "lora": {},
    "full": {"vision": "full", "projector": "full", "language": "full"},
    "projector": {"language": "frozen"},
}


def write_base(size: str, out: Path) -> Path:
    """A random LLaVA of a size in `SIZES`, as a checkpoint with an image processor."""
    numbers = SIZES[size]
    (vision, vision_layers), (text, text_layers) = numbers["vision"], numbers["text"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision,
            intermediate_size=4 * vision,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision // 32,
            image_size=numbers["image"],
            patch_size=PATCH,
            projection_dim=vision,
        ),
        text_config=LlamaConfig(
            vocab_size=numbers["vocab"],
            hidden_size=text,
            intermediate_size=text * 8 // 3 // 64 * 64,
            num_hidden_layers=text_layers,
            num_attention_heads=text // 32,
            num_key_value_heads=text // 64,
        ),
        image_token_index=5,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(out)
    side = {"height": numbers["image"], "width": numbers["image"]}
    CLIPImageProcessor(size={"shortest_edge": numbers["image"]}, crop_size=side).save_pretrained(out)
    return out


def make_recipe(base: Path, size: str, tune: str, precision: str, out: Path, **train: Any) -> Recipe:
    """A recipe of two steps."""
    settings = {"per_device_train_batch_size": SIZES[size]["batch"], "max_steps": 2, "disable_tqdm": True, **train}
    return Recipe.model_validate(
        {
            "model": {"base": str(base), "precision": precision},
            "tune": TUNES[tune],
            "data": {"train": [{"path": "none.json", "template": "llava"}]},
            "train": settings,
            "output_dir": str(out),
        }
    )


def measured_peak(recipe: Recipe, tokens: int, supervised: int | None = None) -> tuple[int, int]:
    """Peak memory of a real run of mmtune's trainer on random rows with one image.

    Returns:
        Peak bytes of all tensors, without and with scratch memory of the CPU's convolutions.
    """
    arguments = build_training_arguments(recipe)
    torch.manual_seed(0)
    model: Any = load_weights(str(recipe.model.base), recipe.model)
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    model.to(arguments.device)
    components = find_components(model)
    model = apply_tuning(model, components, recipe.tune)
    ids = torch.full((1, tokens), 7)
    ids[:, :patches] = model.config.image_token_index
    labels = ids.clone()
    labels[:, : tokens - min(supervised or tokens, tokens - patches)] = -100
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    row["pixel_values"] = torch.randn(1, 3, vision.image_size, vision.image_size)
    budget = recipe.data.tokens_per_batch
    in_batch = arguments.per_device_train_batch_size if budget is None else budget // tokens
    rows = 2 * in_batch * arguments.gradient_accumulation_steps
    trainer = TuningTrainer(
        model=model,
        args=arguments,
        train_dataset=[row] * rows,
        data_collator=Collator(0, packed=recipe.data.packing),
        callbacks=[DisableInputRequireGrads()],
        data_report=DataReport(rows=rows),
        objective=SupervisedTuning(recipe.objective),
        max_bad_fraction=0.0,
        learning_rates=learning_rates(model, components, recipe.tune, arguments.learning_rate),
        dummy_batch=row,
        batches=MixtureBatchSampler(
            Mixture.by_repeats([rows], [1.0]),
            seed=0,
            size=arguments.per_device_train_batch_size,
            lengths=np.full(rows, tokens),
            tokens=budget,
            packed=recipe.data.packing,
        ),
    )
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    gc.collect()
    if arguments.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return (torch.cuda.max_memory_allocated(),) * 2
    before = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    assert profiler.profiler is not None
    return _peaks(sum(before.values()), profiler.profiler.kineto_results.events())


def _peaks(before: int, events: list[Any]) -> tuple[int, int]:
    """The peak of the running total of allocations, outside convolutions and overall."""
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() in CONVOLUTIONS)
    starts = [start for start, _ in spans]
    live = outside = overall = before
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        overall = max(overall, live)
        span = bisect.bisect_right(starts, event.start_ns()) - 1
        if span < 0 or event.start_ns() > spans[span][1]:
            outside = max(outside, live)
    return outside, overall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "large"])
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16", "int8", "nf4"), default=["fp32", "bf16", "int8", "nf4"]
    )
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    print(f"{device}, Python {platform.python_version()}, " + ", ".join(f"{n} {metadata.version(n)}" for n in LIBRARIES))
    columns = f"{'size':6} {'tune':10} {'precision':10} {'ckpt':5} {'predicted MB':>13} {'measured MB':>12} {'ratio':>6}"
    print(f"\n{columns} {'scratch MB':>11} {'seconds':>8}  phase")
    with tempfile.TemporaryDirectory() as folder:
        for size in chosen.sizes:
            base = write_base(size, Path(folder, size))
            for tune, precision, checkpointing in itertools.product(TUNES, chosen.precisions, (False, True)):
                if precision in ("int8", "nf4") and tune == "full":
                    continue
                recipe = make_recipe(base, size, tune, precision, Path(folder, "run"), activation_checkpointing=checkpointing)
                tokens, start = SIZES[size]["tokens"], time.perf_counter()
                estimate = estimate_memory(recipe, tokens=tokens)
                seconds = time.perf_counter() - start
                measured, overall = measured_peak(recipe, tokens)
                case = f"{size:6} {tune:10} {precision:10} {'on' if checkpointing else 'off':5}"
                figures = f"{estimate.peak / 1e6:13.2f} {measured / 1e6:12.2f} {estimate.peak / measured:6.3f}"
                scratch = f"{(overall - measured) / 1e6:11.2f}"
                print(f"{case} {figures} {scratch} {seconds:8.1f}  {estimate.phase}", flush=True)


if __name__ == "__main__":
    main()
