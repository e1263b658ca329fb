"""Optimizers of `train.optim` on the CPU: those of AdamW are compared with its definition, all others take a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from mmtune.recipe.recipe import Recipe
from mmtune.recipe.train_rules import missing_libraries
from mmtune.training.training_arguments import build_training_arguments
from mmtune.utils.errors import UserError

RATE, BETAS, EPSILON, STEPS = 1e-3, (0.9, 0.999), 1e-8, 20
ADAMW = {"adamw_torch": 1e-5, "adamw_torch_fused": 1e-5, "paged_adamw_32bit": 1e-5}
ADAMW |= dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 3e-2)
"""Largest relative difference of the change of a weight after 20 steps."""


def adamw(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """AdamW without weight decay by its definition (arXiv 1711.05101), in fp64."""
    mean = square = torch.zeros_like(weight, dtype=torch.float64)
    weight = weight.double()
    for step, gradient in enumerate((each.double() for each in gradients), start=1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        corrected = (square / (1 - BETAS[1] ** step)).sqrt() + EPSILON
        weight = weight - RATE * mean / (1 - BETAS[0] ** step) / corrected
    return weight


@pytest.mark.parametrize("name", [optimizer.value for optimizer in OptimizerNames])
def test_optimizers_run_on_the_cpu_or_name_their_library(name: str, make_recipe: Callable[..., Recipe]) -> None:
    for _, message in missing_libraries({"optim": name}):  # which stops a run before weights are loaded
        assert message.startswith(f"{name} needs a library that is not installed: pip install")
        return
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(128, 96, generator=generator) / 20  # more than 4096 values, which bitsandbytes keeps in 8 bits
    gradients = [torch.randn(128, 96, generator=generator) * (1 + step) / 100 for step in range(STEPS)]
    arguments = build_training_arguments(make_recipe(f"train.optim={name}", f"train.learning_rate={RATE}"))
    weight = nn.Parameter(before.clone())
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer: Any = kind([{"params": [weight], "weight_decay": 0.0}], **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    change = weight.detach().double() - before.double()
    assert torch.isfinite(change).all() and bool(change.any())
    if name in ADAMW:
        expected = adamw(before, gradients) - before.double()
        assert float((change - expected).norm() / expected.norm()) < ADAMW[name]


def test_liger_leaves_the_loss_alone_and_needs_a_gpu(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused loss would take the place of the model's forward pass, which returns no logits then."""
    recipe = make_recipe("train.use_liger_kernel=true", "train.liger_kernel_config={rope: false}")
    with pytest.raises(UserError, match=r"train\.use_liger_kernel: Liger's kernels need a GPU"):
        build_training_arguments(recipe)
    monkeypatch.setattr("transformers.TrainingArguments.device", torch.device("meta"))
    config = build_training_arguments(recipe).liger_kernel_config
    assert config == {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}
    with pytest.raises(UserError, match=r"liger_kernel_config.*not supported: mmtune computes"):
        make_recipe("train.use_liger_kernel=true", "train.liger_kernel_config={fused_linear_cross_entropy: true}")
    with pytest.raises(UserError, match=r"liger_kernel_config.*: needs use_liger_kernel: true"):
        make_recipe("train.liger_kernel_config={rope: true}")
