"""LoRA (arXiv 2106.09685) and its variants: rsLoRA, DoRA, LoRA+, and the initializations that PEFT has for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmtune.methods.method import BIAS_ALL, MANAGED, QUANTIZED, UNPROVEN, Method, Setting, Variant, check_linear
from mmtune.methods.selectors import ALL_EXPERTS
from mmtune.methods.setting_types import COUNT, DROPOUT, POSITIVE_INT, POSITIVE_OR_NONE, numbered
from mmtune.methods.soft_verbalizer import LABELS_SETTING, SOFT_VERBALIZER, label_conflicts
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

MUTATING_INITS = ("pissa", "olora", "lora_ga")
"""Initializations that subtract a product from the base's weights: PiSSA (arXiv 2404.02948), OLoRA (2406.01775), LoRA-GA
(2407.05000)."""
SHARDED_INITS = ("gaussian", "orthogonal", "pissa", "eva")
"""Initializations for a sharded base: they draw random numbers, gather the weights that they read, or only run the model."""

LORA_MANAGED = {name: reason for name, reason in MANAGED.items() if name != "target_parameters"} | {
    "rank_pattern": "give each component its own r",
    "alpha_pattern": "give each component its own lora_alpha",
    **dict.fromkeys(("corda_config", "loftq_config", "velora_config", "monteclora_config", "kasa_config"), UNPROVEN),
    **dict.fromkeys(("arrow_config", "use_bdlora", "use_qalora", "qalora_group_size"), UNPROVEN),
    **dict.fromkeys(("alora_invocation_tokens", "layer_replication"), UNPROVEN),
}
"""Fields that LoRA's and AdaLoRA's configurations share and a recipe cannot set."""


class Lora(Method):
    """LoRA. Its hooks are those of `init_lora_weights` and of ranks that differ between components."""

    def check_component(self, component: str, settings: Mapping[str, Any]) -> str | None:
        """EVA (arXiv 2410.07170) decomposes the language model's activations."""
        if component != "language" and settings.get("init_lora_weights") == "eva":
            return "init_lora_weights: eva is supported in tune.language only"
        if component != "language" and settings.get(SOFT_VERBALIZER):
            return f"{SOFT_VERBALIZER}: the labels are tokens of the language model; write it in tune.language"
        return super().check_component(component, settings)

    def incompatibility(self, settings: Mapping[str, Any], precision: str, model_type: str | None) -> str | None:
        """Initializations that decompose weights need full ones."""
        init = settings.get("init_lora_weights")
        setting = f"init_lora_weights: {init}"
        if is_mutating(init) and precision in QUANTIZED:
            return f"{setting} decomposes full weights, and model.precision: {precision} has none; use eva, or bf16"
        if is_mutating(init) and settings.get("use_dora"):
            return f"{setting} with use_dora cannot be saved as an adapter of the original base; use one of the two"
        return None

    def conflicts(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Labels; and PEFT adapts a parameter by adding the update to it before each forward pass."""
        yield from label_conflicts(settings)
        if not settings.get("target_parameters"):
            return
        init = settings.get("init_lora_weights", True)
        reasons = {
            "lora_dropout": "the update is added to the weight and has no input of its own; write lora_dropout: 0",
            "use_dora": "PEFT has DoRA for layers only; leave it out",
            "lora_bias": "the update is added to the weight and has no bias; leave it out",
        }
        for name, reason in reasons.items():
            if settings.get(name):
                yield name, f"not supported with target_parameters: {reason}"
        if not isinstance(init, bool) and init != "gaussian":
            message = f"not supported with target_parameters: {init} decomposes one matrix, not a stack"
            yield "init_lora_weights", f"{message}; leave it out, or write gaussian"

    def needs_full_weights(self, settings: Mapping[str, Any]) -> bool:
        """OLoRA and LoRA-GA decompose the weights where they lie."""
        init = settings.get("init_lora_weights")
        return isinstance(init, str) and not init.startswith(SHARDED_INITS)

    def plain_initialization(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """PEFT's default, random A and zero B."""
        return {"init_lora_weights": True} if "init_lora_weights" in settings else {}

    def settings_by_component(
        self, targets: Mapping[str, list[str]], settings: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Each component's rank and alpha, as PEFT's patterns."""
        return {
            "rank_pattern": {path: settings[name]["r"] for name, paths in targets.items() for path in paths},
            "alpha_pattern": {path: settings[name]["lora_alpha"] for name, paths in targets.items() for path in paths},
        }

    def settle_targets(self, model: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Layers whose names PEFT would read as experts are targeted by their weights, which it leaves as they are."""
        from mmtune.methods.tuners.peft_private import names_read_as_experts

        names = names_read_as_experts(str(model.config.model_type))
        paths = settings.get("target_modules") or ()
        read_as_experts = [path for path in paths if path.rpartition(".")[2] in names]
        if not read_as_experts:
            return settings
        weights = {path: f"{path}.weight" for path in read_as_experts}
        for name, message in self.conflicts({**settings, "target_parameters": list(weights.values())}):
            raise UserError(
                f"{name}: PEFT would read {read_as_experts[0]} as experts, so it is adapted by target_parameters; {message}"
            )
        patterns: dict[str, Any] = {
            name: {weights.get(path, path): value for path, value in settings[name].items()}
            for name in ("rank_pattern", "alpha_pattern")
            if name in settings
        }
        return {
            **settings,
            **patterns,
            "target_modules": [path for path in paths if path not in weights],
            "target_parameters": [*(settings.get("target_parameters") or ()), *weights.values()],
        }

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """A matrix has as many factors as its smaller dimension."""
        for path, module in targets.items():
            if "Experts" in type(module).__name__:
                raise UserError(f"{path} holds stacked experts, which are no layers; write target_parameters: {ALL_EXPERTS}")
        for path in settings.get("target_parameters") or ():
            if not model.get_parameter(path).is_floating_point():
                raise UserError(
                    f"{path} is quantized, and target_parameters adapts the weight itself; leave it out, or use model.precision: "
                    "bf16"
                )
        init = settings.get("init_lora_weights")
        if is_mutating(init):
            check_linear(targets, f"init_lora_weights: {init}")
            for path, module in targets.items():
                layer: Any = module
                rank = (settings.get("rank_pattern") or {}).get(path, settings["r"])
                largest = min(layer.in_features, layer.out_features)
                if rank > largest:
                    size = f"{layer.in_features} x {layer.out_features}"
                    raise UserError(
                        f"r: init_lora_weights: {init} expected at most {largest}, the rank of {path} ({size}), got {rank}"
                    )
        super().check_model(model, targets, settings)

    def build_config(self, settings: Mapping[str, Any], modules_to_save: list[str] | None, steps: int | None) -> PeftConfig:
        """With the configuration of the initialization, which PEFT takes as an object; with no target where only tokens train."""
        from peft import EvaConfig, LoraGAConfig
        from peft.utils.constants import DUMMY_TARGET_MODULES

        values = dict(settings)
        if values.get("trainable_token_indices") and not (values.get("target_modules") or values.get("target_parameters")):
            values["target_modules"] = DUMMY_TARGET_MODULES
        for init, config in (("eva", EvaConfig), ("lora_ga", LoraGAConfig)):
            if settings.get("init_lora_weights") == init:
                values[f"{init}_config"] = config(**(settings.get(f"{init}_config") or {}))
        return super().build_config(values, modules_to_save, steps)

    def before_wrapping(self, model: nn.Module, config: PeftConfig, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """LoRA-GA decomposes the gradients of the base's weights."""
        from peft.tuners.lora.loraga import preprocess_loraga

        def run_backward() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        if config.init_lora_weights == "lora_ga":
            preprocess_loraga(model, config, run_backward)

    def initializes_from_data(self, config: PeftConfig) -> bool:
        """EVA (arXiv 2410.07170)."""
        return config.init_lora_weights == "eva"

    def after_wrapping(self, model: PeftModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """EVA decomposes the inputs of the adapted layers."""
        from peft import initialize_lora_eva_weights

        initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)

    def rate_factor(self, parameter: str, settings: Mapping[str, Any]) -> float:
        """LoRA+ (arXiv 2402.12354): B learns faster than A."""
        ratio = settings.get("loraplus_lr_ratio")
        return ratio if ratio is not None and (".lora_B." in parameter or ".lora_embedding_B." in parameter) else 1.0

    def initial_factors(self, model: PeftModel) -> dict[str, torch.Tensor] | None:
        """A and B of a mutating initialization, by their keys in the adapter's file."""
        from peft import get_peft_model_state_dict

        if not is_mutating(model.active_peft_config.init_lora_weights):
            return None
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_A" in name or ".lora_B" in name}

    def restore_base(self, adapter: Path, initial: Mapping[str, torch.Tensor]) -> None:
        """Write an ordinary LoRA of twice the rank: B A - B0 A0 = [B, -B0] [A; A0]. PEFT's own conversion leaves out the modules
        that trained in full."""
        import torch
        from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
        from safetensors.torch import load_file, save_file

        weights, settings = adapter / SAFETENSORS_WEIGHTS_NAME, adapter / CONFIG_NAME
        tensors = load_file(weights)
        for name, before in initial.items():
            trained = tensors[name]
            tensors[name] = torch.cat([trained, before], dim=0) if ".lora_A" in name else torch.cat([trained, -before], dim=1)
        save_file(tensors, weights, metadata={"format": "pt"})
        config: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        # The update is scaled by alpha / r, or by alpha / sqrt(r) with rsLoRA: this keeps the scale.
        alpha_factor = 2**0.5 if config["use_rslora"] else 2
        config |= {
            "init_lora_weights": True,
            "lora_ga_config": None,
            "r": 2 * config["r"],
            "lora_alpha": alpha_factor * config["lora_alpha"],
        }
        config["rank_pattern"] = {name: 2 * rank for name, rank in config["rank_pattern"].items()}
        config["alpha_pattern"] = {name: alpha_factor * alpha for name, alpha in config["alpha_pattern"].items()}
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_mutating(init: object) -> bool:
    """Whether an `init_lora_weights` changes the base's weights."""
    return isinstance(init, str) and init.startswith(MUTATING_INITS)


LORA = Lora(
    "lora",
    "a low-rank update beside each layer (arXiv 2106.09685); use_rslora, use_dora, init_lora_weights: pissa, olora, eva, "
    "lora_ga, and loraplus_lr_ratio are its variants",
    "peft:LoraConfig",
    2e-4,
    defaults={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    any_layer=True,
    selectors={"target_modules": "modules", "target_parameters": "parameters"},
    managed=LORA_MANAGED,
    unsupported_values=BIAS_ALL,
    setting_types={
        "r": COUNT,
        "lora_alpha": POSITIVE_INT,
        "lora_dropout": DROPOUT,
        "target_parameters": Literal["all-experts"] | list[str] | None,
        "init_lora_weights": bool | Literal["gaussian", "eva", "olora", "pissa", "lora_ga"] | numbered("pissa_niter_"),
    },
    extra_settings=LABELS_SETTING
    | {"loraplus_lr_ratio": Setting(POSITIVE_OR_NONE, "LoRA+ (arXiv 2402.12354): how many times faster B learns than A.")},
    by_component=("r", "lora_alpha", "loraplus_lr_ratio", "target_parameters", "trainable_token_indices", SOFT_VERBALIZER),
    variants={"dora": Variant("LoRA with use_dora: direction and size apart (arXiv 2402.09353)", {"use_dora": True})},
    other_names={
        "qlora": "QLoRA is method: lora with model.precision: nf4",
        "dora": "DoRA is method: lora with use_dora: true",
        "qdora": "it is method: lora with use_dora: true and model.precision: nf4",
        "rslora": "it is method: lora with use_rslora: true",
        "pissa": "it is method: lora with init_lora_weights: pissa",
        "olora": "it is method: lora with init_lora_weights: olora",
        "lora_ga": "it is method: lora with init_lora_weights: lora_ga",
        "lora+": "it is method: lora with loraplus_lr_ratio",
        "loraplus": "it is method: lora with loraplus_lr_ratio",
    },
    other_keys={
        **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
        **dict.fromkeys(("lora_target", "lora_target_modules", "target"), "target_modules"),
        "lora_target_linear": "target_modules: all-linear",
        **dict.fromkeys(("use_peft", "use_lora", "lora_enable"), "method: lora"),
        "lora_target_parameters": "target_parameters",
        "peft_use_dora": "use_dora",
        "lorap_lr_ratio": "loraplus_lr_ratio",
        "pissa_init": "init_lora_weights: pissa",
    },
    supports_fsdp=True,
)
