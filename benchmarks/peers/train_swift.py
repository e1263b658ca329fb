"""The suite's training run in ms-swift: swift.yaml with the options of the command line."""

from __future__ import annotations

import os

from train_options import HERE, read_options

options = read_options()
os.environ["ROOT_IMAGE_DIR"] = str(options.rows)

import yaml  # noqa: E402
from swift.pipelines import sft_main  # noqa: E402

settings = yaml.safe_load((HERE / "swift.yaml").read_text())
settings |= {
    "model": str(options.model),
    "dataset": str(options.rows / "swift.jsonl"),
    "output_dir": str(options.output),
    "max_steps": options.steps,
    "gradient_checkpointing": options.checkpointing,
}
if options.in_order:
    settings |= {"dataset_shuffle": False, "train_dataloader_shuffle": False, "group_by_length": False}
if options.method == "full":
    settings["tuner_type"] = "full"
if options.method == "qlora":
    settings |= {"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_compute_dtype": "float32"}
if options.packing:
    settings |= {"packing": True, "group_by_length": False, "per_device_train_batch_size": 2}
sft_main(
    [
        part
        for key, value in settings.items()
        for part in (f"--{key}", str(value).lower() if value in (True, False) else str(value))
    ]
)
