"""bf16: loss and gradients of LoRA beside plain transformers and PEFT on the same batch, on the CPU and on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.batching.collate import collate
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.models.compute import prepare_computation
from mmtune.models.packed_attention import attention_by_sample
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import Recipe

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_as_near_to_plain_peft_as_its_rounding(
    device: str, make_recipe: Callable[..., Recipe], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding is measured: plain transformers and PEFT in bf16 beside fp32. TF32 is off, for products by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recipe, processor = make_recipe(), AutoProcessor.from_pretrained(str(base))
    encoded = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)][:6]
    batch = {name: value.to(device) for name, value in collate(encoded, processor.tokenizer.pad_token_id).items()}
    count = int((batch["labels"][:, 1:] != -100).sum())
    objective = SupervisedTuning(recipe.objective)

    def gradients(dtype: torch.dtype, ours: bool) -> torch.Tensor:
        plain = AutoModelForImageTextToText.from_pretrained(str(base), dtype=dtype).to(device)
        if ours:
            prepare_computation(plain)
        torch.manual_seed(1)
        model: Any = get_peft_model(plain, LoraConfig(r=4, target_modules=TARGETS)).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would leave the other factor without a gradient
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator(device).manual_seed(len(name)))
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16), attention_by_sample():
            if ours:
                loss = objective.compute_loss(model, objective.model_inputs(model, dict(batch)), count).loss
            else:
                loss = model(**batch).loss
        loss.backward()
        trained = [parameter.grad.flatten().float() for parameter in model.parameters() if parameter.grad is not None]
        assert len(trained) > 8
        return torch.cat([loss.detach().float()[None], *trained]).cpu()

    exact = gradients(torch.float32, False)
    assert float((gradients(torch.float32, True) - exact).norm() / exact.norm()) < 1e-5
    rounded = gradients(torch.bfloat16, False)
    rounding = float((rounded - exact).norm())
    assert 0 < rounding < 0.1 * float(exact.norm())
    assert float((gradients(torch.bfloat16, True) - rounded).norm()) < 2 * rounding
