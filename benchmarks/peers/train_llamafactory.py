"""The suite's training run in LLaMA-Factory: llamafactory.yaml with the options of the command line."""

from __future__ import annotations

from train_options import HERE, read_options

options = read_options()

import yaml  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

settings = yaml.safe_load((HERE / "llamafactory.yaml").read_text())
settings |= {
    "model_name_or_path": str(options.model),
    "dataset_dir": str(options.rows),
    "media_dir": str(options.rows),
    "output_dir": str(options.output),
    "max_steps": options.steps,
    "disable_gradient_checkpointing": not options.checkpointing,
    "disable_shuffling": options.in_order,
}
if options.method == "full":
    settings["finetuning_type"] = "full"
if options.method == "qlora":
    settings |= {"quantization_bit": 4, "quantization_method": "bnb"}
if options.packing:
    settings |= {"packing": True, "neat_packing": True, "per_device_train_batch_size": 2}
run_exp(settings)
