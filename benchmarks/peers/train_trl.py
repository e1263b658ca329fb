"""The suite's training run in TRL's SFTTrainer, as in its example sft_vlm.py."""

from __future__ import annotations

from train_options import read_options

options = read_options()

import torch  # noqa: E402
from datasets import Image, List, load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

processor = AutoProcessor.from_pretrained(options.model)
quantization = None
if options.method == "qlora":
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped
    )
model = AutoModelForImageTextToText.from_pretrained(
    options.model, dtype=torch.float32, attn_implementation="sdpa", quantization_config=quantization
)
if options.method == "full":
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)

rows = load_dataset("json", data_files=str(options.rows / "trl.jsonl"), split="train")
rows = rows.map(
    lambda row: {
        "images": [str(options.rows / image) for image in row["images"]],
        # What group_by_length sorts by: the tokens of the images, and words.
        "length": 576 * len(row["images"])
        + sum(len((part["text"] or "").split()) for message in row["messages"] for part in message["content"]),
    }
).cast_column("images", List(Image()))

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_length=None,  # truncation can cut off image tokens (TRL's documentation)
        assistant_only_loss=True,
        packing=options.packing,
        gradient_checkpointing=options.checkpointing,  # its default is to checkpoint
        train_sampling_strategy="sequential" if options.in_order else "group_by_length",
        remove_unused_columns=False,  # keeps "length"
        dataloader_num_workers=1,
        bf16=False,
        use_cpu=True,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    processing_class=processor,
    peft_config=None
    if options.method == "full"
    else LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        task_type="CAUSAL_LM",
    ),
)
trainer.train()
