"""The tuning methods: what each is, which configuration it takes, where it may stand, and what it cannot do.

A recipe's `tune` section, the trainer, the merge and `mmtune methods` all read this table. What a cell of
`capabilities.json` says was measured by `tests/methods/measure_capabilities.py`, which runs every cell.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

CAPABILITIES = Path(__file__).parent / "capabilities.json"
PRECISIONS = ("fp32", "bf16", "int8", "nf4")
ZERO_STAGES = (1, 2, 3)

UNPROVEN = "mmtune has no proof of it"
OWNED = {
    "task_type": "mmtune sets it",
    "peft_type": "the method names it",
    "auto_mapping": "mmtune sets it",
    "peft_version": "PEFT records it",
    "base_model_name_or_path": "give the base with model.base",
    "revision": "PEFT records it",
    "inference_mode": "mmtune sets it",
    "modules_to_save": "give another component the method full, and it is saved with the adapter",
    "runtime_config": "it holds for one process and is not saved with the adapter",
    "exclude_modules": "name what is meant with target_modules",
    "fan_in_fan_out": "no layer of these families is stored transposed",
    "megatron_config": "mmtune does not run Megatron models",
    "megatron_core": "mmtune does not run Megatron models",
    "layers_to_transform": "write the layers into target_modules: a regular expression is matched against whole paths",
    "layers_pattern": "write the layers into target_modules: a regular expression is matched against whole paths",
}
_LORA_OWNED = OWNED | {
    "rank_pattern": "give each component its own r",
    "alpha_pattern": "give each component its own lora_alpha",
    "corda_config": UNPROVEN,
    "loftq_config": UNPROVEN,
    "velora_config": UNPROVEN,
    "monteclora_config": UNPROVEN,
    "kasa_config": UNPROVEN,
    "arrow_config": UNPROVEN,
    "use_bdlora": UNPROVEN,
    "use_qalora": UNPROVEN,
    "qalora_group_size": UNPROVEN,
    "alora_invocation_tokens": UNPROVEN,
    "layer_replication": UNPROVEN,
}
_PROMPT_OWNED = OWNED | {
    "token_dim": "it is the language model's",
    "num_transformer_submodules": "it is the language model's",
    "num_attention_heads": "it is the language model's",
    "num_layers": "it is the language model's",
}

Kind = Literal["layers", "attention", "prompt"]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in a recipe.
        about: what it does and where it comes from.
        config: `module:Class` of its PEFT configuration.
        learning_rate: its default.
        kind: "layers" adds to layers that a selector names; "attention" to the language model's attention; "prompt" puts virtual
            tokens before the input.
        mergeable: whether its update folds into the base's weights.
        defaults: settings that differ from PEFT's.
        targets: the default selector of `target_modules`.
        refused: settings that a recipe may not hold, with the reason.
        values: settings whose value is refused: (name, value) to the reason.
        by_component: settings that may differ where the method stands in several components, beside rate and targets.
    """

    name: str
    about: str
    config: str
    learning_rate: float
    kind: Kind = "layers"
    mergeable: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    targets: str | list[str] | None = "all-linear"
    refused: Mapping[str, str] = field(default_factory=lambda: OWNED)
    values: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    by_component: tuple[str, ...] = ()

    def config_class(self) -> Any:
        """The configuration's class."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(module), name)

    def settings(self) -> dict[str, Any]:
        """The defaults, with the default selector."""
        return dict(self.defaults) | ({} if self.targets is None else {"target_modules": self.targets})


_BIAS = {
    ("bias", "all"): "it would train biases of every component; lora_only trains those of the tuned layers",
}
_TABLE = (
    Method(
        "lora",
        "a low-rank update beside each layer (arXiv 2106.09685); use_rslora, use_dora, init_lora_weights: pissa, olora, eva, "
        "lora_ga, and loraplus_lr_ratio are its variants",
        "peft:LoraConfig",
        2e-4,
        defaults={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        refused=_LORA_OWNED,
        values=_BIAS,
        by_component=("r", "lora_alpha", "loraplus_lr_ratio", "target_parameters", "trainable_token_indices"),
    ),
    Method(
        "adalora",
        "LoRA whose ranks move to where they matter (arXiv 2303.10512)",
        "peft:AdaLoraConfig",
        1e-3,
        defaults={"init_r": 12, "target_r": 8, "lora_alpha": 32, "lora_dropout": 0.0},
        refused=_LORA_OWNED
        | dict.fromkeys(("r", "use_dora", "use_rslora", "lora_bias", "eva_config", "lora_ga_config"), "AdaLoRA has no such part")
        | {"init_lora_weights": "AdaLoRA has its own", "target_parameters": UNPROVEN, "trainable_token_indices": UNPROVEN}
        | {"total_step": "mmtune counts the run's steps", "ensure_weight_tying": UNPROVEN},
        values=_BIAS,
    ),
    Method(
        "ia3",
        "a learnt scale on keys, values and the feed-forward's inner width (arXiv 2205.05638)",
        "peft:IA3Config",
        1e-2,
        targets=["k_proj", "v_proj", "down_proj"],
        defaults={"feedforward_modules": ["down_proj"]},
        by_component=("feedforward_modules",),
    ),
    Method("oft", "an orthogonal rotation of each layer (arXiv 2306.07280)", "peft:OFTConfig", 1e-3, values=_BIAS),
    Method("boft", "an orthogonal rotation made of butterflies (arXiv 2311.06243)", "peft:BOFTConfig", 1e-3, values=_BIAS),
    Method(
        "vera",
        "LoRA with frozen random matrices shared by all layers, and trained scales (arXiv 2310.11454)",
        "peft:VeraConfig",
        4e-3,
        values=_BIAS,
    ),
    Method("loha", "a Hadamard product of two low-rank updates (arXiv 2108.06098)", "peft:LoHaConfig", 1e-3),
    Method("lokr", "a Kronecker product as the update (arXiv 2309.14859)", "peft:LoKrConfig", 1e-3),
    Method("miss", "one shared matrix a layer, added in shards (arXiv 2409.15371)", "peft:MissConfig", 5e-4, values=_BIAS),
    Method(
        "ln_tuning",
        "the normalization layers' own weights (arXiv 2312.11420)",
        "peft:LNTuningConfig",
        1e-3,
        targets="all-norm",
    ),
    Method(
        "prompt_tuning",
        "learnt embeddings before the input (arXiv 2104.08691)",
        "peft:PromptTuningConfig",
        1e-2,
        kind="prompt",
        mergeable=False,
        targets=None,
        defaults={"num_virtual_tokens": 20},
        refused=_PROMPT_OWNED
        | {"prompt_tuning_init": "they start at random", "prompt_tuning_init_text": "they start at random"}
        | {"tokenizer_name_or_path": "it is the base's", "tokenizer_kwargs": "it is the base's"},
    ),
    Method(
        "p_tuning",
        "learnt embeddings before the input, made by a small network (arXiv 2103.10385)",
        "peft:PromptEncoderConfig",
        1e-3,
        kind="prompt",
        mergeable=False,
        targets=None,
        defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
        refused=_PROMPT_OWNED,
    ),
    Method(
        "prefix_tuning",
        "learnt keys and values before every layer's own (arXiv 2101.00190)",
        "peft:PrefixTuningConfig",
        1e-2,
        kind="prompt",
        mergeable=False,
        targets=None,
        defaults={"num_virtual_tokens": 20},
        refused=_PROMPT_OWNED,
    ),
    Method(
        "bottleneck",
        "a small network after attention and feed-forward (arXiv 1902.00751), after the latter (2005.00052) or beside it "
        "(2110.04366)",
        "mmtune.methods.bottleneck:BottleneckConfig",
        1e-3,
        mergeable=False,
        targets=None,
        refused=OWNED | {"target_modules": "the placement names them"},
    ),
    Method(
        "gated_prefix",
        "LLaMA-Adapter: learnt prompts in the upper layers behind a gate that starts at zero (arXiv 2303.16199)",
        "mmtune.methods.gated_prefix:GatedPrefixConfig",
        1e-2,
        kind="attention",
        mergeable=False,
        targets=None,
        refused=OWNED | {"target_modules": "adapter_layers counts them from the top"},
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _TABLE}
"""Every method of PEFT's kind, by its name in a recipe; `frozen` and `full` are none."""

MUTATING_INITS = ("pissa", "olora", "lora_ga")
"""Initializations of LoRA that change the base's weights. Their adapters are turned into ordinary LoRA when they are saved."""
INITS_IN_PARTS = ("gaussian", "orthogonal", "pissa", "eva")
"""Of LoRA, those that draw, gather the weights that they read, or only run the model."""
METHODS_OF_WHOLE_WEIGHTS = ("loha", "ln_tuning")
"""Those for which PEFT reads or copies a layer's weight where it lies, which at ZeRO-3 would be a part of it."""

MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose positions have three parts, so that virtual tokens before the input have none."""


def refusal(
    method: str,
    settings: Mapping[str, Any],
    *,
    precision: str = "fp32",
    checkpointing: bool = False,
    model_type: str | None = None,
    zero_stage: int | None = None,
) -> str | None:
    """Why a combination does not work, with the nearest that does; None when it does.

    Args:
        settings: the method's, by PEFT's names.
        precision: of the base while training.
        checkpointing: gradient checkpointing.
        model_type: of the base's config, once it is known.
        zero_stage: DeepSpeed's, once the processes are known; None without it.
    """
    known = METHODS[method]
    measured = "dora" if method == "lora" and settings.get("use_dora") else method
    cell = capabilities().get(measured, {}).get(precision, {})
    if known.kind == "prompt" and model_type in MROPE:
        return f"{method} gives its virtual tokens no position in {model_type} (mRoPE); use gated_prefix or lora"
    init = settings.get("init_lora_weights")
    mutates = isinstance(init, str) and init.startswith(MUTATING_INITS)
    quantized = precision in ("int8", "nf4")
    if mutates and quantized:
        return f"init_lora_weights: {init} decomposes full weights, and model.precision: {precision} has none; use eva, or bf16"
    if mutates and settings.get("use_dora"):
        return f"init_lora_weights: {init} with use_dora cannot be saved as an adapter of the base as it was; use one of the two"
    if quantized and settings.get("target_parameters"):
        return f"target_parameters reaches into weights that model.precision: {precision} replaces; use bf16"
    if cell.get("train", True) is not True:
        return f"{measured} does not train with model.precision: {precision}; {nearest_that_works(measured, 'train')}"
    if checkpointing and cell.get("checkpointing", True) is not True:
        nearest = nearest_that_works(measured, "checkpointing")
        return f"{measured} does not train with train.activation_checkpointing; {nearest}"
    if zero_stage and cell.get(f"zero{zero_stage}", True) is not True:
        nearest = nearest_that_works(measured, f"zero{zero_stage}", precision)
        return f"{measured} does not train with model.precision: {precision} at ZeRO-{zero_stage}; {nearest}"
    return None


def nearest_that_works(method: str, what: str, precision: str = "fp32") -> str:
    """What to do where a method does not `train`, take `checkpointing`, `merge`, or train at `zero1` to `zero3`."""
    if what.startswith("zero"):
        lower = [stage for stage in ZERO_STAGES if capabilities().get(method, {}).get(precision, {}).get(f"zero{stage}") is True]
        return f"use ZeRO-{lower[-1]}, or lora" if lower else "launch with DDP, or use lora"
    if what == "merge":
        return "mmtune merge --keep-adapter releases it beside its base"
    if what == "checkpointing":
        return "switch it off, or use " + ("gated_prefix" if METHODS[method].kind == "prompt" else "lora")
    works = [p for p in ("bf16", "fp32") if capabilities().get(method, {}).get(p, {}).get("train") is True]
    return f"use {works[0]}, or lora" if works else "use lora"


@cache
def capabilities() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured: method to precision to `train`, `checkpointing`, `merge` and `zero1` to `zero3`, each true or the reason
    why not."""
    if not CAPABILITIES.is_file():
        return {}
    measured: dict[str, dict[str, dict[str, Any]]] = json.loads(CAPABILITIES.read_text(encoding="utf-8"))["methods"]
    return measured
