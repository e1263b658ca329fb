"""Names that other toolkits use for settings, methods and values, and what to write in a recipe instead."""

from __future__ import annotations

from collections.abc import Mapping

from mmtune.methods.method_table import METHODS

_LANGUAGE = "tune.language."
OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "model_id", "base_model", "pretrained_model_name_or_path"), "model.base"
    ),
    **dict.fromkeys(("dtype", "torch_dtype", "quantization_bit", "quant_bits", "bits"), "model.precision"),
    **dict.fromkeys(("quantization_config", "quantization_type", "bnb_4bit_quant_type", "quant_type"), "model.precision"),
    **dict.fromkeys(("load_in_4bit", "load_4bit"), "model.precision: nf4"),
    **dict.fromkeys(("load_in_8bit", "load_8bit"), "model.precision: int8"),
    "vision_tower": "model.vision",
    "mm_projector_type": "model.projector.type",
    "pretrain_mm_mlp_adapter": "model.projector.weights",
    "mm_vision_select_layer": "model.vision_feature_layer",
    "mm_vision_select_feature": "model.vision_feature_select_strategy",
    "chat_template_path": "model.chat_template",
    **dict.fromkeys(("flash_attn", "flash_attention", "attn_impl", "use_flash_attention_2"), "model.attn_implementation"),
    **dict.fromkeys(("finetuning_type", "adapter", "peft_type", "tuner_type", "train_type", "sft_type"), _LANGUAGE + "method"),
    **{name: _LANGUAGE + setting for method in METHODS.values() for name, setting in method.other_keys.items()},
    **dict.fromkeys(
        ("router_aux_loss_coef", "moe_aux_loss_coef", "moe_aux_loss_coeff", "output_router_logits"),
        "objective.router_aux_loss_coef",
    ),
    **dict.fromkeys(("freeze_vision_tower", "freeze_vit"), "tune.vision: frozen"),
    "vit_lr": "tune.vision.learning_rate",
    **dict.fromkeys(("freeze_multi_modal_projector", "freeze_aligner", "freeze_mm_mlp_adapter"), "tune.projector: frozen"),
    "tune_mm_mlp_adapter": "tune.projector: full",
    **dict.fromkeys(("aligner_lr", "mm_projector_lr"), "tune.projector.learning_rate"),
    **dict.fromkeys(("freeze_llm", "freeze_language_model", "freeze_backbone"), "tune.language: frozen"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name", "train_file", "train_dataset", "data_path"), "data.train"),
    **dict.fromkeys(("eval_dataset", "val_dataset", "test_datasets", "eval_file"), "evaluate.data"),
    **dict.fromkeys(("val_set_size", "val_size", "split_dataset_ratio"), "data.train.0.held_out"),
    **dict.fromkeys(("dataset_dir", "media_dir", "image_dir", "image_folder"), "data.train.0.media_root"),
    **dict.fromkeys(("max_samples", "max_train_samples"), "data.train.0.limit"),
    **dict.fromkeys(("cutoff_len", "sequence_len", "seq_length", "model_max_length"), "data.max_tokens"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "max_len"), "data.max_tokens"),
    **dict.fromkeys(("sample_packing", "neat_packing", "padding_free"), "data.packing"),
    "packing_length": "data.tokens_per_batch",
    **dict.fromkeys(("group_by_length", "group_by_modality_length"), "train.train_sampling_strategy: group_by_length"),
    **dict.fromkeys(("streaming", "dataset_streaming"), "data.stream"),
    **dict.fromkeys(("buffer_size", "shuffle_buffer_size"), "data.shuffle_window"),
    **dict.fromkeys(("interleave_probs", "interleave_prob"), "data.train.0.weight"),
    **dict.fromkeys(("mix_strategy", "stopping_strategy"), "data.mix"),
    "default_system": "data.train.0.system",
    **dict.fromkeys(("truncation_strategy", "truncation_mode"), "data.over_length"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "mask_history"), "data.supervise"),
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss"), "data.supervise"),
    **dict.fromkeys(("micro_batch_size", "batch_size", "train_batch_size"), "train.per_device_train_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs"), "train.num_train_epochs"),
    **dict.fromkeys(("lr", "base_lr"), "train.learning_rate"),
    **dict.fromkeys(("lr_scheduler", "scheduler"), "train.lr_scheduler_type"),
    "enable_liger_kernel": "train.use_liger_kernel",
    "optimizer": "train.optim",
    **dict.fromkeys(("gradient_clipping", "max_norm"), "train.max_grad_norm"),
    **dict.fromkeys(("val_batch_size", "per_device_eval_batch_size"), "evaluate.batch_size"),
    "overwrite_output_dir": "--overwrite on the command line",
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints"), "--resume on the command line"),
    **dict.fromkeys(("profiler_steps", "enable_torch_profiler"), "--profile on the command line, with a number of steps"),
    **dict.fromkeys(("bf16", "fp16", "mixed_precision"), "model.precision"),
}
"""By another toolkit's name: the recipe's key, with a value if the name implies one."""

OTHER_METHODS: Mapping[str, str] = {
    **{name: hint for method in METHODS.values() for name, hint in method.other_names.items()},
    "freeze": "its name here is frozen",
    "none": "its name here is frozen",
    "all": "its name here is full",
}
"""By another name of a method: what to write in a recipe."""

OTHER_VALUES: Mapping[str, Mapping[str, str]] = {
    "precision": {
        **dict.fromkeys(("4bit", "4-bit", "int4", "fp4", "4"), "nf4"),
        **dict.fromkeys(("8bit", "8-bit", "fp8", "8"), "int8"),
        **dict.fromkeys(("bfloat16", "fp16", "float16", "half", "16"), "bf16"),
        **dict.fromkeys(("float32", "float", "32", "no"), "fp32"),
    },
    "optim": {
        **dict.fromkeys(("adam", "adamw", "adamw_hf", "AdamW"), "adamw_torch"),
        **dict.fromkeys(("adam8bit", "adam_8bit", "adamw8bit"), "adamw_bnb_8bit"),
        "lion": "lion_32bit",
    },
    "lr_scheduler_type": {"cosine_annealing": "cosine", "wsd": "warmup_stable_decay", "one_cycle": "cosine", "none": "constant"},
    "target_modules": {"all": "all-linear", "all_linear": "all-linear", "linear": "all-linear", "auto": "all-linear"},
    "target_parameters": dict.fromkeys(("all", "auto", "experts", "all_experts", "mlp.experts"), "all-experts"),
}
"""By key: other names of its values, and the value to write."""


def value_hint(key: str, value: object) -> str:
    """A hint for a value that has another name in a recipe: `; write nf4`. Otherwise an empty text."""
    name = OTHER_VALUES.get(key, {}).get(str(value)) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    return f"; write {name}" if name else ""


def boolean_hint(value: object) -> str:
    """A hint for a boolean that YAML reads as text: `; write true`. Otherwise an empty text."""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        return ""
    names = {"true": ("yes", "on", "true", "1"), "false": ("no", "off", "false", "0")}
    return next((f"; write {truth}" for truth, words in names.items() if str(value).lower() in words), "")
