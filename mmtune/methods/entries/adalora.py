"""AdaLoRA (arXiv 2303.10512): LoRA that moves ranks to the layers where they matter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mmtune.methods.entries.lora import LORA_MANAGED
from mmtune.methods.method import BIAS_ALL, MANAGED, UNPROVEN, Method
from mmtune.methods.setting_types import COUNT, DROPOUT, POSITIVE_INT
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn

AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""Averages over steps of PEFT's rank allocator: the importance of each parameter and its uncertainty."""


class AdaLora(Method):
    """AdaLoRA. It allocates ranks after every step, adds an orthogonality term to the loss, and its file lacks masked ranks."""

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """With equal ranks PEFT asks torch for the 0th smallest importance."""
        super().check_model(model, targets, settings)
        if settings["target_r"] >= settings["init_r"]:
            raise UserError(f"target_r: expected less than init_r: {settings['init_r']}, got {settings['target_r']}")

    def build_config(self, settings: Mapping[str, Any], modules_to_save: list[str] | None, steps: int | None) -> PeftConfig:
        """The ranks' schedule spans the run."""
        return super().build_config({**settings, "total_step": steps}, modules_to_save, steps)

    @contextlib.contextmanager
    def shared_loss(self, model: PeftModel, passes: int) -> Iterator[None]:
        """PEFT adds the whole orthogonality term in every forward pass; here each pass adds its share of it."""
        config = model.active_peft_config
        weight = config.orth_reg_weight
        config.orth_reg_weight = weight / passes
        try:
            yield
        finally:
            config.orth_reg_weight = weight

    def after_step(self, model: PeftModel, step: int) -> None:
        """Allocate ranks by the gradients that the optimizer has just used."""
        tuner, config = model.base_model, model.active_peft_config
        last = config.total_step - config.tfinal
        if step > last and tuner.rankallocator.exp_avg_ipt:  # the step of the final allocation was skipped
            tuner.update_and_allocate(last)
        tuner.update_and_allocate(step)

    def training_state(self, model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The allocator's averages, and the present ranks."""
        allocator = model.base_model.rankallocator
        tensors = {f"{average}/{name}": tensor for average in AVERAGES for name, tensor in getattr(allocator, average).items()}
        return tensors, {"rank_pattern": json.dumps(model.active_peft_config.rank_pattern)}

    def load_training_state(self, model: PeftModel, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Restore averages and ranks."""
        tuner = model.base_model
        model.active_peft_config.rank_pattern = json.loads(metadata["rank_pattern"])
        for name, weight in tuner.model.named_parameters():
            for average in AVERAGES:
                if f"{average}/{name}" in tensors:
                    getattr(tuner.rankallocator, average)[name] = tensors[f"{average}/{name}"].to(weight.device)
        tuner.rankallocator.ipt = dict.fromkeys(tuner.rankallocator.exp_avg_ipt)  # written again in every step


ADALORA = AdaLora(
    "adalora",
    "LoRA with rank allocation during training (arXiv 2303.10512)",
    "peft:AdaLoraConfig",
    1e-3,
    defaults={"init_r": 12, "target_r": 8, "lora_alpha": 32, "lora_dropout": 0.0},
    managed=LORA_MANAGED
    | dict.fromkeys(("r", "use_dora", "use_rslora", "lora_bias", "eva_config", "lora_ga_config"), "AdaLoRA has no such part")
    | {"init_lora_weights": "AdaLoRA has its own", "total_step": "mmtune counts the run's steps"}
    | {"target_parameters": MANAGED["target_parameters"]}
    | dict.fromkeys(("trainable_token_indices", "ensure_weight_tying"), UNPROVEN),
    unsupported_values=BIAS_ALL,
    setting_types={"init_r": COUNT, "target_r": COUNT, "lora_alpha": POSITIVE_INT, "lora_dropout": DROPOUT},
    skips_steps=False,
    adds_to_loss=True,
    resumes_from_adapter=False,
)
