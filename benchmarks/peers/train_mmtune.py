"""The suite's training run in mmtune: mmtune.yaml with the options of the command line."""

from __future__ import annotations

import sys

from train_options import HERE, read_options

options = read_options()

import yaml  # noqa: E402

from mmtune.cli.main import entry_point  # noqa: E402

recipe = yaml.safe_load((HERE / "mmtune.yaml").read_text())
recipe["model"]["base"] = str(options.model)
recipe["data"]["train"][0]["path"] = str(options.rows / "mmtune.json")
recipe["output_dir"] = str(options.output)
recipe["train"] |= {"max_steps": options.steps, "activation_checkpointing": options.checkpointing}
if options.in_order:
    recipe["train"]["train_sampling_strategy"] = "sequential"
if options.method == "full":
    recipe["tune"]["language"] = "full"
if options.method == "qlora":
    recipe["model"]["precision"] = "nf4"
if options.packing:
    recipe["data"] |= {"packing": True, "max_tokens": 4096}  # a batch is one pack
    del recipe["train"]["per_device_train_batch_size"], recipe["train"]["train_sampling_strategy"]
    recipe["train"]["gradient_accumulation_steps"] = 2
path = options.output.with_suffix(".yaml")
path.write_text(yaml.safe_dump(recipe))
sys.exit(entry_point(["train", str(path), "--overwrite"]))
