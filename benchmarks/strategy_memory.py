"""GPU memory of training LLaVA-1.5 7B and 13B, by tuning, parallelism strategy and number of GPUs: the table of docs/scale.md.

    python benchmarks/strategy_memory.py > benchmarks/results/strategy_memory.txt

Nothing is downloaded and nothing trains: configurations are built from the published numbers, and mmtune's memory estimate is
divided among devices as `mmtune plan --processes` does. benchmarks/memory_estimate.py compares the estimate for one device with
measured steps; the division is arithmetic and was not compared with GPUs.
"""

from __future__ import annotations

import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

from mmtune.planning.memory import estimate_memory
from mmtune.planning.sharded_memory import STRATEGIES, per_device
from mmtune.recipe.recipe import Recipe

LANGUAGES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
LORA = {"language": {"method": "lora", "r": 128, "lora_alpha": 256, "target_modules": "all-linear"}}
TUNINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r 128, nf4": ("nf4", LORA),
    "LoRA r 128, bf16": ("bf16", LORA),
    "full, bf16": ("bf16", {"language": "full"}),
}
DEVICES = (1, 2, 8)
TOKENS, ANSWER, BATCH = 1024, 256, 4


def write_base(size: str, out: Path) -> Path:
    """LLaVA-1.5's configuration, with the language model's size."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, **LANGUAGES[size])
    LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000).save_pretrained(out)
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(out)
    return out


def recipe_for(base: Path, precision: str, tune: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"base": str(base), "precision": precision},
            "tune": {"vision": "frozen", "projector": "full", **tune},
            "data": {"train": [{"path": "rows.json", "template": "llava"}]},
            "train": {
                "per_device_train_batch_size": BATCH,
                "activation_checkpointing": True,
                "max_steps": 1,
            },
            "output_dir": "run",
        }
    )


def main() -> None:
    print(f"GB (10^9 bytes) of each GPU at the peak of a step, CUDA context and fragmentation included: batch {BATCH} per GPU,")
    print(
        f"{TOKENS} tokens per sample with one image of 336 pixels, {ANSWER} of them supervised, activation checkpointing, AdamW"
    )
    print("mmtune " + ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft")))
    cells = [(strategy, devices) for devices in DEVICES for strategy in (STRATEGIES if devices > 1 else ("one",))]
    print(f"{'model':6}{'tuning':18}" + "".join(f"{f'{strategy} x{devices}':>11}" for strategy, devices in cells))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for size in LANGUAGES:
            base = write_base(size, Path(place) / size)
            for tuning, (precision, tune) in TUNINGS.items():
                estimate = estimate_memory(recipe_for(base, precision, tune), tokens=TOKENS, supervised=ANSWER)
                row = [per_device(estimate, strategy, devices) for strategy, devices in cells]
                figures[f"{size} {tuning}"] = estimate.as_json()
                print(f"{size:6}{tuning:18}" + "".join(f"{(each.peak + each.overhead) / 1e9:>11.1f}" for each in row))
    print("\nOne device, in bytes:")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
