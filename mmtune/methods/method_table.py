"""The table of tuning methods, read by the recipe, the trainer, the merge and `mmtune methods`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from mmtune.methods.entries.adalora import ADALORA
from mmtune.methods.entries.bottleneck import BOTTLENECK
from mmtune.methods.entries.gated_prefix import GATED_PREFIX
from mmtune.methods.entries.lora import LORA
from mmtune.methods.entries.oft import OFT
from mmtune.methods.entries.prompt_methods import P_TUNING, PREFIX_TUNING, PROMPT_TUNING
from mmtune.methods.entries.shira import SHIRA
from mmtune.methods.method import BIAS_ALL, Method
from mmtune.methods.setting_types import COUNT, DROPOUT, POSITIVE_INT

if TYPE_CHECKING:
    from peft import PeftConfig

_TABLE = (
    LORA,
    ADALORA,
    Method(
        "ia3",
        "a learnt scale on keys, values and the feed-forward's inner width (arXiv 2205.05638)",
        "peft:IA3Config",
        1e-2,
        targets=["k_proj", "v_proj", "down_proj"],
        defaults={"feedforward_modules": ["down_proj"]},
        selectors={"target_modules": "modules", "feedforward_modules": "modules"},
        by_component=("feedforward_modules",),
    ),
    OFT,
    Method(
        "boft",
        "an orthogonal rotation made of butterflies (arXiv 2311.06243)",
        "peft:BOFTConfig",
        1e-3,
        unsupported_values=BIAS_ALL,
        setting_types={"boft_block_size": COUNT, "boft_dropout": DROPOUT},
    ),
    Method(
        "vera",
        "LoRA with frozen random matrices shared by all layers, and trained scales (arXiv 2310.11454)",
        "peft:VeraConfig",
        4e-3,
        unsupported_values=BIAS_ALL,
        setting_types={"r": COUNT, "vera_dropout": DROPOUT},
    ),
    Method(
        "loha",
        "a Hadamard product of two low-rank updates (arXiv 2108.06098)",
        "peft:LoHaConfig",
        1e-3,
        setting_types={"r": COUNT, "alpha": POSITIVE_INT, "rank_dropout": DROPOUT, "module_dropout": DROPOUT},
        needs_full_layers=True,
    ),
    Method(
        "lokr",
        "a Kronecker product as the update (arXiv 2309.14859)",
        "peft:LoKrConfig",
        1e-3,
        setting_types={"r": COUNT, "alpha": POSITIVE_INT, "rank_dropout": DROPOUT, "module_dropout": DROPOUT},
    ),
    Method(
        "miss",
        "one shared matrix a layer, added in shards (arXiv 2409.15371)",
        "peft:MissConfig",
        5e-4,
        unsupported_values=BIAS_ALL,
        setting_types={"r": COUNT, "miss_dropout": DROPOUT},
    ),
    SHIRA,
    Method(
        "ln_tuning",
        "the normalization layers' own weights (arXiv 2312.11420)",
        "peft:LNTuningConfig",
        1e-3,
        targets="all-norm",
        components=("vision", "language"),
        any_layer=True,
        needs_full_layers=True,
    ),
    PROMPT_TUNING,
    P_TUNING,
    PREFIX_TUNING,
    BOTTLENECK,
    GATED_PREFIX,
)
METHODS: Mapping[str, Method] = {method.name: method for method in _TABLE}
"""Every method that PEFT applies, by its name in a recipe; `frozen` and `full` are none of them."""

LANGUAGE_PREFIXES = tuple({method.language_prefix for method in _TABLE if method.language_prefix is not None})
"""Prefixes of parameters that a method keeps outside the base model; they count as the language model's."""


def method_of(model: Any) -> Method | None:
    """The method of a `PeftModel`'s active adapter; None for any other model."""
    from peft import PeftModel

    return method_of_config(model.active_peft_config) if isinstance(model, PeftModel) else None


def method_of_config(config: Any) -> Method | None:
    """The method of a PEFT configuration; None for one that is not in the table."""
    return _by_config_class().get(type(config))


def method_of_peft_type(peft_type: object) -> Method | None:
    """The method of an `adapter_config.json`'s `peft_type`; None for one that is not in the table."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    import mmtune.methods.tuners  # noqa: F401  (PEFT then knows all the methods)

    return _by_config_class().get(PEFT_TYPE_TO_CONFIG_MAPPING.get(str(peft_type)))


def full_modules_config(modules_to_save: list[str]) -> PeftConfig:
    """The configuration of a PEFT directory that holds modules trained in full and no adapted layer."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return LoraConfig(task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=modules_to_save)


@cache
def _by_config_class() -> dict[Any, Method]:
    return {method.config_class(): method for method in _TABLE}
